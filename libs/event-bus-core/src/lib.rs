//! The traits and types of events, and of requests between services.
//!
//! They connect the crate that defines the events of a system with the library `event-bus`. The first depends only on
//! this crate; services depend on `event-bus`, which exports all of it. This crate does no input or output, and knows
//! neither Postgres nor NATS nor a domain.
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
