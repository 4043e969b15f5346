//! Streams that are configured otherwise, several streams, and streams that nobody relays.

use crate::harness::{Harness, append, event};
use contracts::{Id, TicketEvent};
use event_bus::{DecodeError, Event, Publish};
use testkit::eventually;

/// An event of a stream that takes no atomic batches.
struct Payment(String);

impl Event for Payment {
    const STREAM: &'static str = "PAYMENTS";

    fn aggregate_id(&self) -> String {
        self.0.clone()
    }

    fn version(&self) -> i64 {
        0
    }

    fn decode(_: &str, _: &[u8]) -> Result<Self, DecodeError> {
        Ok(Self(String::new()))
    }
}

impl Publish for Payment {
    fn subject(&self) -> &'static str {
        "payment.created"
    }

    fn encode(&self) -> String {
        "{}".to_owned()
    }
}

fn payments(count: usize) -> Vec<Payment> {
    (0..count).map(|number| Payment(format!("0190a5f2-4f5c-7c3e-9b1a-{number:012}"))).collect()
}

#[tokio::test]
async fn a_stream_without_atomic_batches_gets_its_events_one_by_one_and_in_order() {
    let mut harness = Harness::start().await;
    let bus = harness.bus(&harness.nats.url()).await;
    harness.tasks.spawn(bus.clone().relay::<Payment>(harness.stop.clone()));
    eventually("the database", async || bus.connection().await.map(drop)).await.unwrap();
    let payments = payments(20);
    let mut tx = bus.begin().await.unwrap();
    tx.append(&payments).await.unwrap();
    tx.commit().await.unwrap();
    harness.published().await;
    let expected: Vec<String> = payments.iter().map(Event::event_id).collect();
    assert_eq!(harness.stream_of("PAYMENTS").await, expected);
}

#[tokio::test]
async fn one_process_relays_several_streams() {
    let mut harness = Harness::start().await;
    let bus = harness.relay().await;
    harness.tasks.spawn(bus.clone().relay::<Payment>(harness.stop.clone()));
    for payment in payments(20) {
        let mut tx = bus.begin().await.unwrap();
        tx.append([&event(Id::generate(), 0)]).await.unwrap();
        tx.append([&payment]).await.unwrap();
        tx.commit().await.unwrap();
    }
    harness.published().await;
    assert_eq!(harness.stream_of("TICKETS").await.len(), 20);
    assert_eq!(harness.stream_of("PAYMENTS").await.len(), 20);
}

#[tokio::test]
async fn a_stream_that_nobody_relays_is_an_error_at_the_start() {
    let mut harness = Harness::start().await;
    let bus = harness.relay().await;
    append(&bus, Id::generate(), 0..1).await;
    harness.published().await;
    let mut tx = bus.begin().await.unwrap();
    tx.append(&payments(1)).await.unwrap();
    tx.commit().await.unwrap();

    let restarted = harness.bus(&harness.nats.url()).await;
    let error = restarted.relay::<TicketEvent>(harness.stop.clone()).await.unwrap_err();
    assert!(error.to_string().contains("PAYMENTS"), "{error}");

    let complete = harness.bus(&harness.nats.url()).await;
    harness.tasks.spawn(complete.clone().relay::<TicketEvent>(harness.stop.clone()));
    harness.tasks.spawn(complete.relay::<Payment>(harness.stop.clone()));
    harness.published().await;
}
