//! A disk is full, then has room again.
//!
//! At NATS, the stream freezes, and stays frozen after space is freed: Kubernetes must restart the server then, and not before.
//! `tests/compose` tests the same for compose. Postgres refuses statements, or ends.

use crate::postgres_restart::{create_until, recovers};
use crate::small_disk::{SmallDisk, docker};
use crate::system::System;
use anyhow::{Context, Result, ensure};
use async_nats::jetstream;
use std::time::Duration;
use testkit::{Nats, NatsSetup, Postgres, eventually, free_port};
use tokio::time::{Instant, sleep};

const MANIFEST: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../infra/k8s/base/nats.yaml");

#[tokio::test]
async fn the_liveness_probe_fails_only_when_a_restart_unfreezes_the_stream() -> Result<()> {
    let disk = SmallDisk::new(format!("stack-full-disk-{}", std::process::id())).await?;
    let nats = Nats::start_with(NatsSetup { name: Some(disk.volume.clone()), ..NatsSetup::default() }).await?;
    stack::provision(&nats.server(), 1).await?;
    let mut jetstream = jetstream::new(nats.connect().await?);
    jetstream.set_timeout(Duration::from_secs(1));
    publish(&jetstream).await?;
    ensure!(is_live(&nats).await?, "a healthy server is not live");

    disk.fill().await?;
    eventually("the stream to freeze", async || {
        ensure!(publish(&jetstream).await.is_err(), "an event was stored on a full disk");
        health(&nats).await?.expect(503)
    })
    .await?;
    ensure!(is_live(&nats).await?, "a restart cannot help while the disk is full");
    nats.kill().await?;
    nats.start_again().await?;
    ensure!(is_live(&nats).await?, "a server that starts on a full disk would be restarted again and again");
    eventually("the stream to freeze again", async || {
        ensure!(publish(&jetstream).await.is_err(), "an event was stored on a full disk");
        health(&nats).await?.expect(503)
    })
    .await?;

    disk.free().await?;
    ensure!(publish(&jetstream).await.is_err(), "the server recovers without a restart: no probe is needed");
    ensure!(!is_live(&nats).await?, "the stream is frozen, there is room, and the probe does not fail");
    nats.restart().await?;
    eventually("an event to be stored", async || publish(&jetstream).await).await?;
    ensure!(is_live(&nats).await?, "the restarted server is not live");
    Ok(())
}

async fn publish(jetstream: &jetstream::Context) -> Result<()> {
    jetstream.publish("ticket.created", "x".repeat(500).into()).await?.await?;
    Ok(())
}

async fn health(nats: &Nats) -> Result<testkit::Answer> {
    testkit::Client::new(&nats.monitoring_url()).get("/healthz").await
}

/// Runs the liveness command of the manifest in the container, as the kubelet does.
async fn is_live(nats: &Nats) -> Result<bool> {
    let manifest = std::fs::read_to_string(MANIFEST)?;
    let command = manifest.lines().find_map(|line| {
        let line = line.trim().strip_prefix("- ")?;
        line.contains("/etc/nats/frozen.sh").then_some(line)
    });
    let command = command.context("the manifest has no liveness probe that asks whether a stream is frozen")?;
    let prints = format!("if {command}; then echo live; else echo dead; fi");
    Ok(docker(&["exec", nats.id(), "sh", "-c", &prints]).await? == "live")
}

#[tokio::test]
async fn full_disk_is_logged_and_events_are_published_after_space_is_freed() -> Result<()> {
    let disk = SmallDisk::new(format!("stack-full-log-{}", std::process::id())).await?;
    let nats = NatsSetup { name: Some(disk.volume.clone()), ..NatsSetup::default() };
    let (postgres, nats) = futures::try_join!(Postgres::start(), Nats::start_with(nats))?;
    stack::prepare(&postgres, &nats).await?;
    let servers = nats.server();
    let mut system = System::new(postgres, nats, &servers);
    system.add(1, 1).await?;
    system.ticket().await?;
    system.settled().await?;

    disk.fill().await?;
    for _ in 0..20 {
        system.ticket().await?;
    }
    eventually("the reason", async || {
        let log = system.tickets[0].logs();
        let reason = log.lines().find(|line| line.contains(" WARN ") && line.contains("publishing to TICKETS"));
        let reason = reason.with_context(|| format!("nothing of it in:\n{log}"))?;
        ensure!(reason.contains("cannot store (disk full?)"), "{reason}");
        anyhow::Ok(())
    })
    .await?;
    disk.free().await?;
    system.nats.restart().await?;
    system.settled().await
}

#[tokio::test]
async fn full_disk_of_postgres_costs_503s_and_nothing_else() -> Result<()> {
    let disk = SmallDisk::with_megabytes(256, format!("stack-full-postgres-{}", std::process::id())).await?;
    let (postgres, nats) = futures::try_join!(Postgres::start_named(&disk.volume, free_port()), Nats::start())?;
    stack::prepare(&postgres, &nats).await?;
    let servers = nats.server();
    let mut system = System::new(postgres, nats, &servers);
    system.add(1, 1).await?;
    let until = Instant::now() + Duration::from_secs(15);
    let fault = async {
        sleep(Duration::from_secs(3)).await; // load before, meanwhile and afterwards
        disk.fill().await?;
        sleep(Duration::from_secs(5)).await;
        disk.free().await?;
        // If it could not write its log, it ended, and did not start again without room.
        system.postgres.start_again().await
    };
    let writers = futures::future::try_join_all((0..16).map(|writer| create_until(&system, writer, until)));
    let (outcomes, ()) = futures::try_join!(writers, fault)?;
    ensure!(outcomes.iter().any(|(_, refused)| *refused > 0), "no request failed: the disk had room");
    recovers(&system, &outcomes).await?;
    system.ticket().await?;
    system.settled().await
}
