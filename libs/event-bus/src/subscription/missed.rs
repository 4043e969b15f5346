//! Notices messages that were deleted before this consumer has acknowledged them.
//!
//! An owner never trims such messages (see `window`). A person may purge them, and a stream with a `max_age` drops them. A consumer
//! that is created on a trimmed stream never gets what was trimmed, and a new, empty database does not get what its consumer has
//! acknowledged. In each case a request to fill the tables of this reader from the
//! owner of the stream is recorded (see `fill`). If the stream has no owner with snapshots, a person has to act.
//!
//! The server does not remember it: a purge moves the position of a consumer as if it had acknowledged what is gone. So the position
//! is kept in `bus.read_positions`, at the start of each pull, every 10 s, and at the stop. Messages were missed if
//! - the first message of the stream does not follow the kept position, and
//! - the consumer has not acknowledged the first message. An owner leaves the last message that a consumer has acknowledged, so
//!   this is not true after it trimmed the stream while the kept position was old.
//!
//! While messages are delivered, a purge shows as a gap: two deliveries follow each other, none is a redelivery, and the sequences in the
//! stream do not follow each other. Not noticed is a purge under load if the deliveries before and after the gap go to two replicas.
//!
//! Filtered consumers are not checked: they skip messages.
//!
//! What if we die …
//! - after the log line, before the position is kept: the next check reports the same again, and records the same request again.
//! - and messages that were acknowledged in the last 10 s are purged by a person, or expire, before the next start: they are reported,
//!   although nothing is missing.

use super::{Handler, Subscription};
use crate::broker::Broker;
use crate::fill::request;
use anyhow::Context;
use async_nats::jetstream::Message;
use async_nats::jetstream::consumer::{DeliverPolicy, Info};
use event_bus_core::Event;
use std::time::Duration;
use tokio::time::{Instant, timeout};

/// How often to look.
const PERIOD: Duration = Duration::from_secs(10);
/// How often to look after the second time without a reply: a missing right is a line in the log of the server each time.
const SILENT: Duration = Duration::from_mins(10);
/// How long it may take.
const LIMIT: Duration = Duration::from_secs(3);

/// What is known of the deliveries of this consumer.
#[derive(Default)]
pub(super) struct Deliveries {
    /// When to look at the positions.
    due: Option<Instant>,
    /// How many times in a row there was no reply, and on which connection.
    silences: u32,
    connects: u64,
    /// Nothing is known before the first look.
    is_filtered: Option<bool>,
    /// The sequences in the stream and of the consumer of the last first delivery.
    last: Option<(u64, u64)>,
    /// Why the tables have to be filled, until the request is recorded.
    unrecorded: Option<String>,
}

impl Deliveries {
    /// Whether the consumer skips messages, as far as is known.
    pub(super) fn is_filtered(&self) -> bool {
        self.is_filtered == Some(true)
    }
}

/// The first message of the stream, and the consumer.
struct Seen {
    first: u64,
    consumer: Info,
}

impl Seen {
    /// The stream before the consumer: what the owner has trimmed by then, the consumer has acknowledged now.
    async fn look(broker: &Broker, stream: &str, durable: &str) -> anyhow::Result<Self> {
        let stream = broker.jetstream.get_stream(stream).await.context("cannot read the stream")?;
        let consumer = stream.consumer_info(durable).await.context("cannot read the consumer")?;
        Ok(Self { first: stream.cached_info().state.first_sequence, consumer })
    }

    fn acknowledged(&self) -> u64 {
        self.consumer.ack_floor.stream_sequence
    }

    /// Whether it has to get all messages.
    fn wants_all(&self) -> bool {
        self.consumer.config.deliver_policy == DeliverPolicy::All
    }

    fn is_filtered(&self) -> bool {
        let config = &self.consumer.config;
        !config.filter_subject.is_empty() || !config.filter_subjects.is_empty()
    }
}

impl<H: Handler> Subscription<'_, H> {
    /// Looks for missed messages, if it is time. `now`: deliveries are about to begin.
    pub(super) async fn look_for_missed(&mut self, now: bool) {
        let connects = self.broker.connects();
        if connects != self.deliveries.connects {
            // Its rights may be others, or the server.
            (self.deliveries.connects, self.deliveries.silences, self.deliveries.due) = (connects, 0, None);
        }
        let is_due =
            self.deliveries.due.is_none_or(|due| Instant::now() >= due) || now && self.deliveries.silences == 0;
        if !is_due || self.broker.connected().is_err() {
            return;
        }
        let outcome = timeout(LIMIT, self.compare()).await;
        self.deliveries.silences = if outcome.is_err() { self.deliveries.silences + 1 } else { 0 };
        // The first time may have been a short outage.
        self.deliveries.due = Some(Instant::now() + if self.deliveries.silences < 2 { PERIOD } else { SILENT });
        let (stream, durable) = (H::Event::STREAM, self.durable);
        match outcome {
            Ok(Ok(())) => {}
            // The pull or the handler reports an outage, or a consumer that does not exist.
            Ok(Err(error)) => tracing::debug!(stream, consumer = durable, "cannot look for missed events: {error:#}"),
            Err(_) if self.deliveries.silences != 2 => {}
            Err(_) => tracing::warn!(
                stream,
                consumer = durable,
                "cannot look for events that were deleted before they were read: no reply. If the user of NATS may not publish to \
                 $JS.API.STREAM.INFO.{stream} and $JS.API.CONSUMER.INFO.{stream}.{durable}, grant these rights. Tried again every \
                 10 minutes"
            ),
        }
    }

    async fn compare(&mut self) -> anyhow::Result<()> {
        let (stream, durable) = (H::Event::STREAM, self.durable);
        let seen = Seen::look(self.broker, stream, durable).await?;
        self.measure_consumer(&seen.consumer);
        self.deliveries.is_filtered = Some(seen.is_filtered());
        if seen.is_filtered() {
            return Ok(());
        }
        self.record_missed().await?;
        let mut db = self.database.background_connection().await?;
        let kept = sqlx::query_scalar!(
            "select seq from bus.read_positions where stream = $1 and consumer = $2",
            stream,
            durable,
        );
        let kept = kept.fetch_optional(&mut *db).await?.map(u64::try_from).transpose()?;
        let acknowledged = seen.acknowledged();
        match kept {
            // Deleted, or applied in a database that is gone.
            None if seen.wants_all() && H::HAS_OWNER && (seen.first > 1 || acknowledged > 0) => self.begin_with_owner(),
            None if seen.wants_all() && !H::HAS_OWNER && seen.first > acknowledged + 1 => {
                self.report(1, seen.first - 1);
            }
            Some(kept) if seen.first > kept + 1 && acknowledged < seen.first => self.report(kept + 1, seen.first - 1),
            _ => {}
        }
        self.record_missed().await?;
        // Not before the first message: the server may move the position of a consumer later than it deletes messages.
        let position = acknowledged.max(seen.first.saturating_sub(1));
        let keep = sqlx::query!(
            "insert into bus.read_positions (stream, consumer, seq) values ($1, $2, $3)
             on conflict (stream, consumer) do update
             set seq = excluded.seq,
                 before_seq = case when read_positions.between_at < now() - interval '2 minutes'
                                   then read_positions.between_seq else read_positions.before_seq end,
                 between_seq = case when read_positions.between_at < now() - interval '2 minutes'
                                    then read_positions.seq else read_positions.between_seq end,
                 between_at = case when read_positions.between_at < now() - interval '2 minutes'
                                   then now() else read_positions.between_at end
             where read_positions.seq <> excluded.seq",
            stream,
            durable,
            i64::try_from(position)?,
        );
        keep.execute(&mut *db).await?;
        Ok(())
    }

    /// Reports a gap between two deliveries that follow each other.
    pub(super) async fn look_for_gaps(&mut self, batch: &[Message]) {
        if self.deliveries.is_filtered != Some(false) {
            return;
        }
        for message in batch {
            let Ok(info) = message.info() else { continue };
            if info.delivered != 1 {
                continue;
            }
            let last = self.deliveries.last.replace((info.stream_sequence, info.consumer_sequence));
            if let Some((seq, number)) = last
                && number + 1 == info.consumer_sequence
                && seq + 1 < info.stream_sequence
            {
                self.report(seq + 1, info.stream_sequence - 1);
            }
        }
        if let Err(error) = self.record_missed().await {
            // Tried again with the next look.
            tracing::debug!(stream = H::Event::STREAM, "cannot record that events were missed: {error:#}");
        }
    }

    /// Records the request to fill the tables, if there is one.
    async fn record_missed(&mut self) -> anyhow::Result<()> {
        if let Some(reason) = &self.deliveries.unrecorded {
            let mut db = self.database.background_connection().await?;
            request::record(&mut db, H::Event::STREAM, self.durable, reason, false).await?;
            self.deliveries.unrecorded = None;
        }
        Ok(())
    }

    fn begin_with_owner(&mut self) {
        let (stream, consumer) = (H::Event::STREAM, self.durable);
        tracing::info!(stream, consumer, "a new reader of {stream}: the current state comes from its owner");
        self.deliveries.unrecorded = Some("a new reader".to_owned());
    }

    fn report(&mut self, from: u64, to: u64) {
        let (stream, consumer) = (H::Event::STREAM, self.durable);
        self.meters.missed.increment(to - from + 1);
        if H::HAS_OWNER {
            self.deliveries.unrecorded = Some(format!("the messages {from} to {to} were missed"));
            return tracing::error!(
                stream,
                consumer,
                from,
                to,
                "{stream} has lost the messages {from} to {to} before {consumer} acknowledged them: what they announced may be missing \
                 here, until the current state has come from the owner of {stream}"
            );
        }
        tracing::error!(
            stream,
            consumer,
            from,
            to,
            "{stream} has lost the messages {from} to {to} before {consumer} acknowledged them: what they announced may be missing \
             here. Have them published again by the service that publishes to {stream}"
        );
    }
}
