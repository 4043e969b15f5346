use crate::documents::{DocumentEvent, Id, event};
use crate::harness::{Harness, append};
use event_bus::{Event, Handler, Publish, Received, Transaction};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use testkit::{eventually, eventually_within};

/// Records the events that it gets, and fails on demand.
#[derive(Clone, Default)]
pub struct Recorder {
    applied: Arc<Mutex<Vec<String>>>,
    calls: Arc<AtomicUsize>,
    fault: Arc<Mutex<Option<Fault>>>,
}

#[derive(Clone)]
enum Fault {
    /// Refuses every batch that contains this event.
    Refuse(String),
    /// Ignores an error.
    Swallow,
    /// Postgres ends the connection in the middle of the handler.
    Disconnect,
}

impl Handler for Recorder {
    type Event = DocumentEvent;

    async fn apply(&self, tx: &mut Transaction, events: &[Received<DocumentEvent>]) -> anyhow::Result<()> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        let fault = self.fault.lock().unwrap().clone();
        match fault {
            Some(Fault::Refuse(id)) => {
                anyhow::ensure!(events.iter().all(|event| event.event_id() != id), "not this one");
            }
            Some(Fault::Swallow) => drop(sqlx::query("select 1 / 0").execute(&mut **tx).await),
            Some(Fault::Disconnect) => {
                sqlx::query("select pg_terminate_backend(pg_backend_pid())").execute(&mut **tx).await?;
            }
            None => {}
        }
        self.applied.lock().unwrap().extend(events.iter().map(|event| event.event_id()));
        Ok(())
    }
}

impl Recorder {
    pub async fn has(&self, event_ids: &[String]) {
        let all = eventually("the events to be applied", async || {
            let applied = self.applied.lock().unwrap();
            anyhow::ensure!(event_ids.iter().all(|id| applied.contains(id)), "{} are", applied.len());
            Ok(())
        });
        all.await.unwrap();
    }

    /// The ids of the events that were applied, in their order.
    pub fn applied(&self) -> Vec<String> {
        self.applied.lock().unwrap().clone()
    }

    /// Refuses every batch that contains this event.
    pub fn refuses(&self, event_id: &str) {
        self.fails(Some(Fault::Refuse(event_id.to_owned())));
    }

    fn fails(&self, fault: Option<Fault>) {
        *self.fault.lock().unwrap() = fault;
    }
}

async fn unacknowledged(harness: &Harness) -> anyhow::Result<usize> {
    let consumer = harness.jetstream().await.get_stream("DOCUMENTS").await?.consumer_info("reader").await?;
    Ok(consumer.num_ack_pending + usize::try_from(consumer.num_pending)?)
}

async fn letters(harness: &Harness, status: &'static str) -> i64 {
    let sql = "select count(*) from bus.dead_letters where status = $1";
    sqlx::query_scalar(sql).bind(status).fetch_one(&mut harness.db().await).await.unwrap()
}

#[tokio::test]
async fn a_failing_event_is_tried_five_times_and_its_neighbours_are_applied() {
    let mut harness = Harness::start().await;
    let (bus, recorder) = (harness.relay().await, Recorder::default());
    let mut ids = append(&bus, Id::generate(), 0..4).await;
    let bad = append(&bus, Id::generate(), 0..1).await.remove(0);
    ids.extend(append(&bus, Id::generate(), 0..4).await);
    recorder.fails(Some(Fault::Refuse(bad.clone())));
    harness.tasks.spawn(bus.clone().subscribe("reader", recorder.clone(), harness.stop.clone()));
    recorder.has(&ids).await;
    eventually_within(Duration::from_mins(1), "the dead letter", async || {
        anyhow::ensure!(unacknowledged(&harness).await? == 0);
        Ok(())
    })
    .await
    .unwrap();
    let sql = "select status, attempts, error, event_id from bus.dead_letters";
    let letter: Vec<(String, i32, String, String)> =
        sqlx::query_as(sql).fetch_all(&mut harness.db().await).await.unwrap();
    assert_eq!(letter, [("dead".to_owned(), 5, "not this one".to_owned(), bad)]);
}

#[tokio::test]
async fn a_failing_event_is_not_tried_again_after_a_newer_version() {
    let mut harness = Harness::start().await;
    let (bus, recorder) = (harness.relay().await, Recorder::default());
    let id = Id::generate();
    let mut ids = append(&bus, id, 0..9).await;
    recorder.fails(Some(Fault::Refuse(ids.remove(4))));
    harness.tasks.spawn(bus.clone().subscribe("reader", recorder.clone(), harness.stop.clone()));
    recorder.has(&ids).await;
    eventually("nothing to be left", async || unacknowledged(&harness).await.is_ok_and(|open| open == 0))
        .await
        .unwrap();
    assert_eq!((letters(&harness, "superseded").await, letters(&harness, "dead").await), (1, 0));
}

/// The id of a message that is no event may be too long for an index, but the message must be stored.
#[tokio::test]
async fn poison_messages_with_hostile_headers_are_stored_and_block_no_event() {
    let mut harness = Harness::start().await;
    let (bus, recorder) = (harness.relay().await, Recorder::default());
    let jetstream = harness.jetstream().await;
    eventually("the stream", async || jetstream.get_stream("DOCUMENTS").await).await.unwrap();
    // Random, because an index compresses long values.
    let long = [(); 250].map(|()| format!("{:032x}", rand::random::<u128>())).concat();
    for number in 0..50 {
        let mut headers = async_nats::HeaderMap::new();
        headers.insert("Nats-Msg-Id", format!("{long}-{number}").as_str());
        headers.insert("X-Long", long.as_str());
        jetstream.publish_with_headers("document.created", headers, "garbage".into()).await.unwrap().await.unwrap();
    }
    harness.tasks.spawn(bus.clone().subscribe("reader", recorder.clone(), harness.stop.clone()));
    recorder.has(&append(&bus, Id::generate(), 0..10).await).await;
    eventually("the dead letters", async || letters(&harness, "dead").await == 50).await.unwrap();
    assert_eq!(unacknowledged(&harness).await.unwrap(), 0);
}

#[tokio::test]
async fn a_poison_message_is_terminated_only_after_it_is_stored() {
    let mut harness = Harness::start().await;
    let (bus, recorder) = (harness.relay().await, Recorder::default());
    harness.tasks.spawn(bus.clone().subscribe("reader", recorder.clone(), harness.stop.clone()));
    recorder.has(&append(&bus, Id::generate(), 0..1).await).await;

    let mut holder = harness.db().await;
    sqlx::query("begin").execute(&mut holder).await.unwrap();
    sqlx::query("lock table bus.dead_letters in share mode").execute(&mut holder).await.unwrap();
    harness.jetstream().await.publish("document.created", "garbage".into()).await.unwrap().await.unwrap();
    eventually("a statement to wait for the table", async || {
        let sql = "select count(*) from pg_locks where not granted and relation = 'bus.dead_letters'::regclass";
        sqlx::query_scalar::<_, i64>(sql).fetch_one(&mut harness.db().await).await.is_ok_and(|waiting| waiting > 0)
    })
    .await
    .unwrap();
    assert_eq!(unacknowledged(&harness).await.unwrap(), 1, "terminated before it was stored");
    sqlx::query("rollback").execute(&mut holder).await.unwrap();
    eventually("the dead letter", async || letters(&harness, "dead").await == 1).await.unwrap();
    eventually("its end", async || unacknowledged(&harness).await.is_ok_and(|open| open == 0)).await.unwrap();
}

#[tokio::test]
async fn a_handler_that_ignores_an_error_commits_and_acknowledges_nothing() {
    let mut harness = Harness::start().await;
    let (bus, recorder) = (harness.relay().await, Recorder::default());
    recorder.fails(Some(Fault::Swallow));
    harness.tasks.spawn(bus.clone().subscribe("reader", recorder.clone(), harness.stop.clone()));
    append(&bus, Id::generate(), 0..1).await;
    eventually("the failed attempt", async || letters(&harness, "retrying").await == 1).await.unwrap();
    assert_eq!(unacknowledged(&harness).await.unwrap(), 1);

    recorder.fails(None);
    eventually("the event to be acknowledged", async || unacknowledged(&harness).await.is_ok_and(|open| open == 0))
        .await
        .unwrap();
    assert_eq!(letters(&harness, "superseded").await, 1, "the record of the failed attempt is not superseded");
}

#[tokio::test]
async fn an_outage_of_postgres_is_no_failed_attempt_of_an_event() {
    let mut harness = Harness::start().await;
    let (bus, recorder) = (harness.relay().await, Recorder::default());
    recorder.fails(Some(Fault::Disconnect));
    harness.tasks.spawn(bus.clone().subscribe("reader", recorder.clone(), harness.stop.clone()));
    let ids = append(&bus, Id::generate(), 0..3).await;
    eventually("more failures than an event may have", async || recorder.calls.load(Ordering::Relaxed) > 7)
        .await
        .unwrap();
    recorder.fails(None);
    recorder.has(&ids).await;
    let any: i64 =
        sqlx::query_scalar("select count(*) from bus.dead_letters").fetch_one(&mut harness.db().await).await.unwrap();
    assert_eq!(any, 0);
}

#[tokio::test]
async fn a_newer_version_that_was_applied_supersedes_a_dead_letter() {
    let mut harness = Harness::start().await;
    let (bus, recorder) = (harness.relay().await, Recorder::default());
    harness.tasks.spawn(bus.clone().subscribe("reader", recorder.clone(), harness.stop.clone()));
    let id = Id::generate();
    append(&bus, id, 0..1).await;
    harness.append_garbage(id, 1).await;
    eventually("the dead letter", async || letters(&harness, "dead").await == 1).await.unwrap();
    append(&bus, id, 2..3).await;
    eventually("the newer version", async || letters(&harness, "superseded").await == 1).await.unwrap();
}

#[tokio::test]
async fn subscriptions_share_the_events_and_stop_with_all_acknowledged() {
    let mut harness = Harness::start().await;
    let (bus, recorder) = (harness.relay().await, Recorder::default());
    let url = harness.nats.url();
    for _ in 0..3 {
        let replica = harness.bus(&url).await;
        harness.tasks.spawn(replica.subscribe("reader", recorder.clone(), harness.stop.clone()));
    }
    let documents: Vec<Id> = (0..20).map(|_| Id::generate()).collect();
    let ids = futures::future::join_all(documents.iter().map(|id| append(&bus, *id, 0..20))).await.concat();
    harness.published().await;
    harness.stop.cancel();
    while let Some(ended) = harness.tasks.join_next().await {
        ended.unwrap().unwrap();
    }
    let consumer =
        harness.jetstream().await.get_stream("DOCUMENTS").await.unwrap().consumer_info("reader").await.unwrap();
    assert_eq!((consumer.num_ack_pending, consumer.num_redelivered), (0, 0), "delivered, and not acknowledged");
    let applied = recorder.applied.lock().unwrap().clone();
    let delivered = consumer.delivered.consumer_sequence;
    assert_eq!(applied.len() as u64, delivered, "applied and delivered events differ");
    assert!(applied.iter().all(|id| ids.contains(id)));
}

/// More events than a few pull requests deliver.
#[tokio::test]
async fn a_backlog_is_delivered_once_and_without_delay() {
    let mut harness = Harness::start().await;
    let (bus, recorder) = (harness.relay().await, Recorder::default());
    let append = "select bus.append('DOCUMENTS', 'document.created', lpad(to_hex(number), 24, '0'), 0, $1, null)
                  from generate_series(1, 3000) as number";
    let body = event(Id::generate(), 0).encode();
    sqlx::query(append).bind(body).execute(&mut harness.db().await).await.unwrap();
    harness.published().await;
    harness.tasks.spawn(bus.clone().subscribe("reader", recorder.clone(), harness.stop.clone()));
    eventually_within(Duration::from_secs(20), "the backlog to be applied", async || {
        let open = unacknowledged(&harness).await?;
        anyhow::ensure!(open == 0, "{open} are open");
        Ok(())
    })
    .await
    .unwrap();
    let consumer =
        harness.jetstream().await.get_stream("DOCUMENTS").await.unwrap().consumer_info("reader").await.unwrap();
    assert_eq!(consumer.delivered.consumer_sequence, 3000);
}
