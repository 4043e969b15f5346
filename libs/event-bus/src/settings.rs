//! The configuration and the limits of a bus.

use crate::nats::NatsSettings;
use crate::postgres::{IDLE_IN_TRANSACTION, OPEN};
use crate::topology::Topology;
use anyhow::ensure;
use std::time::Duration;

/// The largest limit of bytes in memory.
const LARGEST: usize = 64 << 20;

/// The longest time for an attempt of a task. If its process dies, the task waits for this long.
const TASK: Duration = Duration::from_mins(10);
/// The longest window, 100 years: the time before it has to be a date.
const WINDOW: Duration = Duration::from_hours(100 * 365 * 24);

/// The configuration of a bus. [`Settings::new`] sets all limits to their defaults.
#[derive(Clone)]
pub struct Settings {
    /// The name of the service, the same for all replicas. One word.
    pub service: &'static str,
    /// The name of this process, shown by Postgres and NATS. Default: `service`.
    pub client: String,
    /// The service's own database, `postgres://user:password@host:5432/database`.
    pub database_url: String,
    /// How to reach NATS.
    pub nats: NatsSettings,
    /// The streams and consumers of the system, for services that create them. Default: none.
    pub topology: Topology,
    /// Whether to create streams and consumers that are missing, and change those that differ from `topology`.
    /// Otherwise they have to exist, see [`provision`](crate::provision). Default: false.
    pub provision: bool,

    /// The most connections to Postgres for requests. Each batcher has one more. Default: 16.
    pub database_connections: u32,
    /// The most connections to Postgres for relays, subscriptions, tasks, the service's own background work, replies to
    /// other services, fills, metrics, and the readiness check. A separate pool: requests and background work cannot take each
    /// other's connections. One for each relay and subscription, three for each kind of tasks, `reply_concurrency`, and two more are
    /// enough. Default: 8.
    pub background_connections: u32,
    /// How long to wait for a connection to Postgres, of either kind; at most 8 s. Default: 2 s.
    pub connection_timeout: Duration,

    /// The most items that a batcher writes in one statement. Default: 128.
    pub batch_items: usize,
    /// The most items that a batcher reads in one statement: all their rows are in memory at once. Default: 32.
    pub read_items: usize,
    /// The most items that wait for a batcher; one more fails at once. Default: 1024.
    pub batch_queue: usize,

    /// The most events in one atomic batch; the server takes 1000. Default: 512.
    pub publish_events: usize,
    /// The most bytes of bodies and headers in one batch. A single event may have more. Default: 1 MiB.
    pub publish_bytes: usize,
    /// How long the server may take to store a batch; less than 10 s, after which Postgres ends the relay's
    /// transaction. Default: 5 s.
    pub publish_timeout: Duration,
    /// How long events stay in the streams that this service publishes to, if all durable consumers have acknowledged them; at
    /// most 100 years. They leave earlier if the stream is half full: then its newest quarter stays. Default: 30 days.
    pub window_age: Duration,

    /// The most events that are requested from a consumer at a time, and applied in one transaction. Default: 512.
    pub apply_events: usize,
    /// The most bytes of messages per request to a consumer; the largest message of the stream has to fit. Each
    /// subscription has up to twice as many in memory. Default: 1.5 MiB.
    pub apply_bytes: usize,
    /// How long one transaction of a handler or of a completed task may take; at most 10 s, after which Postgres ends a
    /// transaction that waits for its handler. Default: 10 s.
    pub apply_timeout: Duration,
    /// Failed attempts after which an event becomes a dead letter. Default: 5.
    pub attempts: u32,
    /// The delay after the first failed attempt; it doubles with each further one up to 10 minutes, and is jittered.
    /// Default: 2 s.
    pub retry_delay: Duration,

    /// The most concurrent attempts of each kind of tasks. Default: 8.
    pub task_concurrency: usize,
    /// How long an attempt may perform a task; 10 minutes at most. If a process dies, its tasks wait for this time, and
    /// for `apply_timeout` and `connection_timeout`, before another one performs them. Default: 30 s.
    pub task_timeout: Duration,
    /// Failed attempts after which a task is dead. The delays between them are those of events. Default: 24, in about
    /// two hours.
    pub task_attempts: u32,

    /// How long a reply to a request to another service may take. Default: 300 ms.
    pub reply_timeout: Duration,
    /// The most concurrent requests of other services, each with a background connection. Default: 2.
    pub reply_concurrency: usize,
}

impl Settings {
    /// The settings of `service`, with the defaults for everything else.
    pub fn new(service: &'static str, database_url: impl Into<String>, nats: NatsSettings) -> Self {
        Self {
            service,
            client: service.to_owned(),
            database_url: database_url.into(),
            nats,
            topology: Topology::default(),
            provision: false,
            database_connections: 16,
            background_connections: 8,
            connection_timeout: Duration::from_secs(2),
            batch_items: 128,
            read_items: 32,
            batch_queue: 1024,
            publish_events: 512,
            publish_bytes: 1 << 20,
            publish_timeout: Duration::from_secs(5),
            window_age: Duration::from_hours(30 * 24),
            apply_events: 512,
            apply_bytes: 3 << 19,
            apply_timeout: Duration::from_secs(10),
            attempts: 5,
            retry_delay: Duration::from_secs(2),
            task_concurrency: 8,
            task_timeout: Duration::from_secs(30),
            task_attempts: 24,
            reply_timeout: Duration::from_millis(300),
            reply_concurrency: 2,
        }
    }

    /// The lease of a task: the time limits of performing it, and of storing its result.
    pub(crate) fn lease(&self) -> Duration {
        self.task_timeout + self.apply_timeout + self.connection_timeout
    }

    /// Refuses limits with which the bus could not keep its guarantees.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        ensure!(self.background_connections >= 3, "background_connections: a relay, a subscription and a check need 3");
        ensure!(self.database_connections >= 1, "database_connections: requests need one at least");
        ensure!((1..=10_000).contains(&self.batch_items), "batch_items: 1 to 10000");
        ensure!((1..=10_000).contains(&self.read_items), "read_items: 1 to 10000");
        ensure!((1..=1_000_000).contains(&self.batch_queue), "batch_queue: 1 to 1000000");
        ensure!((1..=1000).contains(&self.publish_events), "publish_events: the server takes 1 to 1000 in a batch");
        ensure!(self.publish_timeout < IDLE_IN_TRANSACTION, "publish_timeout: less than {IDLE_IN_TRANSACTION:?}");
        ensure!(self.window_age <= WINDOW, "window_age: at most 100 years");
        ensure!(self.connection_timeout <= OPEN, "connection_timeout: at most {OPEN:?}");
        let apply = Duration::from_millis(1)..=IDLE_IN_TRANSACTION;
        ensure!(apply.contains(&self.apply_timeout), "apply_timeout: at most {IDLE_IN_TRANSACTION:?}");
        ensure!(self.apply_events >= 1, "apply_events: 1 or more");
        ensure!((1..=1000).contains(&self.attempts), "attempts: 1 to 1000");
        ensure!((1..=LARGEST).contains(&self.publish_bytes), "publish_bytes: 1 to {LARGEST}");
        ensure!((1..=LARGEST).contains(&self.apply_bytes), "apply_bytes: 1 to {LARGEST}");
        ensure!((1..=1000).contains(&self.task_concurrency), "task_concurrency: 1 to 1000");
        let perform = Duration::from_millis(1)..=TASK;
        ensure!(perform.contains(&self.task_timeout), "task_timeout: at most {TASK:?}");
        ensure!((1..=1000).contains(&self.task_attempts), "task_attempts: 1 to 1000");
        ensure!(self.reply_concurrency >= 1, "reply_concurrency: 1 or more");
        Ok(())
    }
}
