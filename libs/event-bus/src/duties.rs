//! The streams, consumers and kinds of tasks of this process, and work that waits without a relay or a worker.
//!
//! A stream without a relay and a kind of tasks without a worker are mistakes in the code of a service that no other error
//! shows. Every 30 s one relay or worker of the process searches for them, and logs an error.

use crate::connection::Connection;
use crate::database::Database;
use crate::error::{Error, Result};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::{Instant, timeout};

/// How often to look.
const PERIOD: Duration = Duration::from_secs(30);
/// How long it may take.
const STEP: Duration = Duration::from_secs(5);

/// The streams that this process relays, and the kinds of tasks that it performs. Clones share everything.
#[derive(Clone, Debug, Default)]
pub(crate) struct Duties(Arc<Mutex<Shared>>);

#[derive(Debug, Default)]
struct Shared {
    relayed: BTreeSet<&'static str>,
    performed: BTreeSet<&'static str>,
    /// Streams of other services, and the consumers with which this process reads them.
    read: BTreeSet<(&'static str, &'static str)>,
    /// Relayed streams that were compared with the database.
    compared: BTreeSet<&'static str>,
    looked: Option<Instant>,
}

impl Duties {
    pub(crate) fn relays(&self, stream: &'static str) {
        self.change(|shared| shared.relayed.insert(stream));
    }

    pub(crate) fn performs(&self, kind: &'static str) {
        self.change(|shared| shared.performed.insert(kind));
    }

    pub(crate) fn reads(&self, stream: &'static str, consumer: &'static str) {
        self.change(|shared| shared.read.insert((stream, consumer)));
    }

    /// The streams that this process publishes to.
    pub(crate) fn relayed(&self) -> Vec<&'static str> {
        self.change(|shared| shared.relayed.iter().copied().collect())
    }

    /// The streams that this process reads, with its consumers.
    pub(crate) fn subscriptions(&self) -> Vec<(&'static str, &'static str)> {
        self.change(|shared| shared.read.iter().copied().collect())
    }

    /// The relay of `stream` has found that it ends at the position of the database.
    pub(crate) fn has_compared(&self, stream: &'static str) {
        self.change(|shared| shared.compared.insert(stream));
    }

    /// After a failure, the database or the stream may have another state.
    pub(crate) fn is_in_doubt(&self, stream: &'static str) {
        self.change(|shared| shared.compared.remove(stream));
    }

    /// Whether the relay of `stream` has compared it since the last failure.
    pub(crate) fn is_compared(&self, stream: &'static str) -> bool {
        self.change(|shared| shared.compared.contains(stream))
    }

    /// Whether all streams of this process were compared.
    pub(crate) fn are_compared(&self) -> bool {
        self.change(|shared| shared.compared.is_superset(&shared.relayed))
    }

    /// Logs events and tasks that wait without a relay or a worker in this process, at most once per [`PERIOD`].
    pub(crate) async fn look_for_forgotten(&self, database: &Database) {
        let due = self.change(|shared| {
            let is_due = shared.looked.is_none_or(|last| last.elapsed() > PERIOD);
            is_due.then(|| {
                shared.looked = Some(Instant::now());
                let names = |set: &BTreeSet<&'static str>| set.iter().copied().collect::<Vec<_>>();
                (names(&shared.relayed), names(&shared.performed))
            })
        });
        let Some((relayed, performed)) = due else { return };
        let looking = async { forgotten(&mut database.background_connection().await?, &relayed, &performed).await };
        match timeout(STEP, looking).await.unwrap_or(Err(Error::NoAnswer(STEP))) {
            Ok(()) => {}
            // The relay or the worker will say it.
            Err(error) if error.is_outage() => tracing::debug!("looking for forgotten events and tasks: {error:#}"),
            Err(error) => tracing::warn!("cannot look for events and tasks without a relay or a worker: {error:#}"),
        }
    }

    fn change<T>(&self, change: impl FnOnce(&mut Shared) -> T) -> T {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

async fn forgotten(db: &mut Connection, relayed: &[&str], performed: &[&str]) -> Result<()> {
    let streams = streams_without_relay(db, relayed).await?.join(", ");
    if !streams.is_empty() {
        tracing::error!(streams, "events wait in the outbox that no relay of this process publishes: start one");
    }
    let kinds = kinds_without_worker(db, performed).await?.join(", ");
    if !kinds.is_empty() {
        tracing::error!(kinds, "tasks are overdue that no worker of this process performs: start one");
    }
    Ok(())
}

/// Streams that are not among `relayed`, and of which an event has been waiting for 10 s. Reads the index between the
/// relayed streams only: their own part of it may hold many dead rows. Returns only the first of several streams between two relayed ones.
async fn streams_without_relay(db: &mut Connection, relayed: &[&str]) -> sqlx::Result<Vec<String>> {
    let streams = sqlx::query_scalar!(
        r#"
        with relayed as (
            select stream, lead(stream) over (order by stream) as next
            from unnest(array_append($1::text[], '')) as relayed (stream)
        )
        select forgotten.stream as "stream!"
        from relayed cross join lateral (
            (select outbox.stream, outbox.created_at from bus.outbox
             where outbox.stream > relayed.stream and outbox.stream < relayed.next
             order by outbox.stream, outbox.id limit 1)
            union all
            (select outbox.stream, outbox.created_at from bus.outbox
             where relayed.next is null and outbox.stream > relayed.stream
             order by outbox.stream, outbox.id limit 1)
        ) as forgotten
        where forgotten.created_at < now() - interval '10 seconds'
        "#,
        relayed as _,
    );
    streams.fetch_all(&mut **db).await
}

/// Kinds of tasks that are not among `performed`, and of which a task has been due for a minute.
async fn kinds_without_worker(db: &mut Connection, performed: &[&str]) -> sqlx::Result<Vec<String>> {
    let kinds = sqlx::query_scalar!(
        "select distinct kind from bus.tasks
         where status = 'pending' and due_at < now() - interval '1 minute' and kind <> all($1)",
        performed as _,
    );
    kinds.fetch_all(&mut **db).await
}
