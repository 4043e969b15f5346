use crate::documents::{DocumentEvent, Id};
use crate::harness::{Harness, append};
use crate::log::Log;
use async_nats::jetstream::stream;
use event_bus::{NatsSettings, Topology};
use std::time::{Duration, Instant};
use testkit::eventually;

#[tokio::test]
async fn streams_and_consumers_are_created_with_the_options_of_the_files() {
    let mut harness = Harness::start().await;
    harness.relay().await;
    let jetstream = harness.jetstream().await;
    let stream = eventually("the stream", async || jetstream.get_stream("DOCUMENTS").await).await.unwrap();
    let config = &stream.cached_info().config;
    assert!(config.allow_atomic_publish && config.discard == async_nats::jetstream::stream::DiscardPolicy::New);
    assert_eq!(config.duplicate_window, Duration::from_secs(10));
    let consumer = eventually("the consumer", async || stream.consumer_info("reader").await).await.unwrap();
    assert_eq!((consumer.config.max_deliver, consumer.config.ack_wait), (-1, Duration::from_secs(30)));
}

#[tokio::test]
async fn changed_options_are_changed_back_and_events_are_kept() {
    let mut harness = Harness::start().await;
    let bus = harness.relay().await;
    append(&bus, Id::generate(), 0..3).await;
    harness.published().await;
    let jetstream = harness.jetstream().await;
    let mut config = jetstream.get_stream("DOCUMENTS").await.unwrap().cached_info().config.clone();
    config.duplicate_window = Duration::from_mins(1);
    config.description = Some("changed by hand".to_owned());
    jetstream.update_stream(config).await.unwrap();

    let second = harness.relay().await;
    eventually("the option to be changed back", async || {
        let config = jetstream.get_stream("DOCUMENTS").await?.cached_info().config.clone();
        anyhow::ensure!(config.duplicate_window == Duration::from_secs(10), "{:?}", config.duplicate_window);
        anyhow::Ok(())
    })
    .await
    .unwrap();
    append(&second, Id::generate(), 0..1).await;
    harness.published().await;
    assert_eq!(harness.stream().await.len(), 4);
}

#[tokio::test]
async fn options_that_cannot_change_are_logged_once_and_the_bus_works() {
    let mut harness = Harness::start().await;
    let jetstream = harness.jetstream().await;
    let stream = stream::Config {
        name: "DOCUMENTS".to_owned(),
        subjects: vec!["document.created".to_owned(), "document.updated".to_owned()],
        retention: stream::RetentionPolicy::WorkQueue,
        duplicate_window: Duration::from_mins(1),
        max_bytes: 1024,
        ..stream::Config::default()
    };
    jetstream.create_stream(stream).await.unwrap();

    let (log, logging) = Log::start();
    let bus = harness.relay().await;
    // Each part of a service provisions.
    harness.tasks.spawn(bus.clone().relay::<DocumentEvent>(harness.stop.clone()));
    append(&bus, Id::generate(), 0..3).await;
    harness.published().await;
    eventually("the consumer", async || {
        jetstream.get_stream("DOCUMENTS").await?.consumer_info("reader").await?;
        anyhow::Ok(())
    })
    .await
    .unwrap();
    drop(logging);

    let config = jetstream.get_stream("DOCUMENTS").await.unwrap().cached_info().config.clone();
    assert_eq!(config.retention, stream::RetentionPolicy::WorkQueue);
    assert_eq!((config.duplicate_window, config.max_bytes), (Duration::from_secs(10), 2_147_483_648));
    let warnings = log.lines(" WARN ");
    let retention: Vec<_> = warnings.iter().filter(|line| line.contains("retention stays")).collect();
    assert_eq!(retention.len(), 1, "{warnings:#?}");
    let (what, command) =
        (r#"stream DOCUMENTS: retention stays "workqueue", its file says "limits""#, "nats stream rm DOCUMENTS");
    assert!(retention[0].contains(what) && retention[0].contains(command), "{retention:?}");
}

#[tokio::test]
async fn the_replicas_of_a_stream_are_those_of_the_settings() {
    let harness = Harness::start().await;
    let settings = NatsSettings { url: harness.nats.url(), stream_replicas: 3, ..NatsSettings::default() };
    let error = event_bus::provision(&settings, &harness.topology, Duration::from_secs(10)).await.unwrap_err();
    assert!(format!("{error:#}").contains("replicas > 1"), "{error:#}");
}

#[tokio::test]
async fn a_refused_stream_does_not_prevent_the_creation_of_others() {
    let harness = Harness::start().await;
    let files = [
        ("A.stream.json", r#"{"discard": "new", "subjects": ["a"], "no_option": 1}"#),
        ("B.stream.json", r#"{"discard": "new", "subjects": ["b"], "max_bytes": 1024}"#),
        ("B.c.consumer.json", r#"{"ack_policy": "explicit"}"#),
    ];
    let settings = NatsSettings { url: harness.nats.url(), ..NatsSettings::default() };
    let topology = Topology::parse(files).unwrap();
    let begun = Instant::now();
    let error = event_bus::provision(&settings, &topology, Duration::from_mins(1)).await.unwrap_err();
    let error = format!("{error:#}");
    assert!(error.contains("stream A: ") && error.contains("no_option"), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(20), "it was tried again, though another attempt cannot help");
    harness.jetstream().await.get_stream("B").await.unwrap().consumer_info("c").await.unwrap();
}

/// A stream that was full, for example. Lowering it is left to a person.
#[tokio::test]
async fn a_limit_that_was_raised_on_the_server_is_kept_and_reported() {
    let harness = Harness::start().await;
    let settings = NatsSettings { url: harness.nats.url(), ..NatsSettings::default() };
    let provision = async || event_bus::provision(&settings, &harness.topology, Duration::from_secs(20)).await.unwrap();
    provision().await;
    let jetstream = harness.jetstream().await;
    let config = async || jetstream.get_stream("DOCUMENTS").await.unwrap().cached_info().config.clone();
    for (raised, kept) in [(4_294_967_296, true), (-1, true), (1_073_741_824, false)] {
        let changed = stream::Config { max_bytes: raised, duplicate_window: Duration::from_mins(1), ..config().await };
        jetstream.update_stream(changed).await.unwrap();
        let (log, logging) = Log::start();
        provision().await;
        drop(logging);
        let found = config().await;
        assert_eq!(found.max_bytes, if kept { raised } else { 2_147_483_648 });
        assert_eq!(found.duplicate_window, Duration::from_secs(10), "other options are changed back");
        let said = log.lines(" INFO ").iter().any(|line| line.contains("stream DOCUMENTS: max_bytes stays"));
        assert_eq!(said, kept, "{:#?}", log.lines(" INFO "));
    }
}
