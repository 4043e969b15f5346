use crate::harness::Harness;
use testkit::eventually;

async fn prepared(harness: &Harness) -> event_bus::Bus {
    let bus = harness.bus("127.0.0.1:1").await;
    tokio::spawn(bus.clone().relay::<crate::documents::DocumentEvent>(harness.stop.clone()));
    bus
}

async fn is_ready(bus: &event_bus::Bus) {
    eventually("the database to be prepared", async || bus.connection().await.map(drop)).await.unwrap();
}

#[tokio::test]
async fn replicas_prepare_an_empty_database_at_once() {
    let harness = Harness::start().await;
    let buses = [prepared(&harness).await, prepared(&harness).await, prepared(&harness).await];
    for bus in &buses {
        is_ready(bus).await;
    }
}

/// As during a rolling update, or after a rollback.
#[tokio::test]
async fn an_older_replica_starts_on_a_database_that_a_newer_one_has_migrated() {
    let harness = Harness::start().await;
    is_ready(&prepared(&harness).await).await;
    let newer = "insert into bus._migrations (version, description, success, checksum, execution_time)
                 values (29990101000000, 'newer', true, 'x', 1)";
    sqlx::query(newer).execute(&mut harness.db().await).await.unwrap();
    is_ready(&prepared(&harness).await).await;
}

#[tokio::test]
async fn a_failed_migration_does_not_block_later_ones() {
    let harness = Harness::start().await;
    is_ready(&prepared(&harness).await).await;
    let spoil = "update bus._migrations set checksum = checksum || 'x'";
    sqlx::query(spoil).execute(&mut harness.db().await).await.unwrap();
    let stuck = prepared(&harness).await;
    tokio::time::sleep(std::time::Duration::from_millis(500)).await; // time for failed attempts
    assert!(stuck.connection().await.is_err(), "it accepts a wrong checksum");
    let mend = "update bus._migrations set checksum = substr(checksum, 1, length(checksum) - 1)";
    sqlx::query(mend).execute(&mut harness.db().await).await.unwrap();
    is_ready(&prepared(&harness).await).await;
    is_ready(&stuck).await;
}
