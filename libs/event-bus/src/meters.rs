//! The metrics of the bus, recorded with the crate `metrics`: their names, their descriptions, and handles.
//!
//! Handles are registered once, before any work: recording a value is a few atomic operations. Durations and sizes are recorded once per
//! batch. What only Postgres knows is measured in the background: see `measure`.
//!
//! All labels have few values: streams, consumers, statements and kinds of tasks are names in the code, and codes are those of NATS.

use metrics::{Counter, Gauge, Histogram, Unit, counter, describe_counter, describe_gauge, describe_histogram};
use metrics::{gauge, histogram};
use std::any::type_name;
use std::time::Duration;
use tokio::time::Instant;

/// Counted where it happens, because it is rare.
pub(crate) const HELD_BACK: &str = "event_bus_held_back_batches_total";

/// Describes all metrics of the bus. Called when a bus is opened.
pub(crate) fn describe() {
    describe_outbox();
    describe_subscriptions();
    describe_database();
    counter!(HELD_BACK).increment(0);
}

fn describe_outbox() {
    describe_gauge!("event_bus_outbox_events", "Events that wait in the outbox; 10000 at most are counted");
    describe_gauge!(
        "event_bus_outbox_oldest_event_age_seconds",
        Unit::Seconds,
        "Age of the oldest event in the outbox, by the clock of Postgres"
    );
    describe_histogram!(
        "event_bus_publish_duration_seconds",
        Unit::Seconds,
        "Time in which the server stored a batch of events"
    );
    describe_histogram!("event_bus_publish_batch_events", "Events of a batch that the server stored");
    describe_counter!(
        "event_bus_publish_failures_total",
        "Failed publishes, by the error code of NATS, or other; no_reply: unknown whether the events were stored"
    );
    describe_counter!(
        "event_bus_reconciliations_total",
        "Times that the stream did not end at the position of the relay: behind, ahead, or replaced"
    );
    describe_counter!(
        HELD_BACK,
        "Batches of writes that were slowed down, because more events wait than the relay can publish at once"
    );
    describe_gauge!("event_bus_stream_bytes", Unit::Bytes, "Bytes in the stream");
    describe_gauge!("event_bus_stream_max_bytes", Unit::Bytes, "Bytes that the stream may have; negative: unlimited");
    describe_gauge!("event_bus_republishes_open", "Requests to publish the current state again that are not done");
}

fn describe_subscriptions() {
    describe_gauge!("event_bus_subscription_up", "1 if the consumer can be read, otherwise 0");
    describe_histogram!(
        "event_bus_replication_lag_seconds",
        Unit::Seconds,
        "Time from appending an event, by the Postgres of its owner, to applying it, by the Postgres of its reader"
    );
    describe_histogram!(
        "event_bus_apply_duration_seconds",
        Unit::Seconds,
        "Time of a transaction that applied a batch of events"
    );
    describe_histogram!("event_bus_apply_batch_events", "Events that one transaction applied");
    describe_gauge!("event_bus_pending_messages", "Messages that were not delivered to the consumer yet");
    describe_gauge!(
        "event_bus_unacknowledged_messages",
        "Messages that were delivered to the consumer and not acknowledged"
    );
    describe_counter!("event_bus_redelivered_messages_total", "Messages that were not delivered for the first time");
    describe_counter!("event_bus_failed_attempts_total", "Failed attempts to apply an event, which is tried again");
    describe_counter!("event_bus_dead_letters_total", "Events that could not be applied, and became dead letters");
    describe_counter!(
        "event_bus_superseded_events_total",
        "Events that could not be applied, of which a newer version was applied"
    );
    describe_gauge!(
        "event_bus_dead_letters_open",
        "Events in bus.dead_letters: retrying, or dead; 10000 at most are counted"
    );
    describe_counter!(
        "event_bus_missed_events_total",
        "Messages that were deleted before this service acknowledged them"
    );
    describe_gauge!("event_bus_fills_open", "Requests to fill tables from the owner of a stream that are not done");
}

fn describe_database() {
    describe_gauge!("event_bus_database_up", "1 if Postgres answered the last measurement, otherwise 0");
    describe_gauge!("event_bus_recovering", "1 while the database is recovered from its stream, otherwise 0");
    describe_gauge!("event_bus_pool_connections", "Connections to Postgres, in use or idle");
    describe_gauge!("event_bus_pool_max_connections", "Connections to Postgres at most");
    describe_histogram!("event_bus_pool_wait_seconds", Unit::Seconds, "Time to get a connection to Postgres");
    describe_counter!("event_bus_pool_timeouts_total", "Times that there was no connection to Postgres in time");
    describe_gauge!("event_bus_batch_queue_items", "Items that wait for the statement that they share");
    describe_histogram!(
        "event_bus_batch_wait_seconds",
        Unit::Seconds,
        "Time that the first item of a batch waited for its statement"
    );
    describe_histogram!("event_bus_batch_duration_seconds", Unit::Seconds, "Time of the statement of a batch");
    describe_histogram!("event_bus_batch_items", "Items of a batch");
    describe_counter!("event_bus_split_batches_total", "Batches that failed, and were executed item by item");
    describe_counter!("event_bus_tasks_total", "Attempts of tasks that ended: done, failed or dead");
}

/// A number of things in memory.
#[expect(clippy::cast_precision_loss, reason = "there are fewer than 2^53")]
pub(crate) fn float(number: usize) -> f64 {
    number as f64
}

/// A counter that appears at once, as 0.
fn zero(counter: Counter) -> Counter {
    counter.increment(0);
    counter
}

/// The relay of a stream.
pub(crate) struct Published {
    duration: Histogram,
    events: Histogram,
    behind: Counter,
    ahead: Counter,
    replaced: Counter,
}

impl Published {
    pub(crate) fn new(stream: &'static str) -> Self {
        counter!("event_bus_publish_failures_total", "stream" => stream, "code" => "no_reply").increment(0);
        let reconciliations =
            |cause| zero(counter!("event_bus_reconciliations_total", "stream" => stream, "stream_is" => cause));
        Self {
            duration: histogram!("event_bus_publish_duration_seconds", "stream" => stream),
            events: histogram!("event_bus_publish_batch_events", "stream" => stream),
            behind: reconciliations("behind"),
            ahead: reconciliations("ahead"),
            replaced: reconciliations("replaced"),
        }
    }

    /// So many events were stored.
    pub(crate) fn stored(&self, events: usize, begun: Instant) {
        self.duration.record(begun.elapsed());
        self.events.record(float(events));
    }

    /// The stream is longer than the position of the relay.
    pub(crate) fn is_ahead(&self) {
        self.ahead.increment(1);
    }

    /// The stream is shorter than the position of the relay, or another one.
    pub(crate) fn is_lost(&self, is_another: bool) {
        if is_another { &self.replaced } else { &self.behind }.increment(1);
    }
}

/// Counts a failed publish to `stream`. `code`: the error code of NATS. None: it is unknown whether the events were stored.
///
/// Looked up each time, because it is rare.
pub(crate) fn publish_failed(stream: &str, code: Option<u64>) {
    let label = match code {
        Some(code @ 10_000..=10_999) => code.to_string(),
        Some(_) => "other".to_owned(),
        None => "no_reply".to_owned(),
    };
    counter!("event_bus_publish_failures_total", "stream" => stream.to_owned(), "code" => label).increment(1);
}

/// The subscription to a stream.
pub(crate) struct Applied {
    up: Gauge,
    pub(crate) lag: Histogram,
    duration: Histogram,
    events: Histogram,
    pub(crate) pending: Gauge,
    pub(crate) unacknowledged: Gauge,
    pub(crate) redelivered: Counter,
    pub(crate) failed_attempts: Counter,
    pub(crate) dead_letters: Counter,
    pub(crate) superseded: Counter,
    pub(crate) missed: Counter,
}

impl Applied {
    pub(crate) fn new(stream: &'static str) -> Self {
        Self {
            up: gauge!("event_bus_subscription_up", "stream" => stream),
            lag: histogram!("event_bus_replication_lag_seconds", "stream" => stream),
            duration: histogram!("event_bus_apply_duration_seconds", "stream" => stream),
            events: histogram!("event_bus_apply_batch_events", "stream" => stream),
            pending: gauge!("event_bus_pending_messages", "stream" => stream),
            unacknowledged: gauge!("event_bus_unacknowledged_messages", "stream" => stream),
            redelivered: zero(counter!("event_bus_redelivered_messages_total", "stream" => stream)),
            failed_attempts: zero(counter!("event_bus_failed_attempts_total", "stream" => stream)),
            dead_letters: zero(counter!("event_bus_dead_letters_total", "stream" => stream)),
            superseded: zero(counter!("event_bus_superseded_events_total", "stream" => stream)),
            missed: zero(counter!("event_bus_missed_events_total", "stream" => stream)),
        }
    }

    /// The consumer was asked for messages, and the server has replied.
    pub(crate) fn is_up(&self) {
        self.up.set(1.0);
    }

    /// It cannot be asked: nothing is known of its messages.
    pub(crate) fn is_down(&self) {
        self.up.set(0.0);
        self.pending.set(f64::NAN);
        self.unacknowledged.set(f64::NAN);
    }

    /// A transaction has applied so many events.
    pub(crate) fn applied(&self, events: usize, begun: Instant) {
        self.duration.record(begun.elapsed());
        self.events.record(float(events));
    }
}

/// The batcher of one statement.
pub(crate) struct Batches {
    wait: Histogram,
    duration: Histogram,
    items: Histogram,
    pub(crate) split: Counter,
}

impl Batches {
    pub(crate) fn new<S>() -> Self {
        let statement = name_of::<S>();
        Self {
            wait: histogram!("event_bus_batch_wait_seconds", "statement" => statement),
            duration: histogram!("event_bus_batch_duration_seconds", "statement" => statement),
            items: histogram!("event_bus_batch_items", "statement" => statement),
            split: zero(counter!("event_bus_split_batches_total", "statement" => statement)),
        }
    }

    /// A batch of so many items was executed, the first of which waited for so long.
    pub(crate) fn executed(&self, items: usize, waited: Duration, begun: Instant) {
        self.wait.record(waited);
        self.duration.record(begun.elapsed());
        self.items.record(float(items));
    }
}

/// The gauge of the items that wait for the statement `S`.
pub(crate) fn queue<S>() -> Gauge {
    gauge!("event_bus_batch_queue_items", "statement" => name_of::<S>())
}

/// The name of a type, without its module and parameters.
fn name_of<T>() -> &'static str {
    let path = type_name::<T>().split('<').next().unwrap_or_default();
    path.rsplit("::").next().unwrap_or_default()
}

/// The connections of one pool.
#[derive(Clone, Debug)]
pub(crate) struct Connections {
    pool: &'static str,
    wait: Histogram,
    timeouts: Counter,
}

impl Connections {
    pub(crate) fn new(pool: &'static str) -> Self {
        Self {
            pool,
            wait: histogram!("event_bus_pool_wait_seconds", "pool" => pool),
            timeouts: zero(counter!("event_bus_pool_timeouts_total", "pool" => pool)),
        }
    }

    /// A caller has got a connection.
    pub(crate) fn acquired(&self, begun: Instant) {
        self.wait.record(begun.elapsed());
    }

    /// A caller has got no connection in time.
    pub(crate) fn timed_out(&self) {
        self.timeouts.increment(1);
    }

    /// Sets the gauges, which are looked up here: some pools have none.
    pub(crate) fn are(&self, size: u32, idle: usize, most: u32) {
        let connections = |state| gauge!("event_bus_pool_connections", "pool" => self.pool, "state" => state);
        connections("in_use").set(f64::from(size) - float(idle));
        connections("idle").set(float(idle));
        gauge!("event_bus_pool_max_connections", "pool" => self.pool).set(f64::from(most));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Plain;
    struct Generic<T>(T);

    #[test]
    fn a_statement_is_named_after_its_type() {
        assert_eq!(name_of::<Plain>(), "Plain");
        assert_eq!(name_of::<Generic<Plain>>(), "Generic");
    }
}
