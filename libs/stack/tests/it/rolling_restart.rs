//! A rolling update as by Kubernetes: a new replica is ready before an old one stops, and an old one stops only after it gets
//! no new requests.

use crate::system::System;
use anyhow::{Context, Result, ensure};
use futures::future::try_join_all;
use rand::seq::IndexedRandom;
use serde_json::json;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use testkit::Client;
use tokio::time::sleep;

/// Shorter than `preStop: sleep` of the manifests, because this balancer removes a replica at once.
const PRE_STOP: Duration = Duration::from_millis(300);

/// The replicas that get requests.
#[derive(Default)]
struct Balancer(Mutex<Vec<Client>>);

impl Balancer {
    fn set(&self, replicas: Vec<Client>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = replicas;
    }

    fn any(&self) -> Result<Client> {
        let replicas = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        replicas.choose(&mut rand::rng()).cloned().context("there is no replica")
    }

    /// Writes and reads until `stop`. Every response must be a success.
    async fn load(&self, stop: &AtomicBool) -> Result<usize> {
        let mut requests = 0;
        while !stop.load(Ordering::Relaxed) {
            let body = json!({"title": "Concert", "price": 5});
            let ticket = self.any()?.signed_in("seller").post("/api/tickets", body).await?.expect(201)?;
            let id = ticket["id"].as_str().context("no id")?;
            self.any()?.get(&format!("/api/tickets/{id}")).await?.expect(200)?;
            requests += 2;
        }
        Ok(requests)
    }
}

#[tokio::test]
async fn no_request_fails_during_a_rolling_restart() -> Result<()> {
    let mut system = System::start(2, 1).await?;
    let (balancer, stop) = (Balancer::default(), AtomicBool::new(false));
    balancer.set(system.tickets.iter().map(testkit::Process::client).collect());
    let restart = async {
        for _ in 0..4 {
            let mut new = system.spawn_tickets()?;
            new.wait_ready().await?;
            system.tickets.push(new);
            let mut old = system.tickets.remove(0);
            balancer.set(system.tickets.iter().map(testkit::Process::client).collect());
            sleep(PRE_STOP).await; // as Kubernetes does
            let status = old.stop(Duration::from_secs(10)).await?;
            ensure!(status.success(), "the stop failed:\n{}", old.last_lines(20));
        }
        stop.store(true, Ordering::Relaxed);
        anyhow::Ok(())
    };
    let (requests, ()) = futures::try_join!(try_join_all((0..8).map(|_| balancer.load(&stop))), restart)?;
    ensure!(requests.iter().sum::<usize>() > 200, "too few requests: {requests:?}");
    system.settled().await?;
    ensure!(system.stream().await?.len() == requests.iter().sum::<usize>() / 2);
    Ok(())
}
