//! Writing: a change of a row and the event that announces it, committed together.
//!
//! What if we die …
//! - before the commit: neither row nor event exists.
//! - after the commit, before the relay is woken: the relay of another replica finds the row, or this one after its
//!   restart.

use crate::connection::Transaction;
use crate::error::Result;
use crate::headers::Headers;
use crate::trace;
use event_bus_core::Publish;

/// An event as `bus.append(stream, subject, aggregate_id, version, payload, traceparent, headers)` takes it; `headers`
/// may be left out.
///
/// For statements that write a row and append its event in one round trip. Append after the row is written: the lock of
/// the row keeps the events of an aggregate in version order in the outbox.
#[derive(Debug)]
pub struct Outgoing {
    /// The stream of the event's type.
    pub stream: &'static str,
    /// What happened.
    pub subject: &'static str,
    /// The aggregate to which it happened.
    pub aggregate_id: String,
    /// The version of the aggregate that it announces.
    pub version: i64,
    /// The body, JSON.
    pub payload: String,
    /// The trace context of the request that caused it.
    pub traceparent: Option<String>,
    /// The headers of the application.
    pub headers: Headers,
}

impl Outgoing {
    /// `event`, with the current trace context and without headers.
    pub fn new<E: Publish>(event: &E) -> Self {
        Self {
            stream: E::STREAM,
            subject: event.subject(),
            aggregate_id: event.aggregate_id(),
            version: event.version(),
            payload: event.encode(),
            traceparent: trace::current(),
            headers: Headers::default(),
        }
    }

    /// The same, with one more header.
    ///
    /// # Errors
    /// See [`Headers::insert`].
    pub fn with_header(mut self, name: &str, value: &str) -> Result<Self> {
        self.headers.insert(name, value)?;
        Ok(self)
    }
}

/// Events as arrays, as `bus.append_all(stream, subjects, aggregate_ids, versions, payloads, traceparents, headers)` takes them.
///
/// For statements that write the rows of several items and append their events: see [`Statement`](crate::Statement).
#[derive(Debug, Default)]
pub struct Columns<'a> {
    /// What happened.
    pub subjects: Vec<&'a str>,
    /// What it happened to.
    pub aggregate_ids: Vec<&'a str>,
    /// The versions they announce.
    pub versions: Vec<i64>,
    /// The bodies, JSON.
    pub payloads: Vec<&'a str>,
    /// The trace contexts.
    pub traceparents: Vec<Option<&'a str>>,
    /// The headers of the application, JSON.
    pub headers: Vec<Option<String>>,
}

impl<'a> FromIterator<&'a Outgoing> for Columns<'a> {
    fn from_iter<I: IntoIterator<Item = &'a Outgoing>>(events: I) -> Self {
        let mut columns = Self::default();
        for event in events {
            columns.subjects.push(event.subject);
            columns.aggregate_ids.push(&event.aggregate_id);
            columns.versions.push(event.version);
            columns.payloads.push(&event.payload);
            columns.traceparents.push(event.traceparent.as_deref());
            columns.headers.push(event.headers.to_json());
        }
        columns
    }
}

impl<E: Publish> From<&E> for Outgoing {
    fn from(event: &E) -> Self {
        Self::new(event)
    }
}

impl Transaction {
    /// Appends `events` to the outbox, in this order. They are published after the commit.
    ///
    /// Pass an event with headers as [`Outgoing`], and one without headers by reference.
    ///
    /// # Errors
    /// A second event for the same version of an aggregate violates a unique constraint. An aggregate id that is not 1
    /// to 200 visible ASCII characters, a body of more than 1,000,000 bytes, or headers of more than 16,000 bytes
    /// violate a check constraint: NATS would refuse the event.
    pub async fn append(&mut self, events: impl IntoIterator<Item = impl Into<Outgoing>>) -> Result<()> {
        let events: Vec<Outgoing> = events.into_iter().map(Into::into).collect();
        if events.is_empty() {
            return Ok(());
        }
        let columns: Columns = events.iter().collect();
        let streams: Vec<&str> = events.iter().map(|event| event.stream).collect();
        sqlx::query!(
            "insert into bus.outbox (stream, subject, aggregate_id, version, payload, traceparent, headers)
             select stream, subject, aggregate_id, version, payload, traceparent, headers::json
             from unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::text[], $6::text[], $7::text[])
                  with ordinality
                  as events (stream, subject, aggregate_id, version, payload, traceparent, headers, number)
             order by number",
            &streams as _,
            &columns.subjects as _,
            &columns.aggregate_ids as _,
            &columns.versions,
            &columns.payloads as _,
            &columns.traceparents as _,
            &columns.headers as _,
        )
        .execute(&mut **self)
        .await?;
        self.wake_relays();
        Ok(())
    }
}
