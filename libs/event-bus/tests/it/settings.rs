use crate::documents::{DocumentEvent, Id};
use crate::harness::{Harness, append};
use event_bus::{Handler, Received, Settings, Transaction};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use testkit::eventually;

#[tokio::test]
async fn limits_that_break_a_guarantee_are_refused() {
    let harness = Harness::start().await;
    let settings = || harness.settings(&harness.nats.url());
    for (name, settings) in [
        ("publish_events", Settings { publish_events: 1001, ..settings() }),
        ("publish_events", Settings { publish_events: 0, ..settings() }),
        ("publish_timeout", Settings { publish_timeout: Duration::from_secs(10), ..settings() }),
        ("background_connections", Settings { background_connections: 2, ..settings() }),
        ("apply_events", Settings { apply_events: 0, ..settings() }),
        ("attempts", Settings { attempts: 0, ..settings() }),
        ("attempts", Settings { attempts: u32::MAX, ..settings() }),
        ("apply_timeout", Settings { apply_timeout: Duration::from_secs(11), ..settings() }),
        ("apply_timeout", Settings { apply_timeout: Duration::ZERO, ..settings() }),
        ("publish_bytes", Settings { publish_bytes: usize::MAX, ..settings() }),
        ("apply_bytes", Settings { apply_bytes: 0, ..settings() }),
        ("connection_timeout", Settings { connection_timeout: Duration::from_secs(9), ..settings() }),
        ("database_connections", Settings { database_connections: 0, ..settings() }),
        ("reply_concurrency", Settings { reply_concurrency: 0, ..settings() }),
        ("batch_items", Settings { batch_items: 0, ..settings() }),
        ("read_items", Settings { read_items: 0, ..settings() }),
        ("batch_queue", Settings { batch_queue: 0, ..settings() }),
        ("task_concurrency", Settings { task_concurrency: 0, ..settings() }),
        ("task_timeout", Settings { task_timeout: Duration::from_mins(11), ..settings() }),
        ("task_attempts", Settings { task_attempts: 0, ..settings() }),
    ] {
        let Err(error) = Harness::open(settings).await else { panic!("{name} was accepted") };
        assert!(error.to_string().contains(name), "{error}");
    }
}

/// Records the size of the largest batch, and fails.
#[derive(Clone, Default)]
struct Refuser(Arc<AtomicUsize>);

impl Handler for Refuser {
    type Event = DocumentEvent;

    async fn apply(&self, _: &mut Transaction, events: &[Received<DocumentEvent>]) -> anyhow::Result<()> {
        self.0.fetch_max(events.len(), Ordering::Relaxed);
        anyhow::bail!("refused")
    }
}

#[tokio::test]
async fn attempts_delays_and_batches_are_those_of_the_settings() {
    let mut harness = Harness::start().await;
    let (bus, refuser) = (harness.relay().await, Refuser::default());
    for _ in 0..30 {
        append(&bus, Id::generate(), 0..1).await;
    }
    harness.published().await;

    let settings = harness.settings(&harness.nats.url());
    let settings = Settings { apply_events: 7, attempts: 2, retry_delay: Duration::from_millis(10), ..settings };
    let reader = Harness::open(settings).await.unwrap();
    harness.tasks.spawn(reader.subscribe("reader", refuser.clone(), harness.stop.clone()));
    // With the defaults it takes 30 s until an event is a dead letter.
    eventually("thirty dead letters after two attempts each", async || {
        let sql = "select count(*) from bus.dead_letters where status = 'dead' and attempts = 2";
        let dead: i64 = sqlx::query_scalar(sql).fetch_one(&mut harness.db().await).await?;
        anyhow::ensure!(dead == 30, "{dead} are");
        Ok(())
    })
    .await
    .unwrap();
    let largest = refuser.0.load(Ordering::Relaxed);
    assert!(largest <= 7, "{largest} events in one transaction");
}
