//! The window: the newest part of its stream that an owner keeps. What is older is purged.
//!
//! A new reader needs the newest snapshot of each aggregate. It is in the tables of the owner, which replies with it (see `owner`). So a stream
//! is no archive: without a limit of time it would be full one day, and refuse all events.
//!
//! A message is in the window if it is younger than [`Settings::window_age`], and, while more than half of the bytes or messages
//! that the stream may have are used, if it is in the newest quarter of them. A message outside of the window is purged if also
//! - every durable consumer has acknowledged it. The newest message that a consumer has acknowledged stays: so a consumer whose
//!   position lies before the first message has missed messages (see `subscription::missed`);
//! - the relay has committed a position after it. A relay that died after it published needs these messages to find out (see
//!   `relay::reconcile`), even if readers have acknowledged them;
//! - it is not the last message of the stream.
//!
//! A filtered consumer acknowledges only the subjects that it reads. If no message is pending for it, it counts as having acknowledged
//! everything up to the end that the stream had before the consumers were read.
//!
//! Each relay looks every 30 s, and when the server refuses an event because the stream is full.
//!
//! What if we die, or are frozen …
//! - before the purge: nothing has changed.
//! - after it: it is done. Nothing else depends on it.
//! - between the check and the purge, for long: positions of consumers only grow, so the purge is still right. If the stream was meanwhile deleted, created
//!   again and filled, the purge may delete messages that a consumer has not read. The consumer reports it.
//!
//! Replicas may purge at the same time: a purge up to a smaller sequence changes nothing.

mod usage;

use crate::broker::Broker;
use crate::settings::Settings;
use crate::topology::ask;
use anyhow::{Context, ensure};
use async_nats::jetstream::stream::{Config, State, Stream};
use metrics::Gauge;
use serde::Deserialize;
use serde_json::{Value, json};
use sqlx::types::time::OffsetDateTime;
use std::convert::Infallible;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};
pub(crate) use usage::Usage;

/// How often to look.
const PERIOD: Duration = Duration::from_secs(30);
/// When to look again after a failure: it may have been a short outage.
const AGAIN: Duration = Duration::from_secs(10);
/// How often to look after the second failure in a row: a missing right is a line in the log of the server each time.
const WITHOUT_REPLY: Duration = Duration::from_mins(10);
/// How often to look while the position of the relay is not known.
const STARTING: Duration = Duration::from_secs(1);
/// How long the server may take for one reply.
const REPLY: Duration = Duration::from_secs(3);
/// How often a stream that fills up is logged.
const REMINDER: Duration = Duration::from_mins(10);

/// The window of a stream in this process.
pub(crate) struct Window<'a> {
    broker: &'a Broker,
    stream: &'static str,
    age: Duration,
    /// The position that the relay has committed; 0 while it is not known.
    published: AtomicU64,
    bytes: Gauge,
    max_bytes: Gauge,
}

/// A durable consumer.
pub(crate) struct Reader {
    name: String,
    /// It has acknowledged all messages up to this one.
    acknowledged: u64,
    /// How many messages it has not acknowledged.
    behind: u64,
}

/// What the stream holds after messages were purged.
pub(crate) struct Trimmed {
    /// How many messages were purged.
    pub(crate) purged: u64,
    pub(crate) usage: Usage,
}

impl<'a> Window<'a> {
    pub(crate) fn new(broker: &'a Broker, settings: &Settings, stream: &'static str) -> Self {
        Self {
            broker,
            stream,
            age: settings.window_age,
            published: AtomicU64::new(0),
            bytes: metrics::gauge!("event_bus_stream_bytes", "stream" => stream),
            max_bytes: metrics::gauge!("event_bus_stream_max_bytes", "stream" => stream),
        }
    }

    /// The relay has committed this position, and the stream is the one to which it belongs.
    pub(crate) fn is_published_up_to(&self, seq: u64) {
        self.published.store(seq, Ordering::Relaxed);
    }

    /// Trims the stream every 30 s.
    pub(crate) async fn keep(&self) -> Infallible {
        let (mut failures, mut warned) = (0_u32, None::<Instant>);
        loop {
            while self.broker.connected().is_err() || self.published.load(Ordering::Relaxed) == 0 {
                sleep(STARTING).await;
            }
            let pause = match self.trim().await {
                Ok(Trimmed { usage, .. }) => {
                    failures = 0;
                    if usage.is_high() && warned.is_none_or(|last| last.elapsed() > REMINDER) {
                        warned = Some(Instant::now());
                        tracing::warn!(stream = self.stream, "a stream fills up: {usage}");
                    }
                    PERIOD
                }
                // The relay logs an outage.
                Err(_) if self.broker.connected().is_err() => PERIOD,
                Err(error) => {
                    failures += 1;
                    if failures == 2 {
                        self.report(&error);
                    }
                    if failures == 1 { AGAIN } else { WITHOUT_REPLY }
                }
            };
            sleep(pause).await;
        }
    }

    fn report(&self, error: &anyhow::Error) {
        let stream = self.stream;
        tracing::warn!(
            stream,
            "the stream is not trimmed, and may become full: {error:#}. If the user of NATS may not publish to \
             $JS.API.CONSUMER.LIST.{stream} and $JS.API.STREAM.PURGE.{stream}, grant these rights. Tried again every 10 minutes"
        );
    }

    /// Purges the messages outside of the window that every durable consumer has acknowledged.
    pub(crate) async fn trim(&self) -> anyhow::Result<Trimmed> {
        let stream = timeout(REPLY, self.broker.jetstream.get_stream(self.stream));
        let stream = stream.await.context("no reply")?.context("cannot read the stream")?;
        let (state, config) = (&stream.cached_info().state, &stream.cached_info().config);
        self.measure(state.bytes, config.max_bytes);
        // Read after the state: what a consumer has acknowledged then, it has acknowledged now.
        let readers = self.readers(state.last_sequence).await?;
        let slowest = readers.into_iter().min_by_key(|reader| reader.acknowledged);
        let limit = limit(state.last_sequence, self.published.load(Ordering::Relaxed), slowest.as_ref());
        let begin = in_quarter(state, config).max(self.of_age(&stream, limit).await?);
        let usage = Usage::new(self.stream, state, config, slowest.filter(|slowest| slowest.acknowledged < begin));
        let keep = begin.min(limit);
        if keep <= state.first_sequence {
            return Ok(Trimmed { purged: 0, usage });
        }
        let purged = self.purge(keep).await?;
        let usage = usage.without(purged);
        self.measure(usage.bytes, config.max_bytes);
        tracing::debug!(stream = self.stream, purged, keep, "trimmed the stream");
        Ok(Trimmed { purged, usage })
    }

    /// The durable consumers of the stream, which ended at `end` before.
    async fn readers(&self, end: u64) -> anyhow::Result<Vec<Reader>> {
        let (mut readers, mut offset) = (Vec::new(), 0);
        loop {
            let subject = format!("CONSUMER.LIST.{}", self.stream);
            let page = ask(&self.broker.jetstream, &subject, &json!({ "offset": offset })).await??;
            let page: Page = serde_json::from_value(page).with_context(|| subject)?;
            ensure!(page.missing.is_empty(), "the position of some consumers is not known: {:?}", page.missing);
            offset += page.consumers.len();
            let is_last = page.consumers.is_empty() || offset >= page.total;
            readers.extend(page.consumers.into_iter().filter_map(|consumer| consumer.reader(end)));
            if is_last {
                ensure!(offset >= page.total, "the position of some consumers is not known");
                return Ok(readers);
            }
        }
    }

    /// The first message that is young enough, or `limit` if it is greater.
    async fn of_age(&self, stream: &Stream, limit: u64) -> anyhow::Result<u64> {
        let State { first_sequence, first_timestamp, messages, .. } = stream.cached_info().state;
        let oldest = OffsetDateTime::now_utc() - self.age;
        let (mut low, mut high) = (first_sequence, limit);
        if messages == 0 || first_timestamp >= oldest {
            return Ok(low);
        }
        while low < high {
            let middle = low + (high - low) / 2;
            // The first one from there on: messages may be missing.
            let message = timeout(REPLY, stream.get_first_raw_message_by_subject(">", middle));
            let message = message.await.context("no reply")?.context("cannot read the stream")?;
            if message.time < oldest { low = message.sequence + 1 } else { high = middle }
        }
        Ok(low)
    }

    /// Deletes all messages before `keep`.
    async fn purge(&self, keep: u64) -> anyhow::Result<u64> {
        let subject = format!("STREAM.PURGE.{}", self.stream);
        let reply: Value = ask(&self.broker.jetstream, &subject, &json!({ "seq": keep })).await??;
        reply["purged"].as_u64().with_context(|| format!("{subject}: unexpected reply"))
    }

    #[expect(clippy::cast_precision_loss, reason = "an approximation is enough")]
    fn measure(&self, bytes: u64, max_bytes: i64) {
        self.bytes.set(bytes as f64);
        self.max_bytes.set(max_bytes as f64);
    }
}

/// The first message that has to stay, however old it is.
fn limit(end: u64, published: u64, slowest: Option<&Reader>) -> u64 {
    slowest.map_or(end, |slowest| slowest.acknowledged).min(published).min(end)
}

/// The first sequence of the newest quarter, if more than half of what the stream may have is used. Estimated: as if all messages had
/// the same size.
fn in_quarter(state: &State, config: &Config) -> u64 {
    let first = state.first_sequence;
    let span = (state.last_sequence + 1).saturating_sub(first);
    let begin = |used: u64, max: i64| match u64::try_from(max) {
        Ok(max) if max > 0 && used > max / 2 => {
            let kept = u128::from(span) * u128::from(max / 4) / u128::from(used);
            first + span - u64::try_from(kept).unwrap_or(span).clamp(1, span.max(1))
        }
        _ => first,
    };
    begin(state.bytes, config.max_bytes).max(begin(state.messages, config.max_messages))
}

/// A part of the list of consumers.
#[derive(Deserialize)]
struct Page {
    total: usize,
    #[serde(default)]
    consumers: Vec<Consumer>,
    /// Those whose server does not reply.
    #[serde(default)]
    missing: Vec<String>,
}

#[derive(Deserialize)]
struct Consumer {
    name: String,
    config: ConsumerConfig,
    ack_floor: Floor,
    num_pending: u64,
    num_ack_pending: u64,
}

#[derive(Deserialize)]
struct ConsumerConfig {
    durable_name: Option<String>,
    filter_subject: Option<String>,
    #[serde(default)]
    filter_subjects: Vec<String>,
}

#[derive(Deserialize)]
struct Floor {
    stream_seq: u64,
}

impl Consumer {
    /// Returns `None` if it is not durable.
    fn reader(self, end: u64) -> Option<Reader> {
        let Self { name, config, ack_floor, num_pending, num_ack_pending } = self;
        config.durable_name?;
        let is_filtered = config.filter_subject.is_some() || !config.filter_subjects.is_empty();
        let behind = num_pending + num_ack_pending;
        let acknowledged =
            if is_filtered && behind == 0 { ack_floor.stream_seq.max(end) } else { ack_floor.stream_seq };
        Some(Reader { name, acknowledged, behind })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_consumer_or_the_relay_needs_stays() {
        let reader = |acknowledged| Reader { name: String::new(), acknowledged, behind: 0 };
        assert_eq!(limit(100, 100, None), 100);
        assert_eq!(limit(100, 100, Some(&reader(40))), 40);
        assert_eq!(limit(100, 70, Some(&reader(90))), 70, "a relay died before it committed 71 to 100");
        assert_eq!(limit(50, 100, Some(&reader(90))), 50, "the stream lost its end");
    }
}
