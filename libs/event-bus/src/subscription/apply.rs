//! One transaction of a handler, and whose fault it is if it fails.

use super::{Handler, Subscription};
use crate::dead_letters::{self, Applied};
use crate::outbox::Transaction;
use crate::panics;
use crate::postgres::{is_lock_timeout, is_outage, is_statement_timeout, lock_of};
use anyhow::Context;
use async_nats::jetstream::Message;
use contracts::Event;
use std::time::Duration;
use tokio::time::timeout;

/// How long one transaction may take; far below `ack_wait`, since up to two batches wait at a time.
pub(super) const LIMIT: Duration = Duration::from_secs(10);

/// How long a statement may wait for a lock.
#[derive(Debug, Clone, Copy)]
pub(super) enum Locks {
    /// Events that have not failed yet: the lock is probably that of a request, which lasts milliseconds.
    Batch,
    /// An event by itself, with others waiting behind it.
    Single,
}

/// Why events were not applied.
pub(super) enum Failure {
    /// Postgres is away; any event would fail.
    Outage(anyhow::Error),
    /// Another transaction has locked what an event needs.
    Locked(anyhow::Error),
    /// One of the events, or what the handler does with it.
    Event(anyhow::Error),
}

impl Locks {
    fn begin(self) -> &'static str {
        match self {
            Self::Batch => "begin; set local lock_timeout = '1s'",
            Self::Single => "begin; set local lock_timeout = '100ms'",
        }
    }
}

impl<H: Handler> Subscription<'_, H> {
    pub(super) async fn apply(&self, messages: &[Message], events: &[H::Event], locks: Locks) -> Result<(), Failure> {
        let applied = self.apply_within_limit(messages, events, locks).await;
        let Err(error) = applied else { return Ok(()) };
        // What takes too long while Postgres answers others would take as long the next time.
        let timed_out = error.is::<TooSlow>() || database_errors(&error).any(is_statement_timeout);
        let lock = database_errors(&error).find(|error| is_lock_timeout(error)).map(lock_of);
        if let Some(lock) = lock {
            return Err(Failure::Locked(error.context(lock)));
        }
        let is_outage = if timed_out { !self.bus.is_ready().await } else { database_errors(&error).any(is_outage) };
        Err(if is_outage { Failure::Outage(error) } else { Failure::Event(error) })
    }

    async fn apply_within_limit(&self, messages: &[Message], events: &[H::Event], locks: Locks) -> anyhow::Result<()> {
        let applied = Applied {
            aggregates: events.iter().map(|event| event.aggregate_id().to_string()).collect(),
            versions: events.iter().map(Event::version).collect(),
            seqs: messages.iter().map(stream_sequence).collect::<anyhow::Result<_>>()?,
        };
        timeout(LIMIT, async {
            let mut tx = Transaction::begin_as(&self.bus.db, &self.bus.wake, locks.begin()).await?;
            let result = match panics::caught("the handler", self.handler.apply(&mut tx, events)).await {
                Ok(()) => {
                    let superseded = dead_letters::supersede(&mut tx, H::Event::STREAM, self.durable, &applied).await;
                    superseded.map_err(Into::into)
                }
                Err(error) => Err(error),
            };
            match result {
                Ok(()) => Ok(tx.commit().await?),
                Err(error) if database_errors(&error).any(|error| is_outage(error) && !is_lock_timeout(error)) => {
                    Err(error)
                }
                Err(error) => {
                    tx.rollback().await?;
                    Err(error)
                }
            }
        })
        .await
        .map_err(|_| TooSlow)?
    }
}

#[derive(Debug, thiserror::Error)]
#[error("applying took longer than {LIMIT:?}")]
struct TooSlow;

pub(super) fn database_errors(error: &anyhow::Error) -> impl Iterator<Item = &sqlx::Error> {
    error.chain().filter_map(|cause| cause.downcast_ref())
}

fn stream_sequence(message: &Message) -> anyhow::Result<i64> {
    let info = message.info().map_err(anyhow::Error::from_boxed).context("not a JetStream message")?;
    Ok(info.stream_sequence.try_into()?)
}
