//! The service's database: its tables, and connections for the two kinds of work.

use crate::backpressure::Backpressure;
use crate::connection::{Connection, Pool, Transaction, Wakes};
use crate::error::{Error, Result};
use crate::postgres;
use crate::recovery;
use crate::retry::Backoff;
use crate::schema::Schema;
use crate::settings::Settings;
use sqlx::Connection as _;
use sqlx::postgres::{PgConnectOptions, PgRow};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{OnceCell, watch};
use tokio::time::{sleep, timeout};

/// How long the readiness check may take.
const READY: Duration = Duration::from_secs(1);

/// Functions that set gauges.
type Observers = Arc<Mutex<Vec<Box<dyn Fn() + Send>>>>;

/// The service's database. Clones share everything.
#[derive(Clone)]
pub(crate) struct Database {
    requests: Pool,
    background: Pool,
    wakes: Wakes,
    backpressure: Backpressure,
    /// What else sets gauges before a scrape.
    observers: Observers,
    options: PgConnectOptions,
    connection_timeout: Duration,
    schema: Arc<Schema>,
    migrated: Arc<OnceCell<()>>,
}

impl Database {
    /// Connects on first use: Postgres may start later.
    pub(crate) fn open(settings: &Settings, schema: Schema) -> anyhow::Result<Self> {
        let options = postgres::options(&settings.database_url, &settings.client)?;
        let pool = |name, connections| Pool::new(name, options.clone(), connections, settings.connection_timeout);
        Ok(Self {
            requests: pool("requests", settings.database_connections),
            background: pool("background", settings.background_connections),
            wakes: Wakes::default(),
            backpressure: Backpressure::default(),
            observers: Observers::default(),
            schema: Arc::new(schema),
            migrated: Arc::default(),
            options,
            connection_timeout: settings.connection_timeout,
        })
    }

    /// Migrates the tables of the bus and of the service, and tries until this succeeds. Safe to call from several
    /// replicas at once.
    pub(crate) async fn migrate(&self) {
        let what = "preparing the database";
        let migrate = async || {
            let mut backoff = Backoff::slow();
            while let Err(error) = self.schema.prepare(&self.options).await {
                sleep(backoff.fail(what, &error)).await;
            }
            backoff.succeed(what);
        };
        self.migrated.get_or_init(migrate).await;
    }

    /// A connection for requests, on which each statement commits by itself.
    pub(crate) async fn connection(&self) -> Result<Connection> {
        self.migrated()?.requests.acquire().await
    }

    /// A connection for requests that wakes the relays when it is dropped.
    pub(crate) async fn statement(&self) -> Result<Connection> {
        Ok(self.connection().await?.waking(&self.wakes.relays))
    }

    /// The connection of one batcher. A batch does not wait long, for a lock or at all, and looks rows up in an index whatever
    /// the statistics of a young table say.
    pub(crate) fn batch_pool(&self) -> Pool {
        let batches = [("lock_timeout", "200ms"), ("statement_timeout", "2s"), ("enable_seqscan", "off")];
        Pool::new("batches", self.options.clone().options(batches), 1, self.connection_timeout)
    }

    /// From a [`batch_pool`](Self::batch_pool).
    pub(crate) async fn batch_connection(&self, pool: &Pool) -> Result<Connection> {
        self.migrated()?;
        pool.acquire().await
    }

    /// For what is committed on the connection of a batcher.
    pub(crate) fn wake_relays(&self) {
        self.wakes.relays.all();
    }

    /// Whether batches of writes have to wait for the relays of this process.
    pub(crate) fn backpressure(&self) -> &Backpressure {
        &self.backpressure
    }

    /// A transaction for requests.
    pub(crate) async fn begin(&self) -> Result<Transaction> {
        Transaction::begin(self.connection().await?, &self.wakes, "begin").await
    }

    /// A connection for background work.
    pub(crate) async fn background_connection(&self) -> Result<Connection> {
        self.migrated()?.background.acquire().await
    }

    /// A transaction for background work. `begin` is the statement `begin`, with settings for this transaction.
    pub(crate) async fn begin_in_background(&self, begin: &'static str) -> Result<Transaction> {
        Transaction::begin(self.background_connection().await?, &self.wakes, begin).await
    }

    /// A transaction on `connection`, and the rows of its first statement: see [`Transaction::begin_with`].
    pub(crate) async fn begin_with(&self, connection: Connection, first: &str) -> Result<(Transaction, Vec<PgRow>)> {
        Transaction::begin_with(connection, &self.wakes, first).await
    }

    /// Changes with every commit that may have appended events.
    pub(crate) fn commits(&self) -> watch::Receiver<u64> {
        self.wakes.relays.subscribe()
    }

    /// Changes with every commit that scheduled tasks.
    pub(crate) fn scheduled(&self) -> watch::Receiver<u64> {
        self.wakes.workers.subscribe()
    }

    /// Whether the tables are up to date and Postgres answers within a second.
    pub(crate) async fn answers(&self) -> bool {
        let answer = async { self.background_connection().await?.ping().await.map_err(Error::from) };
        timeout(READY, answer).await.is_ok_and(|answer| answer.is_ok())
    }

    /// The same, and whether the database is not being recovered.
    pub(crate) async fn check_ready(&self) -> Result<()> {
        // On a background connection: a replica whose request connections are busy is still ready.
        let progress = async { Ok(recovery::progress(&mut self.background_connection().await?).await?) };
        let progress = timeout(READY, progress).await.unwrap_or(Err(Error::NoAnswer(READY)))?;
        progress.map_or(Ok(()), |progress| Err(Error::Recovering(progress)))
    }

    /// Sets the gauges of connections, and those of `on_observe`.
    pub(crate) fn observe(&self) {
        self.requests.observe();
        self.background.observe();
        self.observers.lock().unwrap_or_else(PoisonError::into_inner).iter().for_each(|observe| observe());
    }

    /// Calls `observe` before each scrape.
    pub(crate) fn on_observe(&self, observe: impl Fn() + Send + 'static) {
        self.observers.lock().unwrap_or_else(PoisonError::into_inner).push(Box::new(observe));
    }

    pub(crate) async fn close(&self) {
        tokio::join!(self.requests.close(), self.background.close());
    }

    fn migrated(&self) -> Result<&Self> {
        if self.migrated.initialized() { Ok(self) } else { Err(Error::NotMigrated) }
    }
}
