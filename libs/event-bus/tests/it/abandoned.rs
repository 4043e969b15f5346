//! A recovery waits for the events of consumers that nobody reads any more.

use crate::documents::Id;
use crate::harness::Harness;
use crate::log::Log;
use crate::recovery::recovered;
use crate::shelf::{Shelf, put};
use crate::subscribing::Recorder;
use testkit::eventually;

/// The release before had another consumer, which was deleted. The one of this release exists, and its subscription starts late.
#[tokio::test]
async fn a_recovery_does_not_wait_for_a_consumer_that_does_not_exist_any_more() {
    let mut harness = Harness::start().await;
    let bus = harness.healing_relay(Shelf).await;
    let id = Id::generate();
    put(&bus, &[id]).await;
    harness.published().await;
    harness.tasks.shutdown().await;
    let restored = "update bus.relay set incarnation = 'another';
        insert into bus.recovery_reads (stream, consumer, after_seq) values ('DOCUMENTS', 'gone', 0), ('DOCUMENTS', 'reader', 0)";
    sqlx::raw_sql(restored).execute(&mut harness.db().await).await.unwrap();
    let left = async |harness: &Harness| {
        let reads = sqlx::query_scalar("select consumer from bus.recovery_reads");
        reads.fetch_all(&mut harness.db().await).await.unwrap()
    };

    let (log, logging) = Log::start();
    let bus = harness.healing_relay(Shelf).await;
    eventually("the consumer to be given up", async || {
        let left: Vec<String> = left(&harness).await;
        anyhow::ensure!(!left.contains(&"gone".to_owned()), "{left:?}");
        anyhow::Ok(())
    })
    .await
    .unwrap();
    assert_eq!(left(&harness).await, ["reader"], "a consumer that exists has to be read");
    assert!(bus.check_ready().await.is_err(), "the recovery goes on");
    drop(logging);
    let warnings = log.lines("the consumer gone does not exist any more");
    assert!(warnings.len() == 1 && warnings[0].contains(" WARN "), "{warnings:#?}");

    let recorder = Recorder::default();
    harness.tasks.spawn(bus.clone().subscribe("reader", recorder.clone(), harness.stop.clone()));
    recovered(&harness).await;
    recorder.has(&crate::documents::event_ids(id, 0..1)).await;
}
