//! A backlog: how fast a full outbox empties, and whether a service starts slower with one.

use crate::bench::Bench;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use stack::services::TICKETS;
use std::time::{Duration, Instant};
use testkit::{Client, Process, announced};
use tokio::time::sleep;

/// Starts that are measured; the median counts.
const STARTS: usize = 3;

/// The stream of the backlog.
const STREAM: &str = "TICKETS";

const PATIENCE: Duration = Duration::from_mins(10);

/// The result.
#[derive(Clone, Copy, Debug)]
pub struct Backlog {
    /// Events in the outbox of tickets.
    pub events: u64,
    /// From the start of the process to ready, with an empty outbox.
    pub start_empty: Duration,
    /// The same with the backlog.
    pub start_full: Duration,
    /// From ready until the outbox was empty.
    pub relayed: Duration,
    /// From ready until orders had applied all events.
    pub applied: Duration,
    /// The most bytes that the stream of tickets had meanwhile.
    pub stream_bytes: u64,
}

/// Measures a backlog of this many events. Stops all replicas of tickets, and starts one afterwards.
pub async fn measure(bench: &mut Bench, events: u64) -> Result<Backlog> {
    bench.system.stop_tickets().await?;
    // So that nothing is published while the starts are measured.
    bench.system.nats.pause().await?;
    let start_empty = start(bench).await?;
    announced("filling the outbox", bench.records.fill_outbox(events)).await?;
    let start_full = start(bench).await?;
    bench.system.nats.unpause().await?;
    bench.system.scale_tickets(1).await?;
    let ready = Instant::now();
    let stream_bytes = announced("publishing the backlog", published(bench)).await?;
    let relayed = ready.elapsed();
    announced("applying the backlog", bench.records.drained()).await?;
    Ok(Backlog { events, start_empty, start_full, relayed, applied: ready.elapsed(), stream_bytes })
}

/// Waits until everything is published. Returns the most bytes that the stream of tickets had meanwhile.
async fn published(bench: &mut Bench) -> Result<u64> {
    let (begun, mut most) = (Instant::now(), 0);
    while !bench.records.tickets_outbox_is_empty().await? {
        ensure!(begun.elapsed() < PATIENCE, "the backlog was not published within {PATIENCE:?}");
        sleep(Duration::from_millis(50)).await;
        most = most.max(bench.records.stream_bytes(STREAM).await?);
    }
    Ok(most)
}

/// Limits the stream to this many bytes.
pub async fn limit(bench: &Bench, bytes: u64) -> Result<()> {
    let nats = bench.system.nats.connect().await?;
    let ask = async |verb: &str, body: Value| {
        let reply = nats.request(format!("$JS.API.STREAM.{verb}.{STREAM}"), body.to_string().into()).await?;
        let reply: Value = serde_json::from_slice(&reply.payload)?;
        ensure!(reply["error"].is_null(), "cannot limit the stream: {}", reply["error"]);
        anyhow::Ok(reply)
    };
    let mut config = ask("INFO", Value::Null).await?["config"].take();
    config["max_bytes"] = bytes.into();
    ask("UPDATE", config).await.map(drop)
}

/// The median time from starting tickets to ready.
async fn start(bench: &Bench) -> Result<Duration> {
    let mut times = Vec::new();
    for _ in 0..STARTS {
        let begun = Instant::now();
        // Killed when it is dropped: a graceful stop would wait for NATS.
        let process = bench.system.spawn(&TICKETS)?;
        ready(&process).await?;
        times.push(begun.elapsed());
    }
    times.sort_unstable();
    times.get(STARTS / 2).copied().context("there is a start")
}

/// Waits until a process is ready, and looks often.
async fn ready(process: &Process) -> Result<()> {
    let (client, begun): (Client, _) = (process.client(), Instant::now());
    while !client.get("/readyz").await.is_ok_and(|answer| answer.status == 200) {
        ensure!(begun.elapsed() < testkit::PATIENCE, "{process} is not ready:\n{}", process.last_lines(20));
        sleep(Duration::from_millis(2)).await;
    }
    Ok(())
}
