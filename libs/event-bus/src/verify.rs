//! Verifying: a replica is compared with its owner, while both are in use. Nothing is written.
//!
//! For each range of 1,000 aggregates the owner replies with their number and a checksum. If the rows of the replica have another
//! one, snapshots and rows of the range are compared one by one. A difference counts only if it cannot be lag:
//!
//! - A row that is missing or older than the snapshot is looked at again for 5 s: the event may be on its way.
//! - A row that is newer than the snapshot, or unknown to the owner, may have been written after the owner has answered. The owner
//!   is asked again, and its answer is at least as new as the row was before: see `fill::exact`.
//! - A row with the same version and other content is always wrong.

use crate::broker::Broker;
use crate::copy::{self, Copied, Copy};
use crate::estimate::Estimate;
use crate::nats::NatsSettings;
use crate::owner::{MOST, Owner, Page};
use crate::postgres;
use crate::replica::{Difference, Differs, compare};
use crate::schema::Schema;
use crate::settings::Settings;
use crate::snapshot::Snapshot;
use anyhow::{Context, ensure};
use serde::Serialize;
use sqlx::postgres::PgPoolOptions;
use sqlx::{Connection as _, PgConnection, PgPool};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};

/// How long Postgres or NATS may be away.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often the owner is asked before its silence is an error.
const ATTEMPTS: u32 = 4;
/// How long the events of a missing or stale row may take.
const LAG: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(250);
/// How many ids of each kind of difference are reported.
const REPORTED: usize = 20;
/// How many differences are looked at again. Beyond, they count at once.
const LAGGING: usize = 10_000;
/// How many rows are in memory at a time.
const ROWS: usize = 256;

/// How a replica compares with its owner.
#[derive(Debug, Serialize)]
pub struct Verification {
    /// The stream of the owner.
    pub stream: &'static str,
    /// How many aggregates the owner has.
    pub counted: u64,
    /// How many ranges of them were compared by a checksum.
    pub ranges: u64,
    /// How many ranges had another checksum, and were compared row by row.
    pub compared: u64,
    /// Aggregates of the owner without a row.
    pub missing: Ids,
    /// Rows with an older version.
    pub stale: Ids,
    /// Rows with a newer version than the owner has.
    pub newer: Ids,
    /// Rows with the same version and other content.
    pub different: Ids,
    /// Rows of aggregates that the owner does not have.
    pub unknown: Ids,
}

/// Ids of rows that differ.
#[derive(Debug, Default, Serialize)]
pub struct Ids {
    /// How many.
    pub count: u64,
    /// The first 20 of them.
    pub first: Vec<String>,
}

impl Ids {
    fn add(&mut self, id: String) {
        self.count += 1;
        if self.first.len() < REPORTED {
            self.first.push(id);
        }
    }
}

impl Verification {
    fn new(stream: &'static str) -> Self {
        let ids = Ids::default;
        let (missing, stale, newer, different, unknown) = (ids(), ids(), ids(), ids(), ids());
        Self { stream, counted: 0, ranges: 0, compared: 0, missing, stale, newer, different, unknown }
    }

    /// Whether the replica equals its owner, apart from events on their way.
    pub fn is_equal(&self) -> bool {
        [&self.missing, &self.stale, &self.newer, &self.different, &self.unknown].iter().all(|ids| ids.count == 0)
    }

    fn add(&mut self, id: String, difference: Difference) {
        let ids = match difference {
            Difference::Missing => &mut self.missing,
            Difference::Stale => &mut self.stale,
            Difference::Newer => &mut self.newer,
            Difference::Different => &mut self.different,
            Difference::Unknown => &mut self.unknown,
        };
        ids.add(id);
    }
}

/// Compares the replicas of a service, in its database at `url`, with their owners.
///
/// Progress is logged, if it takes longer than 2 s.
///
/// # Errors
/// The service has no replica, Postgres or NATS was away for 10 s, an owner does not reply, or the database belongs to another
/// service.
pub async fn verify(url: &str, schema: &Schema, nats: NatsSettings) -> anyhow::Result<Vec<Verification>> {
    ensure!(!schema.replicas().is_empty(), "this service has no replica");
    let client = "verify".to_owned();
    let settings = Settings { client, ..Settings::new(schema.service(), url, nats) };
    let broker = Broker::connect(&settings).await?;
    timeout(PATIENCE, broker.wait_connected()).await.context("NATS is not reachable: check nats_url")?;
    let options = postgres::options(url, "verify")?;
    let db = PgPoolOptions::new().max_connections(1).acquire_timeout(PATIENCE).connect_lazy_with(options);
    let verified = all(&db, schema, &broker).await;
    db.close().await;
    verified
}

async fn all(db: &PgPool, schema: &Schema, broker: &Broker) -> anyhow::Result<Vec<Verification>> {
    schema.belongs_here(db).await?;
    let mut verified = Vec::new();
    for replica in schema.replicas() {
        let copy = &*replica.copy;
        let owner = Owner::new(broker.clone(), copy.stream(), ATTEMPTS);
        let mut verifier = Verifier { db: db.acquire().await?.detach(), copy, owner, lagging: BTreeMap::new() };
        let verification = verifier.run().await?;
        verifier.db.close().await?;
        verified.push(verification);
    }
    Ok(verified)
}

struct Verifier<'a> {
    db: PgConnection,
    copy: &'a dyn Copy,
    owner: Owner,
    /// Rows that were missing or stale, and the version that the owner has.
    lagging: BTreeMap<String, (i64, Difference)>,
}

impl Verifier<'_> {
    async fn run(&mut self) -> anyhow::Result<Verification> {
        let mut found = Verification::new(self.copy.stream());
        let (total, mut estimate, mut after) = (self.owner.total().await?, Estimate::new(0), String::new());
        loop {
            let theirs = self.owner.digest(&after, MOST).await?;
            found.ranges += 1;
            found.counted += theirs.digest.count;
            let (until, most) = (theirs.until.as_deref(), theirs.digest.count);
            let mine = copy::digest(self.copy, &mut self.db, &after, until, most).await?;
            if mine != theirs.digest {
                found.compared += 1;
                self.compare(&after, theirs.until.as_deref(), &mut found).await?;
            }
            let passed = i64::try_from(found.counted)?;
            if let Some(remaining) = estimate.due(passed, total.max(passed)) {
                tracing::info!(stream = found.stream, passed, total, remaining, "verifying");
            }
            match theirs.until {
                Some(until) => after = until,
                None => break,
            }
        }
        self.wait_for_lag(&mut found).await?;
        Ok(found)
    }

    /// Compares the rows of a range one by one.
    async fn compare(&mut self, after: &str, until: Option<&str>, found: &mut Verification) -> anyhow::Result<()> {
        let mut after = after.to_owned();
        loop {
            let Page { mut snapshots, until: mut end } = self.owner.after(&after, ROWS).await?;
            if let Some(until) = until {
                snapshots.retain(|snapshot| *snapshot.id <= *until);
                if end.as_deref().is_none_or(|end| end > until) {
                    end = Some(until.to_owned());
                }
            }
            let rows = self.copy.range(&mut self.db, &after, end.as_deref(), i64::try_from(2 * ROWS)?).await?;
            if rows.len() == 2 * ROWS {
                // There may be many more rows than aggregates.
                end = rows.last().map(|row| row.id.clone());
                snapshots.retain(|snapshot| Some(&snapshot.id) <= end.as_ref());
            }
            let theirs = self.copied(&snapshots)?;
            self.sort(compare(&theirs, &rows), &theirs, found).await?;
            match end {
                Some(end) if until != Some(&*end) => after = end,
                _ => return Ok(()),
            }
        }
    }

    fn copied(&self, snapshots: &[Snapshot]) -> anyhow::Result<Vec<Copied>> {
        let copied = |snapshot: &Snapshot| {
            let copied = self.copy.copied(snapshot);
            copied.with_context(|| format!("the snapshot {}-{} cannot be read", snapshot.id, snapshot.version))
        };
        snapshots.iter().map(copied).collect()
    }

    /// Counts the differences that are certain, and remembers those that may be lag.
    async fn sort(
        &mut self,
        differences: BTreeMap<String, Differs>,
        theirs: &[Copied],
        found: &mut Verification,
    ) -> anyhow::Result<()> {
        let mut doubts = BTreeMap::new();
        for (id, Differs { mine, difference }) in differences {
            match (difference, theirs.iter().find(|row| row.id == id)) {
                (Difference::Missing | Difference::Stale, Some(theirs)) if self.lagging.len() < LAGGING => {
                    self.lagging.insert(id, (theirs.version, difference));
                }
                (Difference::Newer | Difference::Unknown, _) => drop(doubts.insert(id, (mine, difference))),
                _ => found.add(id, difference),
            }
        }
        while !doubts.is_empty() {
            let ids: Vec<String> = doubts.keys().take(MOST).cloned().collect();
            let Page { snapshots, until } = self.owner.of(ids.clone()).await?;
            let versions: BTreeMap<&str, i64> = snapshots.iter().map(|it| (it.id.as_str(), it.version)).collect();
            for id in ids.into_iter().take_while(|id| until.as_ref().is_none_or(|until| id <= until)) {
                let Some((mine, difference)) = doubts.remove(&id) else { continue };
                if versions.get(id.as_str()).copied() < mine {
                    found.add(id, difference);
                }
            }
        }
        Ok(())
    }

    /// Waits until rows that were missing or stale are as new as the owner was, or counts them.
    async fn wait_for_lag(&mut self, found: &mut Verification) -> anyhow::Result<()> {
        let deadline = Instant::now() + LAG;
        loop {
            let ids: Vec<String> = self.lagging.keys().cloned().collect();
            for ids in ids.chunks(MOST) {
                for row in self.copy.find(&mut self.db, ids).await? {
                    if self.lagging.get(&row.id).is_some_and(|(version, _)| row.version >= *version) {
                        self.lagging.remove(&row.id);
                    }
                }
            }
            if self.lagging.is_empty() || Instant::now() >= deadline {
                break;
            }
            sleep(POLL).await;
        }
        for (id, (_, difference)) in std::mem::take(&mut self.lagging) {
            found.add(id, difference);
        }
        Ok(())
    }
}
