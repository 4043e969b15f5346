//! What an event is, and what a request between services is: the traits and types between a system's own crate of
//! events and the library `event-bus`.
//!
//! Data only: nothing here does input or output, and nothing knows Postgres, NATS or a domain. A crate that defines the
//! events of a system depends on this one; services depend on `event-bus`, which exports all of it.
//!
//! Read [`Event`] first, then [`Publish`] and [`Endpoint`]. [`decode_json`], [`encode_json`] and
//! [`deserialize_version`] help to implement them.
#![warn(missing_docs)]

mod endpoint;
mod event;
mod json;

pub use endpoint::Endpoint;
pub use event::{DecodeError, Event, Publish};
pub use json::{decode_json, deserialize_version, encode_json};
