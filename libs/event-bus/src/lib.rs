//! The event bus between services: outbox → JetStream → subscription.
//!
//! A change commits as a row and an event in one Postgres transaction ([`Bus::begin`], [`Bus::statement`]). A relay
//! publishes committed events to the service's stream, each exactly once and per aggregate in version order, whatever
//! crashes and however many replicas relay. A subscription ([`Handler`]) applies the events of another service's
//! stream: each at least once, acknowledged only after its effect is committed or after it is safely a dead letter.
//!
//! Guaranteed: no committed event is lost, doubled in the stream, or published before an older version of its aggregate.
//! Not guaranteed: that a handler sees an event once, or in order. Handlers compare versions instead.
//!
//! Beside events there are questions ([`Bus::ask`], [`Bus::answer`]), for what cannot wait for an event and can be done
//! without: they are answered within 300 ms or not at all.
//!
//! The only crate that knows NATS. Read `outbox`, `relay`, `subscription`, `pull`, `dead_letters`, `request`, in this
//! order.
#![warn(missing_docs)]

mod dead_letters;
mod nats;
mod outbox;
mod panics;
pub mod postgres;
mod pull;
mod relay;
mod request;
mod retry;
mod schema;
mod subscription;
mod topology;
pub mod trace;

pub use nats::{Authentication, NatsSettings};
pub use outbox::{Connection, Outgoing, Transaction};
pub use panics::panic_message;
pub use retry::Backoff;
pub use schema::{Schema, migrate};
pub use subscription::Handler;
pub use topology::{Topology, TopologyError, provision};

use contracts::{Endpoint, Event, Id};
use outbox::Wake;
use serde::{Serialize, de::DeserializeOwned};
use sqlx::{Connection as _, PgPool};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::OnceCell;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use topology::{Drift, Provisioner};

/// Connections for the relay, the subscriptions, a service's own work in the background, answers to other services, and the
/// question whether Postgres is there, apart from those for requests, so that neither starves the other.
const CONNECTIONS: u32 = 8;

/// How often to look whether NATS is there, at the start.
const CONNECTING: Duration = Duration::from_millis(50);

/// How long Postgres may take to show that it is there.
const READY: Duration = Duration::from_secs(1);

/// What a bus needs to know.
#[derive(Clone)]
pub struct Settings {
    /// The service's name, which all of its replicas share. One word.
    pub service: &'static str,
    /// The name of this process, shown by Postgres and NATS.
    pub client: String,
    /// The service's own database.
    pub database_url: String,
    /// Connections for requests at most.
    pub database_connections: u32,
    /// How to reach NATS.
    pub nats: NatsSettings,
    /// The streams and consumers of the system, if this service creates them.
    pub topology: Topology,
    /// Whether to create streams and consumers, or to trust that somebody with more rights has.
    pub provision: bool,
}

/// A service's side of the event bus. Clones share everything.
#[derive(Clone)]
pub struct Bus {
    /// For requests.
    requests: PgPool,
    /// For the relay and the subscriptions.
    db: PgPool,
    nats: async_nats::Client,
    jetstream: async_nats::jetstream::Context,
    wake: Wake,
    schema: Arc<Schema>,
    migrated: Arc<OnceCell<()>>,
    /// Creates streams and consumers, if this service does.
    provision: Option<Arc<Provisioner>>,
    /// Whether requests to other services fail, for the log.
    asking: Arc<Mutex<Backoff>>,
}

impl Bus {
    /// A bus that connects by and by: neither Postgres nor NATS needs to be there yet. The relay and the subscriptions
    /// bring the database up to date before they do anything else; where the role may not, they wait until somebody has.
    ///
    /// # Errors
    /// A malformed URL, or a file of the settings that is missing or malformed.
    pub async fn open(settings: Settings, schema: Schema) -> anyhow::Result<Self> {
        let pool = |connections| postgres::pool(&settings.database_url, &settings.client, connections);
        let nats = nats::connect(&settings.nats, settings.service, &settings.client).await?;
        let jetstream = nats::jetstream(&settings.nats, nats.clone());
        let provisioner = Provisioner::new(jetstream.clone(), settings.topology, settings.nats.stream_replicas);
        Ok(Self {
            requests: pool(settings.database_connections)?,
            db: pool(CONNECTIONS)?,
            jetstream,
            nats,
            wake: Wake::default(),
            schema: Arc::new(schema),
            migrated: Arc::default(),
            provision: settings.provision.then(|| Arc::new(provisioner)),
            asking: Arc::default(),
        })
    }

    /// A connection for reading.
    ///
    /// # Errors
    /// An outage, for this and the next two: no connection came free, or the tables are not there yet.
    pub async fn connection(&self) -> sqlx::Result<Connection> {
        self.migrated()?;
        Connection::acquire(&self.requests).await
    }

    /// A connection for a statement that writes a row and appends its event: see [`Outgoing`]. The relay is woken when it
    /// is dropped.
    pub async fn statement(&self) -> sqlx::Result<Connection> {
        Ok(self.connection().await?.waking(&self.wake))
    }

    /// A transaction of several statements.
    pub async fn begin(&self) -> sqlx::Result<Transaction> {
        self.migrated()?;
        Transaction::begin(&self.requests, &self.wake).await
    }

    /// The same, for work in the background: not on a connection for requests.
    pub async fn begin_in_background(&self) -> sqlx::Result<Transaction> {
        self.migrated()?;
        Transaction::begin(&self.db, &self.wake).await
    }

    /// Whether requests can be served: the tables are up to date and Postgres answers within a second.
    pub async fn is_ready(&self) -> bool {
        // Not asked on one of the connections for requests: that they are busy is no reason to send requests elsewhere.
        let answer = async { Connection::acquire(&self.db).await?.ping().await };
        self.migrated.initialized() && timeout(READY, answer).await.is_ok_and(|answer| answer.is_ok())
    }

    /// Publishes the committed events of `E` until `stop`, then what is left as far as NATS takes it.
    pub async fn relay<E: Event>(self, stop: CancellationToken) -> anyhow::Result<()> {
        if self.prepared(&stop).await {
            relay::run(&self, E::STREAM, &stop).await?;
        }
        Ok(())
    }

    /// Applies the events of `H::Event`'s stream until `stop`, at the place of the consumer `durable`.
    pub async fn subscribe<H: Handler>(
        self,
        durable: &'static str,
        handler: H,
        stop: CancellationToken,
    ) -> anyhow::Result<()> {
        if self.prepared(&stop).await {
            subscription::run(&self, durable, &handler, &stop).await?;
        }
        Ok(())
    }

    /// Asks the service behind `endpoint`, one of its replicas. `None`: it says that there is no such thing.
    ///
    /// # Errors
    /// No answer within 300 ms, for any reason; at once if NATS is away or no replica is there. Logged when it begins, once a
    /// minute while it goes on, and when it is over.
    pub async fn ask<Q: Serialize, A: DeserializeOwned>(
        &self,
        endpoint: &Endpoint<Q, A>,
        question: &Q,
    ) -> anyhow::Result<Option<A>> {
        request::ask(self, endpoint, question).await
    }

    /// Answers questions to `endpoint` until `stop`, together with the other replicas: each question goes to one of them.
    /// `find` gets a connection for reading.
    pub async fn answer<Q, A, F>(
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
        request::answer(&self, &endpoint, find, &stop).await
    }

    /// Closes the connections, once relay and subscriptions have ended.
    pub async fn close(&self) {
        let _ = timeout(READY, self.nats.drain()).await;
        let _ = timeout(READY, async { tokio::join!(self.requests.close(), self.db.close()) }).await;
    }

    /// Waits for the tables, for NATS, and for streams and consumers where we create them. `false`: stopped before.
    async fn prepared(&self, stop: &CancellationToken) -> bool {
        let mut backoff = retry::Backoff::default();
        let prepare = async {
            self.migrated.get_or_init(|| self.migrate()).await;
            // Without a word: to connect takes a moment, and the client says by itself what keeps it from it.
            while self.connected().is_err() {
                sleep(CONNECTING).await;
            }
            while let Err(error) = self.provision(Drift::Mend).await {
                sleep(backoff.fail("provisioning streams and consumers", &error)).await;
            }
            backoff.succeed("provisioning streams and consumers");
        };
        stop.run_until_cancelled(prepare).await.is_some()
    }

    /// Brings the tables of the bus and of the service up to date, trying until Postgres is there. Replicas may do it at
    /// once.
    async fn migrate(&self) {
        let what = "preparing the database";
        let mut backoff = retry::Backoff::default();
        while let Err(error) = self.schema.prepare(&self.db).await {
            sleep(backoff.fail(what, &error)).await;
        }
        backoff.succeed(what);
    }

    async fn provision(&self, drift: Drift) -> anyhow::Result<()> {
        let Some(provisioner) = &self.provision else { return Ok(()) };
        self.connected()?;
        provisioner.ensure(drift).await
    }

    /// A stream or a consumer may be what is missing. If this does not help, what failed fails again and says why.
    async fn provision_again(&self, stop: &CancellationToken) {
        let _ = stop.run_until_cancelled(self.provision(Drift::Leave)).await;
    }

    fn migrated(&self) -> sqlx::Result<()> {
        if self.migrated.initialized() { Ok(()) } else { Err(sqlx::Error::PoolTimedOut) }
    }

    /// Asked before anything that would wait for NATS while it holds something.
    fn connected(&self) -> anyhow::Result<()> {
        nats::connected(&self.nats)
    }
}

/// The aggregate and the version in an event id: see [`Event::event_id`].
fn split_event_id(id: &str) -> Option<(String, i64)> {
    let (aggregate_id, version) = id.rsplit_once('-')?;
    Some((aggregate_id.parse::<Id>().ok()?.to_string(), version.parse().ok()?))
}
