//! The connection to NATS.

use anyhow::Context;
use async_nats::{Client, ConnectOptions, Event};
use std::time::Duration;

/// Connects to one of the servers in `urls`, a comma-separated list, and keeps connecting for ever: the returned
/// client is usable at once, its requests fail until a server is there. `client` is shown by `nats server report`.
pub async fn connect(urls: &str, service: &str, client: &str) -> anyhow::Result<Client> {
    let servers = urls
        .split(',')
        .map(|url| url.trim().replacen("http://", "nats://", 1).parse())
        .collect::<Result<Vec<async_nats::ServerAddr>, _>>()
        .context("NATS_URL must be a list like nats://host:4222,nats://user:password@other:4222")?;
    ConnectOptions::new()
        .name(client)
        // Of its own, so that permissions can keep one service from reading another's answers.
        .custom_inbox_prefix(format!("_INBOX_{service}"))
        .retry_on_initial_connect()
        .max_reconnects(None)
        .reconnect_delay_callback(|attempt| {
            let ceiling = Duration::from_millis(100 << attempt.min(4)).min(Duration::from_secs(2));
            crate::retry::jitter(ceiling)
        })
        .connection_timeout(Duration::from_secs(3))
        // A link that swallows everything is noticed after two of these.
        .ping_interval(Duration::from_secs(5))
        .event_callback(|event| async move {
            match event {
                Event::Connected => tracing::info!("connected to NATS"),
                Event::Disconnected => tracing::warn!("lost the connection to NATS; reconnecting"),
                Event::Draining | Event::Closed => tracing::debug!("NATS: {event}"),
                trouble => tracing::warn!("NATS: {trouble}"),
            }
        })
        .connect(servers)
        .await
        .context("cannot set up the NATS client")
}
