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
//! Beside events there are requests ([`Bus::request`], [`Bus::reply`]), for what cannot wait for an event and can be done
//! without: a reply comes within 300 ms or not at all.
//!
//! Read `database` and `broker` first, the two servers between which everything here moves events; then the protocols:
//! `outbox`, `relay`, `subscription`, `pull`, `dead_letters`, `request`, in this order; then `bus`, which holds it all.
#![warn(missing_docs)]

mod broker;
mod bus;
mod connection;
mod database;
mod dead_letters;
mod error;
mod event_id;
mod headers;
mod nats;
mod outbox;
mod panics;
mod postgres;
mod pull;
mod relay;
mod request;
mod retry;
mod schema;
mod settings;
mod subscription;
mod topology;
pub mod trace;

pub use bus::Bus;
pub use connection::{Connection, Transaction};
pub use error::{Error, Result, is_outage};
pub use event_bus_core::{DecodeError, Endpoint, Event, Publish, decode_json, deserialize_version, encode_json};
pub use headers::Headers;
pub use nats::{Authentication, NatsSettings};
pub use outbox::Outgoing;
pub use panics::panic_message;
pub use retry::Backoff;
pub use schema::{Schema, migrate};
pub use settings::Settings;
pub use subscription::{Handler, Received};
pub use topology::{Topology, TopologyError, provision};
