//! The steps before services start, with rights that the services do not have.

use crate::services::{SERVICES, Service};
use anyhow::{Context, Result};
use event_bus::NatsSettings;
use futures::future::try_join_all;
use std::time::Duration;
use testkit::{Nats, Postgres, nats_url};

const PATIENCE: Duration = Duration::from_mins(1);

/// Migrates all databases and creates the streams, as every deployment does.
pub async fn prepare(postgres: &Postgres, nats: &Nats) -> Result<()> {
    let server = nats.server();
    tokio::try_join!(migrate(postgres), provision(&server, 1)).map(drop)
}

/// Migrates all databases as their owners, and grants the services' roles their rights.
pub async fn migrate(postgres: &Postgres) -> Result<()> {
    // Boxed: the future is large and a part of every test's future.
    try_join_all(SERVICES.map(|service| Box::pin(migrate_one(postgres, service)))).await.map(drop)
}

async fn migrate_one(postgres: &Postgres, service: &Service) -> Result<()> {
    let url = postgres.url(service.database_owner, service.database);
    let migrated = event_bus::migrate(&url, &(service.schema)(), Some(service.database_user), PATIENCE).await;
    migrated.with_context(|| format!("cannot prepare the database of {}", service.name))
}

/// Creates the streams and consumers on these servers (comma-separated `host:port`), each on `replicas` of them.
pub async fn provision(servers: &str, replicas: u8) -> Result<()> {
    let url = nats_url("provisioner", servers);
    let settings = NatsSettings { url, stream_replicas: replicas, ..NatsSettings::default() };
    Box::pin(event_bus::provision(&settings, &bootstrap::topology::built_in(), PATIENCE)).await
}
