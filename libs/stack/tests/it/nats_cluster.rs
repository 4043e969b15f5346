//! NATS as a cluster of three: the leader dies, and all nodes restart one after the other.

use crate::system::System;
use anyhow::{Context, Result, ensure};
use futures::future::try_join_all;
use serde_json::json;
use sqlx::{Connection, PgConnection};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use testkit::{Nats, Postgres, eventually_within};
use tokio::time::sleep;

/// The time in which events must be published again after an election.
const RESUMES: Duration = Duration::from_secs(3);
/// The longest wait of an event in the outbox after a node has died.
///
/// NATS elects a leader within 4 to 9 s, and holds a second election if the first one is a tie. An event that the dead node was
/// delivering is redelivered after `ack_wait`, 30 s: `settled` waits for it.
const ELECTED: Duration = Duration::from_secs(20);
/// The longest wait in a rolling restart: a leader that is stopped steps down before it ends.
const STEPS_DOWN: Duration = Duration::from_secs(10);

struct Cluster {
    system: System,
    /// The nodes that are not in `system`.
    others: Vec<Nats>,
}

impl Cluster {
    async fn start() -> Result<Self> {
        let (postgres, mut nodes) = tokio::try_join!(Postgres::start(), Nats::start_cluster())?;
        let servers = nodes.iter().map(Nats::server).collect::<Vec<_>>().join(",");
        tokio::try_join!(stack::migrate(&postgres), stack::provision(&servers, 3))?;
        let mut system = System::new(postgres, nodes.remove(0), &servers);
        system.add(2, 2).await?;
        Ok(Self { system, others: nodes })
    }

    fn nodes(&self) -> impl Iterator<Item = &Nats> {
        std::iter::once(&self.system.nats).chain(&self.others)
    }

    /// The node that is the leader of `stream`.
    async fn leader(&self, stream: &str) -> Result<&Nats> {
        let info = self.system.jetstream().await?.get_stream(stream).await?.cached_info().clone();
        let leader = info.cluster.and_then(|cluster| cluster.leader).context("there is no leader")?;
        self.nodes().find(|node| node.name() == leader).context(leader)
    }

    async fn last_sequence(&self, stream: &str) -> Result<u64> {
        Ok(self.system.jetstream().await?.get_stream(stream).await?.cached_info().state.last_sequence)
    }

    /// Waits until a node other than `dead` is the leader of `stream`, then until it stores events again.
    async fn resumes_without(&self, stream: &str, dead: &str) -> Result<()> {
        eventually_within(ELECTED, "another leader", async || {
            ensure!(self.leader(stream).await?.name() != dead, "it is still {dead}");
            anyhow::Ok(())
        })
        .await?;
        let before = self.last_sequence(stream).await?;
        eventually_within(RESUMES, "events to be published again", async || {
            ensure!(self.last_sequence(stream).await? > before, "no event since the election");
            anyhow::Ok(())
        })
        .await
    }

    /// Waits until every node has caught up.
    async fn complete(&self) -> Result<()> {
        eventually_within(Duration::from_mins(1), "all copies to be current", async || {
            for stream in ["TICKETS", "ORDERS", "PAYMENTS", "EXPIRATION"] {
                let info = self.system.jetstream().await?.get_stream(stream).await?.cached_info().clone();
                let copies = info.cluster.context("no cluster")?.replicas;
                ensure!(copies.len() == 2 && copies.iter().all(|copy| copy.current), "{stream}: {copies:?}");
            }
            anyhow::Ok(())
        })
        .await
    }

    /// The longest time that an event waited to be published.
    async fn longest_wait(&self, stop: &AtomicBool) -> Result<Duration> {
        let mut longest = 0.0_f64;
        while !stop.load(Ordering::Relaxed) {
            for db in [&self.system.tickets_db, &self.system.orders_db] {
                let mut db = PgConnection::connect(db).await?;
                let oldest = "select extract(epoch from clock_timestamp() - min(created_at))::float8 from bus.outbox";
                let seconds: Option<f64> = sqlx::query_scalar(oldest).fetch_one(&mut db).await?;
                longest = longest.max(seconds.unwrap_or_default());
            }
            sleep(Duration::from_millis(100)).await; // short against waits of seconds
        }
        Ok(Duration::from_secs_f64(longest))
    }

    /// Creates, changes, orders and cancels at all replicas. Every write of a ticket must succeed.
    async fn write(&self, writer: usize, stop: &AtomicBool) -> Result<usize> {
        let mut written = 0_usize;
        while !stop.load(Ordering::Relaxed) {
            let seller = self.system.seller(writer);
            let ticket = seller.post("/api/tickets", json!({"title": "Concert", "price": 5})).await?.expect(201)?;
            let ticket = ticket["id"].as_str().context("no id")?.to_owned();
            let edit = json!({"title": "Concert", "price": 6});
            seller.put(&format!("/api/tickets/{ticket}"), edit).await?.expect(200)?;
            written += 2;
            // An order of a ticket that orders does not know yet is a 503 without a reply of tickets.
            let buyer = self.system.buyer(writer, "buyer");
            let ordered = buyer.post("/api/orders", json!({"ticketId": ticket})).await?;
            ensure!([201, 503].contains(&ordered.status), "{}: {}", ordered.status, ordered.body);
            if ordered.status == 201 && written.is_multiple_of(4) {
                let order = ordered.body["id"].as_str().context("no id")?;
                buyer.delete(&format!("/api/orders/{order}")).await?.expect(204)?;
            }
        }
        Ok(written)
    }

    /// Runs `fault` under load. No write of a ticket fails, and no event is lost. Returns the longest wait of an event.
    async fn survives(&self, fault: impl AsyncFnOnce() -> Result<()>) -> Result<Duration> {
        let stop = AtomicBool::new(false);
        let writers = futures::future::try_join_all((0..4).map(|writer| self.write(writer, &stop)));
        let faults = async {
            sleep(Duration::from_secs(2)).await; // in the middle of the load
            let outcome = fault().await;
            sleep(Duration::from_secs(2)).await; // the load continues
            stop.store(true, Ordering::Relaxed);
            outcome
        };
        let (written, longest, ()) = futures::try_join!(writers, self.longest_wait(&stop), faults)?;
        ensure!(written.iter().sum::<usize>() > 50, "too few writes: {written:?}");
        self.system.settled().await?;
        Ok(longest)
    }
}

#[tokio::test]
async fn a_cluster_keeps_every_stream_on_three_nodes() -> Result<()> {
    let cluster = Cluster::start().await?;
    cluster.complete().await?;
    cluster.leader("TICKETS").await?;
    Ok(())
}

#[tokio::test]
async fn leader_killed_and_nodes_restarted_under_load_lose_no_event() -> Result<()> {
    let cluster = Cluster::start().await?;
    cluster.complete().await?;
    let longest = cluster
        .survives(async || {
            let leader = cluster.leader("TICKETS").await?;
            leader.kill().await?;
            cluster.resumes_without("TICKETS", leader.name()).await?;
            leader.start_again().await
        })
        .await?;
    ensure!(longest < ELECTED, "an event waited {longest:?} after the leader had been killed");

    let longest = cluster
        .survives(async || {
            for node in cluster.nodes() {
                node.restart().await?;
                cluster.complete().await?;
            }
            Ok(())
        })
        .await?;
    ensure!(longest < STEPS_DOWN, "an event waited {longest:?} during the rolling restart");
    Ok(())
}

/// In a cluster the end of a pull request may overtake its last messages.
#[tokio::test]
async fn a_backlog_in_a_cluster_is_delivered_once_without_redelivery() -> Result<()> {
    const EVENTS: usize = 3000;
    let cluster = Cluster::start().await?;
    let place = cluster.system.place("TICKETS", "orders").await?;
    ensure!(place.delivered.stream_sequence == 0, "the stream is not empty");
    let mut jetstream = cluster.system.jetstream().await?;
    jetstream.set_timeout(Duration::from_secs(30)); // the disk of a busy machine
    for (name, events, title) in [("small", EVENTS, "x".repeat(20)), ("large", 200, "x".repeat(100_000))] {
        let publish = async |number: usize| {
            let id = format!("{:024x}", number + title.len() * EVENTS);
            let event = json!({"id": id, "version": 0, "title": title, "price": 5, "userId": "seller"});
            jetstream.publish("ticket.created", event.to_string().into()).await?.await?;
            anyhow::Ok(())
        };
        for first in (0..events).step_by(100) {
            try_join_all((first..first + 100).map(publish)).await?;
        }
        cluster.system.caught_up("TICKETS", "orders").await.context(name)?;
    }
    let place = cluster.system.place("TICKETS", "orders").await?;
    ensure!(
        place.delivered.consumer_sequence == place.delivered.stream_sequence,
        "delivered more than once: {place:?}"
    );
    let failures = cluster.system.orders.iter().filter(|orders| orders.logs().contains("the server ended the request"));
    ensure!(failures.count() == 0, "a complete pull request counted as lost");
    Ok(())
}
