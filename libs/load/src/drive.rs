//! The two kinds of load: closed loop and open loop.

use crate::http::{Connection, Target};
use crate::lag::Sampler;
use crate::routes::{Requests, id_and_version};
use crate::tally::{Tally, check_reachable, failure};
use anyhow::Result;
use futures::future::try_join_all;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;

/// A load on one route, shared by its connections.
pub struct Load {
    /// The replicas of the service: connection n uses replica n modulo their number.
    pub targets: Vec<Arc<Target>>,
    /// What to send.
    pub requests: Arc<Requests>,
    /// Where responses are counted.
    pub tally: Tally,
    /// Takes some of the changes, to measure lag.
    pub sampler: Option<Sampler>,
}

/// How requests follow each other.
#[derive(Clone, Copy, Debug)]
pub enum Pace {
    /// Closed loop: each connection sends its next request when the last one is answered.
    Closed,
    /// Open loop: this many requests per second are due, whether earlier ones are answered or not.
    ///
    /// The latency of a request is counted from the moment when it was due. So the time that it waits for a free connection,
    /// because the service is slow, is not left out.
    Open(u32),
}

/// Runs a load on this many connections until it is over. Each connection is a task.
pub async fn drive(load: Arc<Load>, connections: u16, pace: Pace) -> Result<()> {
    let clock = match pace {
        Pace::Closed => None,
        Pace::Open(rate) => Some(Arc::new(Clock::start(rate, load.tally.window().1))),
    };
    let tasks = (0..connections).map(|number| {
        let target = load.targets[usize::from(number) % load.targets.len()].clone();
        let user = User { load: load.clone(), target, connection: None, failures: 0 };
        tokio::spawn(user.run(clock.clone()))
    });
    try_join_all(tasks).await?.into_iter().collect()
}

/// One connection, opened again when it is lost.
struct User {
    load: Arc<Load>,
    target: Arc<Target>,
    connection: Option<Connection>,
    /// Requests in a row without a response.
    failures: u32,
}

impl User {
    async fn run(mut self, clock: Option<Arc<Clock>>) -> Result<()> {
        while !self.load.tally.is_over() {
            let due = match &clock {
                Some(clock) => clock.next().await,
                None => Some(Instant::now()),
            };
            let Some(due) = due else { break };
            if !self.request(due).await? {
                break;
            }
        }
        Ok(())
    }

    /// Sends one request that was due at `due`. Returns false if there is none left.
    async fn request(&mut self, due: Instant) -> Result<bool> {
        let load = self.load.clone();
        let Some(call) = load.requests.next() else {
            load.tally.failure("no ticket was left to order");
            return Ok(false);
        };
        let mut connection = match self.connection.take().filter(|connection| !connection.is_idle_for_long()) {
            Some(connection) => connection,
            None => Connection::open(&self.target).await?,
        };
        let sampler = load.sampler.as_ref().filter(|sampler| call.is_change && sampler.is_free());
        match connection.send(call.clone(), sampler.is_some()).await {
            Ok((status, body)) => {
                let is_expected = load.tally.response(status, call.expected, due);
                if let Some((sampler, (id, version))) = sampler.filter(|_| is_expected).zip(id_and_version(&body)) {
                    sampler.offer(id, version);
                }
                self.failures = 0;
                self.connection = Some(connection);
            }
            // The service may close it at the end of the load.
            Err(_) if load.tally.is_over() => {}
            Err(error) => {
                load.tally.failure(&failure(&call, &error));
                self.failures += 1;
                check_reachable(self.failures)?;
            }
        }
        Ok(true)
    }
}

/// The moments when requests are due.
struct Clock {
    start: Instant,
    interval: Duration,
    next: AtomicU64,
    /// One permit for each request that is due and not yet taken.
    due: Arc<Semaphore>,
}

impl Clock {
    /// Starts a thread: timers of tokio are exact to a millisecond only.
    fn start(rate: u32, until: Instant) -> Self {
        let (start, interval) = (Instant::now(), Duration::from_secs(1) / rate);
        let due = Arc::new(Semaphore::new(0));
        let permits = due.clone();
        std::thread::spawn(move || {
            let mut at = start;
            while at < until {
                std::thread::sleep(at.saturating_duration_since(Instant::now()));
                permits.add_permits(1);
                at += interval;
            }
            // The waiting connections end.
            permits.close();
        });
        Self { start, interval, next: AtomicU64::new(0), due }
    }

    /// Waits until the next request is due, and returns since when it is. None: the load is over.
    async fn next(&self) -> Option<Instant> {
        self.due.acquire().await.ok()?.forget();
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        Some(self.start + self.interval.saturating_mul(u32::try_from(number).unwrap_or(u32::MAX)))
    }
}
