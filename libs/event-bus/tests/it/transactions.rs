use crate::documents::{Id, event};
use crate::harness::{Harness, append};
use event_bus::Event;
use sqlx::Executor;
use std::time::Duration;
use testkit::{eventually, eventually_within};
use tokio::time::timeout;

#[tokio::test]
async fn only_committed_events_are_published() {
    let mut harness = Harness::start().await;
    let bus = harness.relay().await;
    let (rolled_back, dropped, committed) = (Id::generate(), Id::generate(), Id::generate());

    let mut tx = bus.begin().await.unwrap();
    tx.append([&event(rolled_back, 0)]).await.unwrap();
    tx.rollback().await.unwrap();
    let mut tx = bus.begin().await.unwrap();
    tx.append([&event(dropped, 0)]).await.unwrap();
    drop(tx);
    append(&bus, committed, 0..1).await;

    harness.published().await;
    assert_eq!(harness.stream().await, [event(committed, 0).event_id()]);
}

#[tokio::test]
async fn a_second_event_for_a_version_is_refused() {
    let mut harness = Harness::start().await;
    let bus = harness.bus("127.0.0.1:1").await;
    harness.tasks.spawn(bus.clone().relay::<crate::documents::DocumentEvent>(harness.stop.clone()));
    eventually("the database", async || bus.connection().await.map(drop)).await.unwrap();
    let id = Id::generate();
    append(&bus, id, 0..1).await;
    let mut tx = bus.begin().await.unwrap();
    let error = tx.append([&event(id, 0)]).await.unwrap_err();
    let event_bus::Error::Postgres(error) = error else { panic!("{error}") };
    assert!(error.as_database_error().unwrap().is_unique_violation(), "{error}");
}

#[tokio::test]
async fn a_transaction_whose_error_was_ignored_does_not_look_committed() {
    let mut harness = Harness::start().await;
    let bus = harness.relay().await;
    for ends in [false, true] {
        let mut tx = bus.begin().await.unwrap();
        tx.append([&event(Id::generate(), 0)]).await.unwrap();
        tx.execute("select 1 / 0").await.unwrap_err();
        let outcome = if ends { tx.end(Ok(())).await } else { tx.commit().await };
        let error = outcome.unwrap_err();
        assert!(error.to_string().contains("current transaction is aborted") && !error.is_outage(), "{error}");
    }
    append(&bus, Id::generate(), 0..1).await;
    harness.published().await;
    assert_eq!(harness.stream().await.len(), 1);
}

#[tokio::test]
async fn a_cancelled_transaction_leaves_no_connection_inside_it() {
    let mut harness = Harness::start().await;
    let bus = harness.relay().await;
    // From long to short, so that no later transaction completes and ends one that an earlier future has left open.
    for round in (0..400_u64).rev() {
        let work = async {
            let mut tx = bus.begin().await.unwrap();
            tx.append([&event(Id::generate(), 0)]).await.unwrap();
            tx.commit().await.unwrap();
        };
        // Cancelled at another point each time: a transaction takes about a millisecond.
        let _ = timeout(Duration::from_micros(round * 5), work).await;
    }
    let mut db = harness.db().await;
    // Much sooner than Postgres ends idle transactions.
    eventually_within(Duration::from_secs(4), "all connections to rest outside of transactions", async || {
        let sql = "select count(*) from pg_stat_activity
                   where datname = current_database() and state like 'idle in transaction%'";
        let open: i64 = sqlx::query_scalar(sql).fetch_one(&mut db).await?;
        anyhow::ensure!(open == 0, "{open} are inside one");
        Ok(())
    })
    .await
    .unwrap();
    // All connections at once: none is lost, and none is inside a cancelled transaction.
    let mut held = Vec::new();
    for _ in 0..8 {
        held.push(bus.begin().await.unwrap());
    }
    for tx in held {
        tx.rollback().await.unwrap();
    }
}
