//! One point of the report: what is measured, and its result.

use crate::drive::{Load, Pace, drive};
use crate::options::Options;
use crate::routes::Route;
use crate::tally::Percentiles;
use crate::usage::Usage;
use anyhow::Result;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::time::sleep_until;

/// What to measure.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// The route.
    pub route: Route,
    /// Connections at a time.
    pub connections: u16,
    /// Closed or open loop.
    pub pace: Pace,
    /// Before the measured time.
    pub warm_up: Duration,
    /// The measured time.
    pub measured: Duration,
}

/// The result of a plan.
#[derive(Clone, Debug)]
pub struct Point {
    /// What was measured.
    pub plan: Plan,
    /// What the client saw.
    pub seen: Seen,
    /// What the load did to processes. None where `/proc` does not show it.
    pub costs: Option<Costs>,
    /// From the response to visible in the replica.
    pub lag: Option<Percentiles>,
    /// What was left to publish.
    pub rest: Option<Rest>,
}

/// What was left to publish when a load ended.
#[derive(Clone, Copy, Debug)]
pub struct Rest {
    /// Events in the outboxes.
    pub events: u64,
    /// How long it took until the outboxes were empty.
    pub drain: Duration,
}

/// What each process used in the measured time.
#[derive(Clone, Copy, Debug)]
pub struct Costs {
    /// Requests in the measured time.
    pub requests: u64,
    /// All replicas of tickets.
    pub tickets: Usage,
    /// All replicas of orders.
    pub orders: Usage,
    /// Postgres with its backends.
    pub postgres: Usage,
    /// NATS.
    pub nats: Usage,
    /// This program.
    pub generator: Usage,
    /// The largest peak memory of a replica of tickets, in kB.
    pub tickets_memory: u64,
    /// The largest peak memory of a replica of orders, in kB.
    pub orders_memory: u64,
}

impl Costs {
    /// Microseconds of CPU per request of services and servers, without the generator.
    pub fn total(&self) -> f64 {
        [self.tickets, self.orders, self.postgres, self.nats].iter().map(|usage| self.per_request(usage)).sum()
    }

    /// Microseconds of CPU per request.
    #[expect(clippy::cast_precision_loss, reason = "a cost needs no 52 bits")]
    pub fn per_request(&self, usage: &Usage) -> f64 {
        usage.cpu.as_secs_f64() * 1e6 / self.requests.max(1) as f64
    }
}

/// What a load did, seen by its client.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Expected responses in the measured time.
    pub responses: u64,
    /// Requests per second.
    pub rate: f64,
    /// From sending (closed loop) or from the moment when it was due (open loop) to the end of the response.
    pub latency: Percentiles,
    /// Requests that failed, by cause.
    pub failures: Vec<(String, u64)>,
}

impl Plan {
    /// A plan with the times of the command line.
    pub fn new(options: &Options, route: Route, connections: u16, pace: Pace) -> Self {
        let [warm_up, measured] = [options.warm_up, options.seconds].map(|seconds| Duration::from_secs(seconds.into()));
        Self { route, connections, pace, warm_up, measured }
    }

    /// The measured time, if the load begins now.
    pub fn window(&self) -> (Instant, Instant) {
        let from = Instant::now() + self.warm_up;
        (from, from + self.measured)
    }

    /// Runs the load, and calls `observe` at the beginning and at the end of the measured time.
    pub async fn run<T>(&self, load: Load, observe: impl Fn() -> T) -> Result<(Seen, T, T)> {
        let load = Arc::new(load);
        let (from, until) = load.tally.window();
        let running = tokio::spawn(drive(load.clone(), self.connections, self.pace));
        sleep_until(from.into()).await;
        let before = observe();
        sleep_until(until.into()).await;
        let after = observe();
        running.await??;
        let (responses, latency, failures) = load.tally.result();
        #[expect(clippy::cast_precision_loss, reason = "a rate needs no 52 bits")]
        let rate = responses as f64 / self.measured.as_secs_f64();
        Ok((Seen { responses, rate, latency, failures }, before, after))
    }
}
