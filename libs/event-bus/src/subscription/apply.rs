//! One transaction of a handler, and the cause of its failure.

use super::{Handler, Received, Subscription};
use crate::dead_letters::{self, Applied};
use crate::error::{causes_in_postgres, is_lock_timeout, is_outage, is_statement_timeout, lock_of};
use crate::panics;
use anyhow::Context;
use async_nats::jetstream::Message;
use event_bus_core::Event;
use std::time::Duration;
use tokio::time::{Instant, timeout};

/// How long a statement may wait for a lock.
#[derive(Debug, Clone, Copy)]
pub(super) enum Locks {
    /// For events that have not failed yet: a lock is probably that of a request, which lasts milliseconds.
    Batch,
    /// For a single event: others wait for it.
    Single,
}

/// Why events were not applied.
pub(super) enum Failure {
    /// Postgres is away; any event would fail.
    Outage(anyhow::Error),
    /// Another transaction has locked a row that an event needs.
    Locked(anyhow::Error),
    /// One of the events, or the handler.
    Event(anyhow::Error),
}

impl Locks {
    fn begin(self) -> &'static str {
        match self {
            Self::Batch => "begin; set local lock_timeout = '1s'; select bus.require_recovered()",
            Self::Single => "begin; set local lock_timeout = '100ms'; select bus.require_recovered()",
        }
    }
}

impl<H: Handler> Subscription<'_, H> {
    pub(super) async fn apply(
        &self,
        messages: &[Message],
        events: &[Received<H::Event>],
        locks: Locks,
    ) -> Result<(), Failure> {
        let applied = self.apply_within_limit(messages, events, locks).await;
        let Err(error) = applied else { return Ok(()) };
        // If Postgres is up, a timeout is a failed attempt of the event, not an outage.
        let timed_out = error.is::<TooSlow>() || causes_in_postgres(&error).any(is_statement_timeout);
        let lock = causes_in_postgres(&error).find(|error| is_lock_timeout(error)).map(lock_of);
        if let Some(lock) = lock {
            return Err(Failure::Locked(error.context(lock)));
        }
        let is_outage = if timed_out { !self.database.answers().await } else { is_outage(&error) };
        Err(if is_outage { Failure::Outage(error) } else { Failure::Event(error) })
    }

    async fn apply_within_limit(
        &self,
        messages: &[Message],
        events: &[Received<H::Event>],
        locks: Locks,
    ) -> anyhow::Result<()> {
        let applied = Applied {
            aggregates: events.iter().map(|event| event.aggregate_id()).collect(),
            versions: events.iter().map(|event| event.version()).collect(),
            seqs: messages.iter().map(stream_sequence).collect::<anyhow::Result<_>>()?,
        };
        let (limit, begun) = (self.settings.apply_timeout, Instant::now());
        let applied_at = timeout(limit, async {
            let mut tx = self.database.begin_in_background(locks.begin()).await?;
            let result = match panics::caught("the handler", self.handler.apply(&mut tx, events)).await {
                Ok(()) => {
                    let superseded = dead_letters::supersede(&mut tx, H::Event::STREAM, self.durable, &applied).await;
                    superseded.map_err(Into::into)
                }
                Err(error) => Err(error),
            };
            tx.end(result).await
        })
        .await
        .map_err(|_| TooSlow(limit))??;
        self.meters.applied(events.len(), begun);
        self.measure_lag(messages, applied_at);
        Ok(())
    }
}

#[derive(Debug, thiserror::Error)]
#[error("applying took longer than {0:?}")]
struct TooSlow(Duration);

fn stream_sequence(message: &Message) -> anyhow::Result<i64> {
    let info = message.info().map_err(anyhow::Error::from_boxed).context("not a JetStream message")?;
    Ok(info.stream_sequence.try_into()?)
}
