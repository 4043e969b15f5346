//! A mixed load on both services while replicas are killed at random.

use crate::load::Load;
use crate::system::System;
use anyhow::{Context, Result};
use std::time::Duration;
use testkit::{Process, Signal};
use tokio::time::sleep;

const KILLS: usize = 20;

async fn kill_at_random(system: &mut System) -> Result<()> {
    for _ in 0..KILLS {
        sleep(Duration::from_millis(rand::random_range(50..500))).await; // under load
        let victim = rand::random_range(0..system.tickets.len() + system.orders.len());
        let mut services: Vec<_> = system.tickets.iter_mut().chain(&mut system.orders).collect();
        let service = services.swap_remove(victim);
        service.signal(Signal::Kill).await?;
        service.exited().await?;
        let port = service.port();
        let mut reborn = system.respawn(port)?;
        reborn.wait_ready().await?;
        let slot = system.tickets.iter_mut().chain(&mut system.orders).find(|service| service.port() == port);
        *slot.context("it was there")? = reborn;
    }
    Ok(())
}

#[tokio::test]
async fn twenty_kills_under_mixed_load_lose_and_double_nothing() -> Result<()> {
    let mut system = System::start(2, 2).await?;
    let clients = |services: &[Process]| services.iter().map(Process::client).collect();
    let load = Load::new(clients(&system.tickets), clients(&system.orders), &system.nats.server()).await?;
    load.during(kill_at_random(&mut system)).await?;
    system.settled().await?;
    load.was_told_the_truth(&system, KILLS).await
}
