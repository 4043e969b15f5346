//! Writing: a change of a row and the event that announces it, committed together.
//!
//! An event exists from the commit on. What if we die … before the commit: neither row nor event exists. After it, before
//! the relay is woken: another replica, or this one after its restart, finds the row when it next looks.

use crate::connection::Transaction;
use crate::error::Result;
use crate::trace;
use event_bus_core::Publish;

/// An event as `bus.append(stream, subject, aggregate_id, version, payload, traceparent)` takes it.
///
/// For statements that write a row and append its event in one round trip. Append after the row is written: its lock
/// makes the order of the outbox the order of the versions.
#[derive(Debug)]
pub struct Outgoing {
    /// The stream of the event's type.
    pub stream: &'static str,
    /// What happened.
    pub subject: &'static str,
    /// What it happened to.
    pub aggregate_id: String,
    /// The version it announces.
    pub version: i64,
    /// The body, JSON.
    pub payload: String,
    /// The trace context of the work at hand.
    pub traceparent: Option<String>,
}

impl Outgoing {
    /// `event`, ready to be appended.
    pub fn new<E: Publish>(event: &E) -> Self {
        Self {
            stream: E::STREAM,
            subject: event.subject(),
            aggregate_id: event.aggregate_id(),
            version: event.version(),
            payload: event.encode(),
            traceparent: trace::current(),
        }
    }
}

impl Transaction {
    /// Puts `events` into the outbox, in this order; they are published after the commit.
    ///
    /// # Errors
    /// A second event for the same version of an aggregate violates a unique constraint.
    pub async fn append<'a, E: Publish>(&mut self, events: impl IntoIterator<Item = &'a E>) -> Result<()> {
        let events: Vec<_> = events.into_iter().map(Outgoing::new).collect();
        if events.is_empty() {
            return Ok(());
        }
        let subjects: Vec<&str> = events.iter().map(|event| event.subject).collect();
        let aggregates: Vec<&str> = events.iter().map(|event| event.aggregate_id.as_str()).collect();
        let versions: Vec<i64> = events.iter().map(|event| event.version).collect();
        let payloads: Vec<&str> = events.iter().map(|event| event.payload.as_str()).collect();
        sqlx::query!(
            "insert into bus.outbox (stream, subject, aggregate_id, version, payload, traceparent)
             select $1, subject, aggregate_id, version, payload, $2
             from unnest($3::text[], $4::text[], $5::bigint[], $6::text[])
                  with ordinality as events (subject, aggregate_id, version, payload, number)
             order by number",
            E::STREAM,
            trace::current(),
            &subjects as _,
            &aggregates as _,
            &versions,
            &payloads as _,
        )
        .execute(&mut **self)
        .await?;
        Ok(())
    }
}
