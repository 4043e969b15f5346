//! Applies events again to a database that came back older: see `recovery`.
//!
//! The consumer has acknowledged these events, so the server does not deliver them again. They are read from the stream: those after the
//! position that the reader had two to four minutes before it last kept one, up to the last one that was delivered. If the handler allows
//! it, they are applied from the newest to the oldest: then older ones change nothing, and no state appears a second time.
//!
//! An event that fails alone becomes a dead letter at once.
//!
//! What if we die …
//! - during a page: Postgres rolls it back, and unlocks the row of `bus.recovery_reads`. Another replica repeats the page.
//! - after the last page: its row is deleted. The relay deletes the mark when no row is left.

use super::messages::decode;
use super::{Handler, Received, Subscription};
use crate::broker::Reader;
use crate::connection::Transaction;
use crate::dead_letters::{self, Applied, FailedAttempt, Letter};
use crate::error::{causes_in_postgres, is_lock_timeout, is_outage};
use crate::fill::request;
use crate::headers::Headers;
use crate::recovery::{self, BEGIN};
use crate::retry::Backoff;
use anyhow::Context;
use async_nats::header;
use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::stream::Stream;
use event_bus_core::Event;
use std::time::Duration;
use tokio::time::sleep;

/// How often to look while there is nothing to do.
const LOOK: Duration = Duration::from_millis(250);

enum Step {
    /// No recovery is under way.
    Recovered,
    /// The tables do not have all of their own stream yet, or another replica or subscription works.
    Nothing,
    /// A page was applied.
    Page,
}

/// The sequences that are left: those after `after`, up to `until`.
#[derive(Clone, Copy)]
struct Left {
    after: u64,
    until: u64,
}

impl Left {
    /// The sequences of the next page, at most `most`.
    fn page(self, newest_first: bool, most: usize) -> Vec<u64> {
        let seqs = self.after + 1..=self.until;
        if newest_first { seqs.rev().take(most).collect() } else { seqs.take(most).collect() }
    }

    /// What is left after so many sequences.
    fn without(self, passed: u64, newest_first: bool) -> Self {
        let Self { after, until } = self;
        if newest_first { Self { after, until: until - passed } } else { Self { after: after + passed, until } }
    }
}

/// Messages with events, and those without.
struct Page<E> {
    messages: Vec<StreamMessage>,
    events: Vec<Received<E>>,
    poison: Vec<(StreamMessage, String)>,
    /// How many sequences were looked at.
    passed: u64,
}

impl<H: Handler> Subscription<'_, H> {
    /// Waits while the database is being recovered, and applies events again when the tables have all of their own stream.
    pub(super) async fn reapply(&self) {
        let what = format!("applying {} to a recovered database", H::Event::STREAM);
        let mut backoff = Backoff::default();
        let mut is_recovering = false;
        let mut reader = Reader::new(self.settings.apply_bytes);
        while !self.stop.is_cancelled() {
            let pause = match self.reapply_page(&mut reader).await {
                Ok(Step::Recovered) => break,
                Ok(Step::Nothing) => LOOK,
                Ok(Step::Page) => Duration::ZERO,
                // Probably there is no recovery. Otherwise the handler will report an outage, and this function is called again.
                Err(error) if !is_recovering && is_outage(&error) => {
                    tracing::debug!("{what}: {error:#}");
                    break;
                }
                Err(error) => backoff.fail(&what, &error),
            };
            is_recovering = true;
            self.stop.run_until_cancelled(sleep(pause)).await;
        }
    }

    async fn reapply_page(&self, reader: &mut Reader) -> anyhow::Result<Step> {
        let mut db = self.database.background_connection().await?;
        // Every idle subscription looks: no transaction.
        let walked = sqlx::query_scalar!("select bool_and(walked) from bus.recovery").fetch_one(&mut *db).await?;
        drop(db);
        match walked {
            None => return Ok(Step::Recovered),
            Some(false) => return Ok(Step::Nothing),
            Some(true) => {}
        }
        let mut tx = self.database.begin_in_background(BEGIN).await?;
        let read = sqlx::query!(
            "select after_seq, until_seq from bus.recovery_reads where stream = $1 and consumer = $2 for update skip locked",
            H::Event::STREAM,
            self.durable,
        );
        let Some(read) = read.fetch_optional(&mut *tx).await? else {
            tx.rollback().await?;
            return Ok(Step::Nothing);
        };
        let (stream, durable) = (H::Event::STREAM, self.durable);
        let stream = self.broker.jetstream.get_stream(stream).await.with_context(|| format!("cannot read {stream}"))?;
        let after = u64::try_from(read.after_seq)?;
        let left = match read.until_seq {
            Some(until) => Left { after, until: u64::try_from(until)? },
            None => self.begin(&mut tx, &stream, after).await?,
        };
        if left.after >= left.until {
            recovery::end_read(&mut tx, H::Event::STREAM, durable).await?;
            tx.commit().await?;
            tracing::info!(
                stream = H::Event::STREAM,
                consumer = durable,
                "the events of another stream are applied again"
            );
            return Ok(Step::Page);
        }
        let page = self.read(reader, &stream, &left.page(H::NEWEST_FIRST, self.settings.apply_events)).await?;
        let next = left.without(page.passed, H::NEWEST_FIRST);
        match self.apply_again(&mut tx, &page.messages, &page.events).await {
            Ok(()) => {}
            Err(error) => {
                tx.rollback().await?;
                passes(&error)?;
                for (message, event) in page.messages.iter().zip(&page.events) {
                    self.apply_again_alone(message, event).await?;
                }
                tx = self.database.begin_in_background(BEGIN).await?;
            }
        }
        for (message, error) in &page.poison {
            self.bury(message, error).await?;
        }
        // Another replica may have been here in between.
        let passed = sqlx::query!(
            "update bus.recovery_reads set after_seq = $3, until_seq = $4, passed = passed + $5
             where stream = $1 and consumer = $2 and after_seq = $6 and until_seq is not distinct from $7",
            H::Event::STREAM,
            durable,
            i64::try_from(next.after)?,
            i64::try_from(next.until)?,
            i64::try_from(page.passed)?,
            read.after_seq,
            read.until_seq,
        );
        passed.execute(&mut *tx).await?;
        tx.commit().await?;
        Ok(Step::Page)
    }

    /// What is applied again: from the kept position to the last delivered message.
    async fn begin(&self, tx: &mut Transaction, stream: &Stream, after: u64) -> anyhow::Result<Left> {
        let (name, consumer) = (H::Event::STREAM, self.durable);
        let info = stream.consumer_info(consumer).await.context("cannot read the consumer")?;
        let (first, until) = (stream.cached_info().state.first_sequence, info.delivered.stream_sequence);
        if first > after + 1 && H::HAS_OWNER {
            request::record(tx, name, consumer, "messages that were applied after the backup are deleted", false)
                .await?;
        } else if first > after + 1 {
            tracing::error!(
                stream = name,
                consumer,
                from = after + 1,
                to = first - 1,
                "{name} has lost messages that were applied after the backup: what they announced may be missing here"
            );
        }
        let after = after.max(first.saturating_sub(1));
        tracing::info!(stream = name, consumer, after, until, "applying the events of another stream again");
        Ok(Left { after, until })
    }

    /// Reads messages until they have as many bytes as a request to the consumer.
    async fn read(&self, reader: &mut Reader, stream: &Stream, seqs: &[u64]) -> anyhow::Result<Page<H::Event>> {
        let mut page = Page { messages: Vec::new(), events: Vec::new(), poison: Vec::new(), passed: 0 };
        let (mut bytes, mut rest) = (0, seqs);
        while bytes < self.settings.apply_bytes && !rest.is_empty() {
            let messages = reader.read(stream, rest.iter().copied()).await.with_context(|| {
                let name = H::Event::STREAM;
                format!("the user of NATS needs the right to publish to $JS.API.STREAM.MSG.GET.{name}")
            })?;
            page.passed += u64::try_from(messages.len())?;
            rest = &rest[messages.len()..];
            for message in messages.into_iter().flatten() {
                bytes += message.payload.len();
                self.sort(message, &mut page);
            }
        }
        Ok(page)
    }

    fn sort(&self, message: StreamMessage, page: &mut Page<H::Event>) {
        match decode::<H::Event>(&message.subject, &message.payload) {
            Ok(event) => {
                page.events.push(Received { event, headers: Headers::of_message(Some(&message.headers)) });
                page.messages.push(message);
            }
            // The filter of a consumer excludes it.
            Err(_) if self.deliveries.is_filtered() => {}
            Err(error) => page.poison.push((message, error)),
        }
    }

    async fn apply_again(
        &self,
        tx: &mut Transaction,
        messages: &[StreamMessage],
        events: &[Received<H::Event>],
    ) -> anyhow::Result<()> {
        if events.is_empty() {
            return Ok(());
        }
        let applied = Applied {
            aggregates: events.iter().map(|event| event.aggregate_id()).collect(),
            versions: events.iter().map(|event| event.version()).collect(),
            seqs: messages.iter().map(|message| i64::try_from(message.sequence)).collect::<Result<_, _>>()?,
        };
        crate::panics::caught("the handler", self.handler.apply(tx, events)).await?;
        dead_letters::supersede(tx, H::Event::STREAM, self.durable, &applied).await?;
        Ok(())
    }

    async fn apply_again_alone(&self, message: &StreamMessage, event: &Received<H::Event>) -> anyhow::Result<()> {
        let mut tx = self.database.begin_in_background(BEGIN).await?;
        let applied = self.apply_again(&mut tx, std::slice::from_ref(message), std::slice::from_ref(event)).await;
        let Err(error) = tx.end(applied).await else { return Ok(()) };
        passes(&error)?;
        self.bury(message, &format!("{error:#}")).await
    }

    /// Stores a dead letter.
    async fn bury(&self, message: &StreamMessage, error: &str) -> anyhow::Result<()> {
        let event_id = message.headers.get(header::NATS_MESSAGE_ID).map(ToString::to_string);
        let letter = Letter {
            stream: H::Event::STREAM,
            consumer: self.durable,
            seq: message.sequence,
            published: message.time,
            subject: &message.subject,
            payload: &message.payload,
            headers: Some(&message.headers),
        };
        let attempt = FailedAttempt { letter, event_id: event_id.as_deref(), error, retryable: false };
        let mut db = self.database.background_connection().await?;
        dead_letters::record(&mut db, &attempt, self.settings.attempts).await?;
        tracing::error!(subject = %message.subject, event_id, error, "an event became a dead letter");
        self.meters.dead_letters.increment(1);
        Ok(())
    }
}

/// Returns the error if it is not that of an event: an outage, or a lock.
fn passes(error: &anyhow::Error) -> anyhow::Result<()> {
    let is_locked = causes_in_postgres(error).any(is_lock_timeout);
    anyhow::ensure!(!is_locked && !is_outage(error), "cannot apply events again: {error:#}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_cover_what_is_left_once_in_either_direction() {
        for newest_first in [true, false] {
            let (mut left, mut seen) = (Left { after: 10, until: 300 }, Vec::<u64>::new());
            while left.after < left.until {
                let seqs = left.page(newest_first, 64);
                // A page may be cut.
                let passed = seqs.len().div_ceil(2);
                seen.extend(&seqs[..passed]);
                left = left.without(passed as u64, newest_first);
            }
            if newest_first {
                seen.reverse();
            }
            assert_eq!(seen, (11..=300).collect::<Vec<_>>());
        }
    }
}
