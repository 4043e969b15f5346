//! A relay whose publish arrives after another relay has taken over.

use crate::documents::{Id, event};
use crate::harness::{Harness, append};
use sqlx::Executor;
use testkit::{Proxy, eventually};

async fn a_publish_that_arrives_after_a_takeover_is_refused(backlog: i64, published_meanwhile: i64) {
    let mut harness = Harness::start().await;
    let way = Proxy::to(&harness.nats.server()).await.unwrap();
    let stale = harness.relay_through(&testkit::nats_url("admin", &way.address().to_string())).await;
    // A transaction gets its ids first, and commits later, between the reads of the two relays.
    let (first, second) = (Id::generate(), Id::generate());
    let mut late = harness.db().await;
    late.execute("begin").await.unwrap();
    for version in 0..published_meanwhile {
        let body = event_bus::Publish::encode(&event(second, version));
        let sql = "insert into bus.outbox (stream, subject, aggregate_id, version, payload)
                   values ('DOCUMENTS', 'document.created', $1, $2, $3)";
        sqlx::query(sql).bind(second.to_string()).bind(version).bind(body).execute(&mut late).await.unwrap();
    }
    append(&stale, first, 0..1).await;
    harness.published().await;
    harness.forget_event_ids().await;

    // The stale relay reads its rows and publishes them, but the messages do not arrive.
    way.hold();
    let mut tx = stale.begin().await.unwrap();
    for version in 1..=backlog {
        tx.append([&event(first, version)]).await.unwrap();
    }
    tx.commit().await.unwrap();
    eventually("the stale relay to hold the lock", async || {
        let mut db = harness.db().await;
        let free = sqlx::query("select 1 from bus.relay for update skip locked").fetch_optional(&mut db).await?;
        anyhow::ensure!(free.is_none(), "it is not locked");
        Ok(())
    })
    .await
    .unwrap();
    // Postgres ends its transaction, as it does with a relay that is frozen for too long. The lock is released.
    let end = "select pg_terminate_backend(pid) from pg_stat_activity
               where datname = current_database() and state = 'idle in transaction' and application_name = 'test'";
    sqlx::query(end).execute(&mut harness.db().await).await.unwrap();

    // Events with smaller ids than those that it has read appear in the outbox.
    late.execute("commit").await.unwrap();
    let successor = harness.relay().await;
    append(&successor, second, published_meanwhile..published_meanwhile + 1).await;
    harness.published().await;

    harness.forget_event_ids().await;
    way.release();
    append(&stale, first, backlog + 1..backlog + 3).await;
    harness.published().await;

    let stream = harness.stream().await;
    let versions_of = |id: Id| {
        let of = stream.iter().filter_map(|event_id| event_id.strip_prefix(&format!("{id}-")));
        of.map(|version| version.parse().unwrap()).collect::<Vec<i64>>()
    };
    assert_eq!(versions_of(first), (0..=backlog + 2).collect::<Vec<_>>());
    assert_eq!(versions_of(second), (0..=published_meanwhile).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_single_stale_event_is_refused() {
    a_publish_that_arrives_after_a_takeover_is_refused(1, 3).await;
}

#[tokio::test]
async fn a_stale_batch_is_refused_as_a_whole() {
    a_publish_that_arrives_after_a_takeover_is_refused(8, 5).await;
}
