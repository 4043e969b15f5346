//! The table of documents, and their snapshots.

use crate::documents::{Document, DocumentEvent, Id, event};
use event_bus::{Bus, Outgoing, Snapshots};
use sqlx::PgConnection;
use sqlx::types::time::OffsetDateTime;

/// The table. Its owner creates it before the first relay.
pub const TABLE: &str = "create table if not exists documents (
    id text collate \"C\" primary key, version bigint not null, title text not null,
    updated_at timestamptz not null default now()
)";

pub struct Shelf;

impl Snapshots for Shelf {
    type Event = DocumentEvent;

    async fn extent(&self, db: &mut PgConnection) -> anyhow::Result<(i64, String)> {
        Ok(sqlx::query_as("select count(*), coalesce(max(id), '') from documents").fetch_one(db).await?)
    }

    async fn ids(&self, db: &mut PgConnection, after: &str, limit: i64) -> anyhow::Result<Vec<String>> {
        let ids = sqlx::query_scalar("select id from documents where id > $1 order by id limit $2");
        Ok(ids.bind(after).bind(limit).fetch_all(db).await?)
    }

    async fn find(&self, db: &mut PgConnection, ids: &[String]) -> anyhow::Result<Vec<Outgoing>> {
        let rows = sqlx::query_as("select id, version, title from documents where id = any($1)").bind(ids);
        Ok(announcements(rows.fetch_all(db).await?))
    }

    async fn lock(
        &self,
        db: &mut PgConnection,
        ids: &[String],
        since: Option<OffsetDateTime>,
    ) -> anyhow::Result<Vec<Outgoing>> {
        let rows = sqlx::query_as::<_, (String, i64, String)>(
            "select id, version, title from documents
             where id = any($1) and updated_at >= coalesce($2, timestamptz '-infinity') order by id for no key update",
        );
        Ok(announcements(rows.bind(ids).bind(since).fetch_all(db).await?))
    }

    /// Titles that begin with "only " are unique, as the tickets of live orders are.
    async fn take_over(&self, db: &mut PgConnection, events: &[DocumentEvent]) -> anyhow::Result<Vec<String>> {
        let mut withdrawn = Vec::new();
        for event in events {
            let Document { id, title, .. } = event.snapshot();
            let others = "delete from documents where title = $1 and title like 'only %' and id <> $2 returning id";
            withdrawn.extend(sqlx::query_scalar(others).bind(title).bind(id).fetch_all(&mut *db).await?);
            overwrite(db, event).await?;
        }
        Ok(withdrawn)
    }
}

/// Writes a document as it was published.
async fn overwrite(db: &mut PgConnection, event: &DocumentEvent) -> anyhow::Result<()> {
    let Document { id, version, title } = event.snapshot();
    let upsert = "insert into documents (id, version, title) values ($1, $2, $3)
                  on conflict (id) do update set version = $2, title = $3, updated_at = now()";
    sqlx::query(upsert).bind(id).bind(version).bind(title).execute(db).await?;
    Ok(())
}

fn announcements(rows: Vec<(String, i64, String)>) -> Vec<Outgoing> {
    let announcement = |(id, version, title)| {
        let document = Document { id, version, title };
        Outgoing::new(&if version == 0 { DocumentEvent::Created(document) } else { DocumentEvent::Updated(document) })
    };
    rows.into_iter().map(announcement).collect()
}

/// Commits the first versions of documents.
pub async fn put(bus: &Bus, ids: &[Id]) {
    for ids in ids.chunks(50) {
        let mut tx = bus.begin().await.unwrap();
        for id in ids {
            write(&mut tx, *id, 0).await;
        }
        let events: Vec<_> = ids.iter().map(|id| event(*id, 0)).collect();
        tx.append(&events).await.unwrap();
        tx.commit().await.unwrap();
    }
}

/// Commits a version of a document.
pub async fn change(bus: &Bus, id: Id, version: i64) {
    let mut tx = bus.begin().await.unwrap();
    write(&mut tx, id, version).await;
    tx.append([&event(id, version)]).await.unwrap();
    tx.commit().await.unwrap();
}

/// Commits a version of a document with another title.
pub async fn entitle(bus: &Bus, id: Id, version: i64, title: &str) {
    let mut event = event(id, version);
    title.clone_into(&mut event.document().title);
    let mut tx = bus.begin().await.unwrap();
    overwrite(&mut tx, &event).await.unwrap();
    tx.append([&event]).await.unwrap();
    tx.commit().await.unwrap();
}

/// Writes the row of a version, in a transaction.
pub async fn write(db: &mut PgConnection, id: Id, version: i64) {
    overwrite(db, &event(id, version)).await.unwrap();
}
