//! The owner of a stream replies to requests for the current snapshots of its aggregates, over NATS' service API.
//!
//! A stream is a window: it does not hold the newest event of every aggregate. The tables of its owner do. A reader that has missed
//! events, or a new one, reads pages of snapshots from the owner (see `fill`), and `verify` compares a replica with it.
//!
//! Each replica of a service with [`Snapshots`](crate::Snapshots) replies on `snapshots.<stream>`, to one request at a time. It reads
//! committed rows, and locks none. It does not reply before its relay has compared the database with the stream: an older database would make
//! its readers older, too. So a reply is at least as new as every event that was in the stream when it was requested.
//!
//! What if we die …
//! - before the reply: the requester gets none, and requests again; another replica replies. Nothing was changed.

use crate::broker::Broker;
use crate::connection::Connection;
use crate::database::Database;
use crate::digest::Digest;
use crate::duties::Duties;
use crate::outbox::Outgoing;
use crate::republish::Source;
use crate::request::{self, Requester};
use crate::settings::Settings;
use crate::snapshot::Snapshot;
use anyhow::{Context, bail, ensure};
use event_bus_core::Endpoint;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use sqlx::PgConnection;
use std::time::Duration;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

/// How long a reply may take. The requester may hold the lock of a row of `bus.fills` meanwhile.
const LIMIT: Duration = Duration::from_secs(3);
/// The pause after a request without a reply.
const AGAIN: Duration = Duration::from_secs(1);
/// The most aggregates of a page or a digest.
pub(crate) const MOST: usize = 1000;
/// Bytes of bodies after which a page ends. An event is smaller than `max_payload` of the server, and so is a page.
const BYTES: usize = 256 << 10;
/// Aggregates that are read at a time, at first: their bodies are in memory.
const FIRST_ROWS: usize = 16;
const ROWS: usize = 256;

/// What a reader wants to know.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Query {
    /// How many aggregates there are, about.
    Total,
    /// The snapshots after this id.
    After { after: String, limit: usize },
    /// The snapshots of these ids, which are in ascending order.
    Of { ids: Vec<String> },
    /// The digest of the aggregates after this id.
    Digest { after: String, limit: usize },
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Reply {
    Total(i64),
    Page(Page),
    Digest(Digested),
}

/// Snapshots in the order of ids.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Page {
    pub(crate) snapshots: Vec<Snapshot>,
    /// The page has all aggregates that were requested up to this id; all of them, if there is none.
    pub(crate) until: Option<String>,
}

/// The digest of a range.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Digested {
    pub(crate) digest: Digest,
    /// The last id of the range; none if it has no end.
    pub(crate) until: Option<String>,
}

impl TryFrom<Outgoing> for Snapshot {
    type Error = anyhow::Error;

    fn try_from(event: Outgoing) -> anyhow::Result<Self> {
        let Outgoing { subject, aggregate_id: id, version, payload, headers, .. } = event;
        let body = RawValue::from_string(payload).with_context(|| format!("the body of {id}-{version} is not JSON"))?;
        Ok(Self { id, version, subject: subject.to_owned(), body, headers })
    }
}

fn endpoint(stream: &'static str) -> Endpoint<Query, Reply> {
    Endpoint::new(
        "snapshots",
        stream,
        "The current snapshots of a stream's aggregates, for readers that have missed events",
    )
}

/// Replies with the snapshots of `stream` until `stop`, together with the other replicas.
pub(crate) async fn serve(
    database: &Database,
    broker: &Broker,
    settings: &Settings,
    duties: &Duties,
    stream: &'static str,
    source: &dyn Source,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    // One at a time: requests of people have to be served beside it.
    let settings = Settings { reply_timeout: LIMIT, reply_concurrency: 1, ..settings.clone() };
    let reply = |mut db: Connection, query| async move {
        // An older database does not have what its readers have.
        ensure!(duties.is_compared(stream), "the relay has not compared {stream} with the database yet");
        reply(source, &mut db, query).await.map(Some)
    };
    request::reply(database, broker, &settings, &endpoint(stream), reply, stop).await
}

async fn reply(source: &dyn Source, db: &mut PgConnection, query: Query) -> anyhow::Result<Reply> {
    match query {
        Query::Total => Ok(Reply::Total(source.extent(db).await?.0)),
        Query::After { after, limit } => {
            let (ids, is_end) = ids_after(source, db, &after, limit).await?;
            page(source, db, &ids, is_end).await
        }
        Query::Of { mut ids } => {
            ensure!(ids.is_sorted(), "the ids are not in ascending order");
            let is_all = ids.len() <= MOST;
            ids.truncate(MOST);
            page(source, db, &ids, is_all).await
        }
        Query::Digest { after, limit } => {
            let (ids, is_end) = ids_after(source, db, &after, limit).await?;
            let mut digest = Digest::new();
            read(source, db, &ids, |snapshots| {
                for Outgoing { aggregate_id, version, payload, .. } in snapshots {
                    digest.add(&aggregate_id, version, &payload);
                }
                Ok(true)
            })
            .await?;
            let until = ids.last().filter(|_| !is_end).cloned();
            Ok(Reply::Digest(Digested { digest, until }))
        }
    }
}

/// The next ids, and whether there are no more.
async fn ids_after(
    source: &dyn Source,
    db: &mut PgConnection,
    after: &str,
    limit: usize,
) -> anyhow::Result<(Vec<String>, bool)> {
    let limit = limit.clamp(1, MOST);
    let mut ids = source.ids(db, after, i64::try_from(limit + 1)?).await?;
    ensure!(ids.is_sorted() && ids.first().is_none_or(|id| **id > *after), "the ids after {after:?} are not in order");
    let is_end = ids.len() <= limit;
    ids.truncate(limit);
    Ok((ids, is_end))
}

async fn page(source: &dyn Source, db: &mut PgConnection, ids: &[String], is_all: bool) -> anyhow::Result<Reply> {
    let (mut page, mut bytes) = (Vec::new(), 0);
    let mut cut = None;
    read(source, db, ids, |snapshots| {
        for snapshot in snapshots {
            bytes += snapshot.payload.len();
            if bytes > BYTES && !page.is_empty() {
                cut = page.last().map(|last: &Snapshot| last.id.clone());
                return Ok(false);
            }
            page.push(Snapshot::try_from(snapshot)?);
        }
        Ok(true)
    })
    .await?;
    let until = cut.or_else(|| ids.last().filter(|_| !is_all).cloned());
    Ok(Reply::Page(Page { snapshots: page, until }))
}

/// Reads the snapshots of `ids`, some at a time in the order of ids, as long as `take` wants more.
async fn read(
    source: &dyn Source,
    db: &mut PgConnection,
    ids: &[String],
    mut take: impl FnMut(Vec<Outgoing>) -> anyhow::Result<bool>,
) -> anyhow::Result<()> {
    let (mut rest, mut rows) = (ids, FIRST_ROWS);
    while !rest.is_empty() {
        let (now, later) = rest.split_at(rows.min(rest.len()));
        let mut snapshots = source.find(db, now).await?;
        snapshots.sort_by(|one, other| one.aggregate_id.cmp(&other.aggregate_id));
        let bytes: usize = snapshots.iter().map(|snapshot| snapshot.payload.len()).sum();
        rows = if bytes > BYTES { rows / 2 } else { rows * 2 }.clamp(1, ROWS);
        if !take(snapshots)? {
            return Ok(());
        }
        rest = later;
    }
    Ok(())
}

/// The owner of a stream, as its readers know it.
pub(crate) struct Owner {
    requester: Requester,
    stream: &'static str,
    /// How often to request, if there is no reply.
    attempts: u32,
}

impl Owner {
    pub(crate) fn new(broker: Broker, stream: &'static str, attempts: u32) -> Self {
        Self { requester: Requester::new(broker, LIMIT), stream, attempts }
    }

    /// How many aggregates it has, about.
    pub(crate) async fn total(&self) -> anyhow::Result<i64> {
        match self.request(Query::Total).await? {
            Reply::Total(total) => Ok(total),
            other => bail!("unexpected reply: {other:?}"),
        }
    }

    /// At most `limit` snapshots after an id.
    pub(crate) async fn after(&self, after: &str, limit: usize) -> anyhow::Result<Page> {
        self.page(Query::After { after: after.to_owned(), limit }).await
    }

    /// The snapshots of these ids, which are in ascending order; or of some of them, up to the end of the page.
    pub(crate) async fn of(&self, ids: Vec<String>) -> anyhow::Result<Page> {
        self.page(Query::Of { ids }).await
    }

    /// The digest of the next `limit` aggregates after an id.
    pub(crate) async fn digest(&self, after: &str, limit: usize) -> anyhow::Result<Digested> {
        match self.request(Query::Digest { after: after.to_owned(), limit }).await? {
            Reply::Digest(digested) => Ok(digested),
            other => bail!("unexpected reply: {other:?}"),
        }
    }

    async fn page(&self, query: Query) -> anyhow::Result<Page> {
        match self.request(query).await? {
            Reply::Page(page) => Ok(page),
            other => bail!("unexpected reply: {other:?}"),
        }
    }

    async fn request(&self, query: Query) -> anyhow::Result<Reply> {
        let stream = self.stream;
        let mut reply = self.requester.try_request(&endpoint(stream), &query).await;
        for _ in 1..self.attempts {
            if reply.is_ok() {
                break;
            }
            sleep(AGAIN).await;
            reply = self.requester.try_request(&endpoint(stream), &query).await;
        }
        reply.and_then(|reply| reply.context("not found")).with_context(|| {
            format!(
                "the owner of {stream} does not reply with its snapshots: is it running, does it have snapshots (`relay_with`), and \
                 may the user of NATS publish to snapshots.{stream}?"
            )
        })
    }
}
