//! The two kinds of load: closed loop and open loop.

use crate::http::{Connection, Target};
use crate::lag::Sampler;
use crate::routes::{Requests, id_and_version};
use crate::tally::{Tally, check_reachable, failure};
use anyhow::Result;
use futures::future::try_join_all;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;

/// How long after the end of an open loop requests that wait are still sent.
const GRACE: Duration = Duration::from_secs(30);

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
        Pace::Open(rate) => Some(Clock::start(rate, load.tally.window().1, connections)),
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
    async fn run(self, clock: Option<Arc<Clock>>) -> Result<()> {
        if let Some(clock) = clock { self.run_open(&clock).await } else { self.run_closed().await }
    }

    async fn run_closed(mut self) -> Result<()> {
        while !self.load.tally.is_over() && self.request(Instant::now()).await? {}
        Ok(())
    }

    /// Sends all requests that are due, also those that wait when the load is over: they are the slowest.
    async fn run_open(mut self, clock: &Clock) -> Result<()> {
        let given_up = self.load.tally.window().1 + GRACE;
        while let Some(due) = clock.next().await {
            if Instant::now() > given_up {
                self.load.tally.failure("due, and not sent within 30 s after the end");
            } else if !self.request(due).await? {
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
        let mut connection = match self.connection.take().filter(Connection::is_usable) {
            Some(connection) => connection,
            None => Connection::open(&self.target).await?,
        };
        let sampler = load.sampler.as_ref().filter(|sampler| call.changes_ticket && sampler.is_free());
        match connection.send(call.clone(), sampler.is_some()).await {
            Ok((status, body)) => {
                let is_expected = load.tally.response(status, call.expected, due);
                if let Some((sampler, (id, version))) = sampler.filter(|_| is_expected).zip(id_and_version(&body)) {
                    sampler.offer(id, version);
                }
                self.failures = 0;
                self.connection = Some(connection);
            }
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
    /// Requests that are due until the end.
    total: u32,
    next: AtomicU32,
    /// One permit for each request that is due and not yet taken; in the end, one for each connection.
    due: Semaphore,
}

impl Clock {
    /// Starts a thread: timers of tokio are exact to a millisecond only.
    fn start(rate: u32, until: Instant, connections: u16) -> Arc<Self> {
        let (start, interval) = (Instant::now(), Duration::from_secs(1) / rate);
        let total = until.saturating_duration_since(start).as_nanos() / interval.as_nanos().max(1);
        let total = u32::try_from(total).unwrap_or(u32::MAX);
        let clock = Arc::new(Self { start, interval, total, next: AtomicU32::new(0), due: Semaphore::new(0) });
        let thread = clock.clone();
        std::thread::spawn(move || {
            for number in 0..total {
                std::thread::sleep(thread.due_at(number).saturating_duration_since(Instant::now()));
                thread.due.add_permits(1);
            }
            thread.due.add_permits(connections.into());
        });
        clock
    }

    /// Waits until the next request is due, and returns since when it is. None: there is none left.
    async fn next(&self) -> Option<Instant> {
        self.due.acquire().await.ok()?.forget();
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        (number < self.total).then(|| self.due_at(number))
    }

    fn due_at(&self, number: u32) -> Instant {
        self.start + self.interval.saturating_mul(number)
    }
}
