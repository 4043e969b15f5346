//! The disk of NATS is full, then has room again: only then Compose restarts the server.

use crate::Compose;
use crate::small_disk::SmallDisk;
use anyhow::{Result, ensure};
use async_nats::jetstream;
use std::time::Duration;
use testkit::{eventually_within, nats_url};

#[tokio::test]
async fn compose_restarts_a_server_with_a_frozen_stream_if_there_is_room() -> Result<()> {
    let disk = SmallDisk::new(format!("stack-compose-disk-{}", std::process::id())).await?;
    let changes = format!("volumes: {{nats: {{external: true, name: {}}}}}", disk.volume);
    let up = Compose::up("frozen", &changes, &["nats"]).await?;
    up.compose.healthy("nats").await?;
    let server = up.compose.address("NATS_PORT");
    stack::provision(&server, 1).await?;
    let mut jetstream = jetstream::new(testkit::connect(&nats_url("admin", &server)).await?);
    jetstream.set_timeout(Duration::from_secs(1));
    publish(&jetstream).await?;

    disk.fill().await?;
    eventually_within(Duration::from_mins(1), "five failed health checks", async || {
        ensure!(publish(&jetstream).await.is_err(), "an event was stored on a full disk");
        let health = &up.compose.inspect("nats").await?["State"]["Health"];
        ensure!(health["FailingStreak"].as_u64() >= Some(5), "{health}");
        anyhow::Ok(())
    })
    .await?;
    let restarts = up.compose.inspect("nats").await?["RestartCount"].clone();
    ensure!(restarts == 0, "restarted {restarts} times while the disk is full");

    disk.free().await?;
    eventually_within(Duration::from_mins(1), "an event to be stored", async || publish(&jetstream).await).await?;
    let restarts = up.compose.inspect("nats").await?["RestartCount"].clone();
    ensure!(restarts == 1, "restarted {restarts} times");
    up.compose.healthy("nats").await
}

async fn publish(jetstream: &jetstream::Context) -> Result<()> {
    jetstream.publish("ticket.created", "x".repeat(500).into()).await?.await?;
    Ok(())
}
