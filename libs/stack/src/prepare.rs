//! What is done before services start, with rights that they do not have.

use crate::{Nats, Postgres, nats_url};
use anyhow::{Context, Result};
use event_bus::{NatsSettings, Schema};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_mins(1);

/// As every deployment does: migrates both databases, and makes the streams.
pub async fn prepare(postgres: &Postgres, nats: &Nats) -> Result<()> {
    let server = nats.server();
    tokio::try_join!(migrate(postgres), provision(&server, 1)).map(drop)
}

/// Migrates both databases as their owners, and lets the services' roles use them.
pub async fn migrate(postgres: &Postgres) -> Result<()> {
    let migrate = async |service: &str, schema: Schema| {
        let url = postgres.url(&format!("{service}_owner"), service);
        // Boxed, like what follows: a client in the making is large, and this is part of every test's future.
        let migrated = Box::pin(event_bus::migrate(&url, &schema, Some(service), PATIENCE)).await;
        migrated.with_context(|| format!("cannot prepare the database of {service}"))
    };
    tokio::try_join!(migrate("tickets", tickets::schema()), migrate("orders", orders::schema())).map(drop)
}

/// Makes the streams and consumers, each kept by `replicas` of these servers (comma-separated `host:port`).
pub async fn provision(servers: &str, replicas: u8) -> Result<()> {
    let url = nats_url("provisioner", servers);
    let settings = NatsSettings { url, stream_replicas: replicas, ..NatsSettings::default() };
    Box::pin(event_bus::provision(&settings, &bootstrap::topology::built_in(), PATIENCE)).await
}
