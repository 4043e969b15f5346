//! The connection to NATS.

use anyhow::{Context, ensure};
use async_nats::connection::State;
use async_nats::{Client, ConnectOptions, Event, ServerAddr};
use percent_encoding::percent_decode_str;
use std::path::PathBuf;
use std::time::Duration;

/// How to reach NATS, and how much of it there is.
#[derive(Clone, Debug)]
pub struct NatsSettings {
    /// Servers, comma-separated. User and password of the first that has some are those for all.
    pub url: String,
    /// The certificates that servers' certificates are checked against, PEM. With it, connections are encrypted.
    pub authority: Option<PathBuf>,
    /// How many servers keep each stream.
    pub stream_replicas: u8,
}

/// Connects to one of the servers and keeps connecting for ever: the returned client is usable at once, its requests
/// fail until a server is there. `client` is shown by `nats server report`.
pub(crate) async fn connect(settings: &NatsSettings, service: &str, client: &str) -> anyhow::Result<Client> {
    let servers = settings
        .url
        .split(',')
        .map(|url| url.trim().replacen("http://", "nats://", 1).parse())
        .collect::<Result<Vec<ServerAddr>, _>>()
        .context("NATS_URL must be a list like nats://host:4222,nats://user:password@other:4222")?;
    let mut options = ConnectOptions::new();
    if let Some(user) = servers.iter().find(|server| server.has_user_pass()) {
        // The client library does not look for them there.
        let decode = |text: Option<&str>| percent_decode_str(text.unwrap_or_default()).decode_utf8_lossy().into_owned();
        options = options.user_and_password(decode(user.username()), decode(user.password()));
    }
    if let Some(authority) = &settings.authority {
        // Now, because a connection that is tried for ever would not say it.
        ensure!(authority.is_file(), "NATS_CA: there is no file {}", authority.display());
        options = options.add_root_certificates(authority.clone()).require_tls(true);
    }
    options
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
                // One for each try to connect again; that the connection is lost has been said.
                Event::Draining | Event::Closed | Event::ClientError(_) => tracing::debug!("NATS: {event}"),
                trouble => tracing::warn!("NATS: {trouble}"),
            }
        })
        .connect(servers)
        .await
        .context("cannot set up the NATS client")
}

/// Whether requests would reach a server, or wait for one.
pub(crate) fn connected(nats: &Client) -> anyhow::Result<()> {
    ensure!(nats.connection_state() == State::Connected, "NATS is not connected");
    Ok(())
}
