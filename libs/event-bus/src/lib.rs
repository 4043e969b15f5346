//! The event bus between services: outbox → JetStream → subscription.
//!
//! A change commits as a row and an event in one Postgres transaction ([`Bus::begin`], [`Bus::statement`]). A relay
//! publishes committed events to the service's stream, each exactly once and per aggregate in version order, with any
//! number of replicas and a crash at any point. A subscription ([`Handler`]) applies the events of another service's
//! stream, each at least once. It acknowledges an event after its effect is committed or after it is stored as a dead
//! letter.
//!
//! Guaranteed: no committed event is lost, duplicated in the stream, or published before an older version of its
//! aggregate, unless the broker loses what it has confirmed. Not guaranteed: that a handler sees an event once, or in order. Handlers compare versions instead.
//!
//! An effect outside of the database, such as a request that charges a card, is a durable [`Task`]: its intent is
//! committed with its cause ([`Transaction::schedule`]), a worker performs it at least once with the same key
//! ([`Bus::perform`]), and its result and events are committed once.
//!
//! Concurrent requests can share a statement and a commit: [`Bus::batcher`].
//!
//! A stream that lost events is healed by its owner, if it has [`Snapshots`] of its tables, and a database that is older than its stream
//! takes over what it lost: [`Bus::relay_with`]. A reader that has missed events, or that is new, gets the current snapshots from the
//! owner. A [`Replica`] can be compared with its owner ([`verify()`]) and repaired row by row ([`rebuild`]).
//!
//! Beside events there are requests ([`Bus::request`], [`Bus::reply`]). A reply comes within
//! [`Settings::reply_timeout`] or not at all: use a request only if the service also works without the reply.
//!
//! Everything is measured with the crate `metrics`, under names that begin with `event_bus_`: install a recorder before [`Bus::open`], and
//! run [`Bus::measure`]. The bus knows no exporter.
//!
//! Needs NATS 2.12 or newer, for atomic batches, and Postgres 13 or newer; tested with NATS 2.15 and Postgres 18.
//!
//! Migration 4 brings headers, and aggregate ids that are not 24 hex digits. Use neither before the last replica of the
//! previous release has stopped: its relays publish events without headers, and do not recognize other ids.
//!
//! # A service that publishes invoices, and one that reads them
//!
//! ```no_run
//! use event_bus::*;
//! use serde::{Deserialize, Serialize};
//! use tokio_util::sync::CancellationToken;
//!
//! #[derive(Serialize, Deserialize)]
//! struct Invoice {
//!     id: String, // any text of visible ASCII characters, for example a UUID
//!     version: i64,
//!     total: i64,
//! }
//!
//! impl Event for Invoice {
//!     const STREAM: &'static str = "INVOICES";
//!
//!     fn aggregate_id(&self) -> String {
//!         self.id.clone()
//!     }
//!
//!     fn version(&self) -> i64 {
//!         self.version
//!     }
//!
//!     fn decode(_subject: &str, body: &[u8]) -> std::result::Result<Self, DecodeError> {
//!         decode_json(body)
//!     }
//! }
//!
//! impl Publish for Invoice {
//!     fn subject(&self) -> &'static str {
//!         "invoice.changed"
//!     }
//!
//!     fn encode(&self) -> String {
//!         encode_json(self)
//!     }
//! }
//!
//! /// Commits a change and its event.
//! async fn change(bus: &Bus, invoice: &Invoice) -> event_bus::Result<()> {
//!     let mut tx = bus.begin().await?;
//!     // … write the row of the invoice in `tx`, then:
//!     tx.append([invoice]).await?;
//!     tx.commit().await
//! }
//!
//! struct Ledger;
//!
//! impl Handler for Ledger {
//!     type Event = Invoice;
//!
//!     async fn apply(&self, tx: &mut Transaction, invoices: &[Received<Invoice>]) -> anyhow::Result<()> {
//!         // … in `tx`: insert or update each invoice where its version is newer than the one that is stored
//!         Ok(())
//!     }
//! }
//!
//! # async fn run(migrations: sqlx::migrate::Migrator) -> anyhow::Result<()> {
//! let nats = NatsSettings { url: "nats://127.0.0.1:4222".to_owned(), ..NatsSettings::default() };
//! let topology = Topology::parse([
//!     ("INVOICES.stream.json", r#"{"subjects": ["invoice.changed"], "discard": "new", "allow_atomic": true}"#),
//!     ("INVOICES.ledger.consumer.json", r#"{"ack_policy": "explicit"}"#),
//! ])?;
//! let settings = Settings { topology, provision: true, ..Settings::new("ledger", "postgres://localhost/ledger", nats) };
//! let bus = Bus::open(settings, Schema::new("ledger", migrations, "")).await?;
//! let stop = CancellationToken::new();
//! // Each runs until `stop` is cancelled.
//! tokio::spawn(bus.clone().relay::<Invoice>(stop.clone()));
//! tokio::spawn(bus.clone().subscribe("ledger", Ledger, stop.clone()));
//! # Ok(())
//! # }
//! ```
//!
//! # Where to read on
//!
//! Read `database` and `broker` first: events move between these two servers. Then read the protocols: `outbox`,
//! `relay`, `window`, `republish`, `recovery`, `subscription`, `pull`, `dead_letters`, `task`, `request`, `owner`, `fill`, `verify`,
//! `batcher`, `measure`, in this order; then `bus`, which owns all.
#![warn(missing_docs)]

mod backpressure;
mod batcher;
mod broker;
mod bus;
mod connection;
mod copy;
mod database;
mod dead_letters;
mod digest;
mod duties;
mod error;
mod estimate;
mod event_id;
mod fill;
mod headers;
mod measure;
mod meters;
mod nats;
mod outbox;
mod owner;
mod panics;
mod postgres;
mod pull;
mod recovery;
mod relay;
mod replica;
mod republish;
mod request;
mod retry;
mod schema;
mod settings;
mod snapshot;
mod subscription;
mod task;
mod topology;
pub mod trace;
mod verify;
mod window;

pub use batcher::{Batcher, Batching, Statement};
pub use bus::Bus;
pub use connection::{Connection, Transaction};
pub use copy::Copied;
pub use error::{Error, Result, is_outage};
pub use event_bus_core::{DecodeError, Endpoint, Event, Publish, decode_json, deserialize_version, encode_json};
pub use fill::{Rebuilt, rebuild};
pub use headers::Headers;
pub use nats::{Authentication, NatsSettings};
pub use outbox::{Columns, Outgoing};
pub use panics::panic_message;
pub use relay::{Unknown, find_unknown};
pub use replica::Replica;
pub use republish::{Republish, Snapshots, request_republish};
pub use retry::Backoff;
pub use schema::{Schema, migrate};
pub use settings::Settings;
pub use subscription::{Handler, Received};
pub use task::Task;
pub use topology::{Topology, TopologyError, provision};
pub use verify::{Ids, Verification, verify};
