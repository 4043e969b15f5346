use crate::harness::{Harness, append};
use contracts::Id;
use std::time::Duration;
use testkit::eventually;

#[tokio::test]
async fn what_the_files_say_is_created_as_they_say_it() {
    let mut harness = Harness::start().await;
    harness.relay().await;
    let jetstream = harness.jetstream().await;
    let stream = eventually("the stream", async || jetstream.get_stream("TICKETS").await).await.unwrap();
    let config = &stream.cached_info().config;
    assert!(config.allow_atomic_publish && config.discard == async_nats::jetstream::stream::DiscardPolicy::New);
    assert_eq!(config.duplicate_window, Duration::from_secs(10));
    let consumer = eventually("the consumer", async || stream.consumer_info("orders").await).await.unwrap();
    assert_eq!((consumer.config.max_deliver, consumer.config.ack_wait), (-1, Duration::from_secs(30)));
}

#[tokio::test]
async fn drift_is_mended_and_events_survive_it() {
    let mut harness = Harness::start().await;
    let bus = harness.relay().await;
    append(&bus, Id::generate(), 0..3).await;
    harness.published().await;
    let jetstream = harness.jetstream().await;
    let mut config = jetstream.get_stream("TICKETS").await.unwrap().cached_info().config.clone();
    config.duplicate_window = Duration::from_mins(1);
    config.description = Some("changed by hand".to_owned());
    jetstream.update_stream(config).await.unwrap();

    let second = harness.relay().await;
    eventually("the stream to be as it should", async || {
        let config = jetstream.get_stream("TICKETS").await?.cached_info().config.clone();
        anyhow::ensure!(config.duplicate_window == Duration::from_secs(10), "{:?}", config.duplicate_window);
        anyhow::Ok(())
    })
    .await
    .unwrap();
    append(&second, Id::generate(), 0..1).await;
    harness.published().await;
    assert_eq!(harness.stream().await.len(), 4);
}
