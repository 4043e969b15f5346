//! A database, a NATS server, and any number of buses between them.

use crate::documents::{self, Document, DocumentEvent, Id, event, event_ids};
use crate::shelf::{Shelf, TABLE};
use async_nats::HeaderMap;
use event_bus::{Bus, NatsSettings, Schema, Settings, Topology};
use sqlx::migrate::Migrator;
use sqlx::{Connection, PgConnection};
use std::sync::Arc;
use std::time::Duration;
use testkit::{Nats, NatsSetup, Postgres, eventually};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

pub struct Harness {
    // Held, because the server ends when its last owner is dropped.
    postgres: Arc<Postgres>,
    pub nats: Nats,
    pub database_url: String,
    /// Whether new buses create streams and consumers.
    pub provision: bool,
    /// The streams and consumers that they create.
    pub topology: Topology,
    /// The settings of NATS of new buses, without the URL.
    pub nats_settings: NatsSettings,
    pub stop: CancellationToken,
    /// Relays and subscriptions.
    pub tasks: JoinSet<anyhow::Result<()>>,
}

impl Harness {
    pub async fn start() -> Self {
        Self::start_with(NatsSetup::default(), NatsSettings::default()).await
    }

    /// The same with another setup of NATS, and the settings to connect to it.
    pub async fn start_with(setup: NatsSetup, settings: NatsSettings) -> Self {
        let (postgres, nats) = tokio::try_join!(Postgres::shared(), Nats::start_with(setup)).unwrap();
        let database_url = postgres.database("bus").await.unwrap();
        Self {
            postgres,
            nats,
            database_url,
            provision: true,
            topology: documents::topology(),
            nats_settings: settings,
            stop: CancellationToken::new(),
            tasks: JoinSet::new(),
        }
    }

    /// The bus of a new replica, with a relay.
    pub async fn relay(&mut self) -> Bus {
        let url = self.nats.url();
        self.relay_through(&url).await
    }

    /// The bus of a new replica, with a relay that heals its stream.
    pub async fn healing_relay(&mut self, shelf: Shelf) -> Bus {
        sqlx::query(TABLE).execute(&mut self.db().await).await.unwrap();
        let bus = self.bus(&self.nats.url()).await;
        self.tasks.spawn(bus.clone().relay_with(shelf, self.stop.clone()));
        eventually("the database to be prepared", async || bus.connection().await.map(drop)).await.unwrap();
        bus
    }

    /// Stops NATS, copies what it stores, and starts it again.
    pub async fn copy_store(&self) {
        self.nats.stop().await.unwrap();
        self.nats.in_store("rm -rf copy && cp -a jetstream copy").await.unwrap();
        self.nats.start_again().await.unwrap();
    }

    /// Stops NATS, restores the copy, and starts it again.
    pub async fn restore_store(&self) {
        self.nats.stop().await.unwrap();
        self.nats.in_store("rm -rf jetstream && cp -a copy jetstream").await.unwrap();
        self.nats.start_again().await.unwrap();
    }

    /// The same, with NATS at `nats_url`.
    pub async fn relay_through(&mut self, nats_url: &str) -> Bus {
        let bus = self.bus(nats_url).await;
        self.tasks.spawn(bus.clone().relay::<DocumentEvent>(self.stop.clone()));
        eventually("the database to be prepared", async || bus.connection().await.map(drop)).await.unwrap();
        bus
    }

    /// A bus without background work.
    pub async fn bus(&self, nats_url: &str) -> Bus {
        Self::open(self.settings(nats_url)).await.unwrap()
    }

    pub async fn open(settings: Settings) -> anyhow::Result<Bus> {
        Bus::open(settings, Schema::new("test", Migrator::DEFAULT, "")).await
    }

    pub fn settings(&self, nats_url: &str) -> Settings {
        let nats = NatsSettings { url: nats_url.to_owned(), ..self.nats_settings.clone() };
        Settings {
            database_connections: 8,
            topology: self.topology.clone(),
            provision: self.provision,
            ..Settings::new("test", &self.database_url, nats)
        }
    }

    pub async fn jetstream(&self) -> async_nats::jetstream::Context {
        async_nats::jetstream::new(self.nats.connect().await.unwrap())
    }

    /// Makes the deduplication window as short as the server allows, so that it does not prevent a duplicate. Returns
    /// when it is empty.
    pub async fn forget_event_ids(&mut self) {
        const SHORTEST: Duration = Duration::from_millis(100);
        let jetstream = self.jetstream().await;
        let mut config = jetstream.get_stream("DOCUMENTS").await.unwrap().cached_info().config.clone();
        config.duplicate_window = SHORTEST;
        jetstream.update_stream(config).await.unwrap();
        self.provision = false; // a new bus would change it back
        tokio::time::sleep(SHORTEST * 3).await;
    }

    /// The ids of all events in the stream, in order.
    pub async fn stream(&self) -> Vec<String> {
        self.stream_of("DOCUMENTS").await
    }

    pub async fn stream_of(&self, name: &str) -> Vec<String> {
        self.headers_of(name, "Nats-Msg-Id").await.into_iter().map(Option::unwrap_or_default).collect()
    }

    /// The values of a header in all messages of a stream, in order.
    pub async fn headers_of(&self, stream: &str, header: &str) -> Vec<Option<String>> {
        let stream = self.jetstream().await.get_stream(stream).await.unwrap();
        let mut values = Vec::new();
        for seq in 1..=stream.cached_info().state.last_sequence {
            let message = stream.get_raw_message(seq).await.unwrap();
            values.push(message.headers.get(header).map(ToString::to_string));
        }
        values
    }

    /// The documents in the stream, in order. Skips messages that are none.
    pub async fn documents(&self) -> Vec<Document> {
        let stream = self.jetstream().await.get_stream("DOCUMENTS").await.unwrap();
        let mut documents = Vec::new();
        for seq in 1..=stream.cached_info().state.last_sequence {
            let message = stream.get_raw_message(seq).await.unwrap();
            documents.extend(serde_json::from_slice::<Document>(&message.payload).ok());
        }
        documents
    }

    /// The ids of all events in the stream, without messages that have none.
    pub async fn ours(&self) -> Vec<String> {
        self.stream().await.into_iter().filter(|id| !id.is_empty()).collect()
    }

    /// Publishes an event with this id, without a relay.
    pub async fn publish_as(&self, event_id: &str, subject: &'static str, body: impl Into<String>) {
        let mut headers = HeaderMap::new();
        headers.insert("Nats-Msg-Id", event_id);
        let jetstream = self.jetstream().await;
        jetstream.publish_with_headers(subject, headers, body.into().into()).await.unwrap().await.unwrap();
    }

    /// Commits a version of a document with a body that cannot be decoded.
    pub async fn append_garbage(&self, id: Id, version: i64) {
        let sql = "select bus.append('DOCUMENTS', 'document.updated', $1, $2, 'garbage', null)";
        sqlx::query(sql).bind(id.to_string()).bind(version).execute(&mut self.db().await).await.unwrap();
    }

    pub async fn db(&self) -> PgConnection {
        PgConnection::connect(&self.database_url).await.unwrap()
    }

    /// Dumps the database.
    pub async fn back_up(&self) {
        let name = self.database_url.rsplit('/').next().unwrap();
        self.in_postgres(&format!("pg_dump -U postgres --clean --if-exists {name} > /tmp/{name}.sql")).await;
    }

    /// Replaces the database by its dump.
    pub async fn restore(&self) {
        let name = self.database_url.rsplit('/').next().unwrap();
        self.in_postgres(&format!("psql -U postgres --quiet -1 -v ON_ERROR_STOP=1 {name} < /tmp/{name}.sql")).await;
    }

    async fn in_postgres(&self, command: &str) {
        let exec = ["exec", self.postgres.id(), "sh", "-c", command];
        let output = tokio::process::Command::new("docker").args(exec).output().await.unwrap();
        assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    }

    pub async fn outbox(&self) -> i64 {
        sqlx::query_scalar("select count(*) from bus.outbox").fetch_one(&mut self.db().await).await.unwrap()
    }

    pub async fn published(&self) {
        let empty = eventually("the outbox to be empty", async || match self.outbox().await {
            0 => Ok(()),
            waiting => Err(anyhow::anyhow!("{waiting} events wait")),
        });
        empty.await.unwrap();
    }
}

/// Commits one event per version.
pub async fn append(bus: &Bus, id: Id, versions: std::ops::Range<i64>) -> Vec<String> {
    for version in versions.clone() {
        let mut tx = bus.begin().await.unwrap();
        tx.append([&event(id, version)]).await.unwrap();
        tx.commit().await.unwrap();
    }
    event_ids(id, versions)
}
