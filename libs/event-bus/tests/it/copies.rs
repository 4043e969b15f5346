//! A replica of the documents, in a table of their reader.

use crate::documents::{Document, DocumentEvent};
use event_bus::{Copied, Handler, Publish, Received, Replica, Transaction, encode_json};
use sqlx::PgConnection;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::Semaphore;

/// The table. Its owner creates it before the first subscription.
pub const TABLE: &str = "create table if not exists copies (
    id text collate \"C\" primary key, version bigint not null, title text not null
)";

/// Keeps the table `copies`.
#[derive(Clone)]
pub struct Copies {
    /// Wrong rows are deleted for each permit.
    pub gate: Arc<Semaphore>,
    /// A range is read for each permit.
    pub reads: Arc<Semaphore>,
    /// How many ranges were to be read.
    pub begun: Arc<AtomicUsize>,
    /// Cannot be applied.
    pub refused: Option<String>,
}

impl Default for Copies {
    fn default() -> Self {
        let open = || Arc::new(Semaphore::new(Semaphore::MAX_PERMITS));
        Self { gate: open(), reads: open(), begun: Arc::default(), refused: None }
    }
}

impl Handler for Copies {
    type Event = DocumentEvent;

    async fn apply(&self, tx: &mut Transaction, events: &[Received<DocumentEvent>]) -> anyhow::Result<()> {
        let mut documents: Vec<_> = events.iter().map(|event| event.snapshot()).collect();
        documents.sort_by(|one, other| (&one.id, one.version).cmp(&(&other.id, other.version)));
        for document in documents {
            anyhow::ensure!(self.refused.as_ref() != Some(&document.id), "not this one");
            let upsert = "insert into copies as mine (id, version, title) values ($1, $2, $3)
                          on conflict (id) do update set version = excluded.version, title = excluded.title
                          where mine.version < excluded.version";
            let upsert = sqlx::query(upsert).bind(&document.id).bind(document.version).bind(&document.title);
            upsert.execute(&mut **tx).await?;
        }
        Ok(())
    }
}

impl Replica for Copies {
    fn content(event: &DocumentEvent) -> String {
        event.encode()
    }

    async fn range(
        &self,
        db: &mut PgConnection,
        after: &str,
        until: Option<&str>,
        limit: i64,
    ) -> anyhow::Result<Vec<Copied>> {
        self.begun.fetch_add(1, Ordering::Relaxed);
        self.reads.acquire().await?.forget();
        let rows = "select id, version, title from copies where id > $1 and ($2::text is null or id <= $2) order by id limit $3";
        Ok(copied(sqlx::query_as(rows).bind(after).bind(until).bind(limit).fetch_all(db).await?))
    }

    async fn find(&self, db: &mut PgConnection, ids: &[String]) -> anyhow::Result<Vec<Copied>> {
        let rows = sqlx::query_as("select id, version, title from copies where id = any($1)").bind(ids);
        Ok(copied(rows.fetch_all(db).await?))
    }

    async fn remove(&self, db: &mut PgConnection, ids: &[String], versions: &[i64]) -> anyhow::Result<()> {
        self.gate.acquire().await?.forget();
        let remove = "delete from copies using unnest($1::text[], $2::bigint[]) as wrong (id, version)
                      where copies.id = wrong.id and copies.version = wrong.version";
        sqlx::query(remove).bind(ids).bind(versions).execute(db).await?;
        Ok(())
    }
}

fn copied(rows: Vec<(String, i64, String)>) -> Vec<Copied> {
    let copied = |(id, version, title): (String, _, _)| {
        let content = encode_json(&Document { id: id.clone(), version, title });
        Copied { id, version, content }
    };
    rows.into_iter().map(copied).collect()
}
