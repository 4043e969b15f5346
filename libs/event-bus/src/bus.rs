//! The event bus of a service: one object that starts its background work and gives it connections.

use crate::batcher::{self, Batcher, Batching, Statement};
use crate::broker::Broker;
use crate::connection::{Connection, Transaction};
use crate::copy::Copy;
use crate::database::Database;
use crate::duties::Duties;
use crate::error::{Error, Result};
use crate::fill;
use crate::measure;
use crate::meters;
use crate::owner;
use crate::relay;
use crate::replica::Replica;
use crate::republish::{self, Snapshots, Source};
use crate::request::{self, Requester};
use crate::retry::Backoff;
use crate::schema::Schema;
use crate::settings::Settings;
use crate::subscription::{self, Handler};
use crate::task::{self, Task};
use crate::topology::{Drift, PROVISIONING};
use event_bus_core::{Endpoint, Event, Publish};
use serde::{Serialize, de::DeserializeOwned};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

/// How long closing may take.
const CLOSE: Duration = Duration::from_secs(1);
/// How long readiness and subscriptions wait at the start for the first comparison of stream and database.
const COMPARE: Duration = Duration::from_secs(3);
/// How often to look whether they were compared.
const LOOK: Duration = Duration::from_millis(20);

/// A service's side of the event bus. Clones share everything.
#[derive(Clone)]
pub struct Bus {
    settings: Arc<Settings>,
    database: Database,
    broker: Broker,
    requester: Requester,
    duties: Duties,
    /// When the database was first asked.
    answered: Arc<OnceLock<Instant>>,
}

impl Bus {
    /// A bus that connects in the background: neither Postgres nor NATS needs to run yet.
    ///
    /// The database is migrated when the first relay, subscription, worker or endpoint starts. If the role may not
    /// migrate, they wait until the owner has migrated it.
    ///
    /// # Errors
    /// A malformed URL, a file that cannot be read, or a limit with which the bus cannot work.
    pub async fn open(settings: Settings, schema: Schema) -> anyhow::Result<Self> {
        settings.check()?;
        meters::describe();
        let database = Database::open(&settings, schema)?;
        let broker = Broker::connect(&settings).await?;
        let requester = Requester::new(broker.clone(), settings.reply_timeout);
        Ok(Self {
            settings: Arc::new(settings),
            database,
            broker,
            requester,
            duties: Duties::default(),
            answered: Arc::default(),
        })
    }

    /// The name of the service.
    pub fn service(&self) -> &'static str {
        self.settings.service
    }

    /// A connection for reading.
    ///
    /// # Errors
    /// An outage: no connection became free in time, or the tables are not up to date yet. The same for
    /// [`statement`](Self::statement), [`begin`](Self::begin) and [`begin_in_background`](Self::begin_in_background).
    pub async fn connection(&self) -> Result<Connection> {
        self.database.connection().await
    }

    /// A connection for a statement that writes a row and appends its event: see [`Outgoing`](crate::Outgoing).
    /// Dropping it wakes the relays.
    pub async fn statement(&self) -> Result<Connection> {
        self.database.statement().await
    }

    /// A statement that concurrent requests share: its handle, for requests, and its background task, which has to
    /// [run](Batching::run).
    pub fn batcher<S: Statement>(&self, statement: S) -> (Batcher<S>, Batching<S>) {
        let Settings { batch_items, read_items, batch_queue, .. } = *self.settings;
        batcher::new(statement, &self.database, if S::APPENDS { batch_items } else { read_items }, batch_queue)
    }

    /// A transaction of several statements.
    pub async fn begin(&self) -> Result<Transaction> {
        self.database.begin().await
    }

    /// A transaction for background work, on a connection that requests do not use.
    pub async fn begin_in_background(&self) -> Result<Transaction> {
        self.database.begin_in_background("begin").await
    }

    /// Whether requests can be served: the tables are up to date, Postgres answers within a second, and the database is not being
    /// recovered from its stream.
    ///
    /// After the start it also waits until the relays have compared the database with their streams, for at most 3 s: readiness does
    /// not depend on NATS.
    ///
    /// # Errors
    /// An outage, or [`Error::Recovering`] with the progress.
    pub async fn check_ready(&self) -> Result<()> {
        self.database.check_ready().await?;
        if self.is_compared() { Ok(()) } else { Err(Error::NotCompared) }
    }

    /// Whether the database is as new as its streams, as far as is known: compared, NATS away, or too late to wait.
    fn is_compared(&self) -> bool {
        let waited = self.answered.get_or_init(Instant::now).elapsed();
        self.duties.are_compared() || self.broker.connected().is_err() || waited > COMPARE
    }

    /// Measures the outbox, dead letters and requests that are not done, with one statement every 5 s, until `stop`.
    pub async fn measure(&self, stop: &CancellationToken) {
        measure::run(&self.database, &self.duties, stop).await;
    }

    /// Sets the gauges of what is in memory: connections, and items that wait for batchers. Call it before each scrape.
    pub fn observe(&self) {
        self.database.observe();
    }

    /// Publishes the committed events of `E`'s stream until `stop`, then the rest, until the first error.
    ///
    /// If the broker lost events of the stream, nothing more is published, and an error says what a person has to do. See
    /// [`relay_with`](Self::relay_with).
    ///
    /// A service that publishes to several streams has one relay for each. Call this for all of them before the first
    /// one is spawned: events of a stream that no relay of this process publishes are logged as an error.
    pub fn relay<E: Publish>(
        self,
        stop: CancellationToken,
    ) -> impl Future<Output = anyhow::Result<()>> + Send + 'static {
        // Now, and not when the future runs: another relay may search for streams without a relay before that.
        self.duties.relays(E::STREAM);
        async move {
            if self.prepared(&stop).await {
                let Self { database, broker, settings, duties, .. } = &self;
                relay::run(database, broker, settings, duties, E::STREAM, None, &stop).await?;
            }
            Ok(())
        }
    }

    /// The same, with the current snapshots of the tables: heals the stream if the broker lost events of it, and replies to readers
    /// that have missed events, or that are new, on the subject `snapshots.<stream>`. If the database is older than the stream, as after
    /// a restore from a backup, it takes over what it lost from the stream.
    ///
    /// A stream that was healed does not hold every version of every aggregate, but the newest one. Until the snapshots are published, readers
    /// have an older state.
    pub fn relay_with<S: Snapshots>(
        self,
        snapshots: S,
        stop: CancellationToken,
    ) -> impl Future<Output = anyhow::Result<()>> + Send + 'static {
        self.duties.relays(S::Event::STREAM);
        async move {
            if self.prepared(&stop).await {
                let Self { database, broker, settings, duties, .. } = &self;
                let source: &dyn Source = &snapshots;
                let stream = S::Event::STREAM;
                tokio::try_join!(
                    relay::run(database, broker, settings, duties, stream, Some(source), &stop),
                    republish::run(database, stream, source, &stop),
                    owner::serve(database, broker, settings, duties, stream, source, &stop),
                )?;
            }
            Ok(())
        }
    }

    /// Applies the events of `H::Event`'s stream until `stop`, as the durable consumer `durable`.
    ///
    /// A consumer that is new on a trimmed stream, or whose messages were deleted before it has acknowledged them, gets the current
    /// snapshots from the owner of the stream: the handler applies them as events.
    ///
    /// Call this for all subscriptions when the service starts: a database that is recovered gets the events of all of them again.
    pub fn subscribe<H: Handler>(
        self,
        durable: &'static str,
        handler: H,
        stop: CancellationToken,
    ) -> impl Future<Output = anyhow::Result<()>> + Send + 'static {
        self.duties.reads(H::Event::STREAM, durable);
        async move { self.apply(durable, &handler, None, &stop).await }
    }

    /// The same for a [`Replica`], which [`rebuild`](crate::rebuild) can then repair row by row. See also
    /// [`Schema::with_replica`].
    pub fn replicate<R: Replica>(
        self,
        durable: &'static str,
        replica: R,
        stop: CancellationToken,
    ) -> impl Future<Output = anyhow::Result<()>> + Send + 'static {
        self.duties.reads(R::Event::STREAM, durable);
        async move { self.apply(durable, &replica, Some(&replica), &stop).await }
    }

    async fn apply<H: Handler>(
        &self,
        durable: &'static str,
        handler: &H,
        copy: Option<&dyn Copy>,
        stop: &CancellationToken,
    ) -> anyhow::Result<()> {
        if self.prepared(stop).await {
            while !self.is_compared() && stop.run_until_cancelled(sleep(LOOK)).await.is_some() {}
            let Self { database, broker, settings, .. } = self;
            tokio::try_join!(
                subscription::run(database, broker, settings, durable, handler, stop),
                fill::run(database, broker, durable, handler, copy, stop),
            )?;
        }
        Ok(())
    }

    /// Performs the tasks of the kind `T` until `stop`, together with the other replicas. Does not need NATS.
    ///
    /// At the stop, attempts that are under way have 3 s, and results that are being stored as long as
    /// [`Settings::apply_timeout`]. Tasks that are not done by then are due at once for another replica.
    ///
    /// Call this for all kinds of tasks when the service starts: tasks of a kind that no worker of this process performs
    /// are logged as an error.
    pub fn perform<T: Task>(
        self,
        task: T,
        stop: CancellationToken,
    ) -> impl Future<Output = anyhow::Result<()>> + Send + 'static {
        self.duties.performs(T::KIND);
        async move {
            if stop.run_until_cancelled(self.database.migrate()).await.is_some() {
                task::run(self.database, self.settings, &self.duties, task, stop).await?;
            }
            Ok(())
        }
    }

    /// Sends a request to `endpoint`; one replica of its service replies. Returns `None` if the reply is "not found".
    ///
    /// # Errors
    /// No reply within [`Settings::reply_timeout`], for any reason; at once if NATS is away or no replica is there.
    /// Failures are logged from the second one in a row on, once a minute, and when they are over.
    pub async fn request<Q: Serialize, A: DeserializeOwned>(
        &self,
        endpoint: &Endpoint<Q, A>,
        body: &Q,
    ) -> anyhow::Result<Option<A>> {
        self.requester.request(endpoint, body).await
    }

    /// Replies to requests to `endpoint` until `stop`, together with the other replicas: each request goes to one of
    /// them. `find` gets a connection for reading. Begins when the tables are up to date and NATS is connected.
    pub async fn reply<Q, A, F>(
        self,
        endpoint: Endpoint<Q, A>,
        find: impl Fn(Connection, Q) -> F,
        stop: CancellationToken,
    ) -> anyhow::Result<()>
    where
        Q: DeserializeOwned,
        A: Serialize,
        F: Future<Output = anyhow::Result<Option<A>>>,
    {
        if self.prepared(&stop).await {
            request::reply(&self.database, &self.broker, &self.settings, &endpoint, find, &stop).await?;
        }
        Ok(())
    }

    /// Closes the connections. Call it after all background work has ended.
    pub async fn close(&self) {
        let _ = timeout(CLOSE, self.broker.client.drain()).await;
        let _ = timeout(CLOSE, self.database.close()).await;
    }

    /// Waits for the tables and for NATS, and provisions if the settings say so. Returns false if stopped before.
    async fn prepared(&self, stop: &CancellationToken) -> bool {
        let mut backoff = Backoff::default();
        let prepare = async {
            self.database.migrate().await;
            self.broker.wait_connected().await;
            while let Err(error) = self.broker.provision(Drift::Mend).await {
                sleep(backoff.fail(PROVISIONING, &error)).await;
            }
            backoff.succeed(PROVISIONING);
        };
        stop.run_until_cancelled(prepare).await.is_some()
    }
}
