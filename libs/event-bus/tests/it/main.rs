//! The bus alone, between a real Postgres and a real NATS.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::disallowed_methods, reason = "tests read tables, and publish without a relay")]

mod abandoned;
mod connecting;
mod copies;
mod documents;
mod filling;
mod harness;
mod headers;
mod held_snapshot;
mod isolating;
mod log;
mod lost_history;
mod migrating;
mod missed;
mod publishing;
mod rebuilding;
mod recovery;
mod relay_steps;
mod republishing;
mod settings;
mod shelf;
mod stale_relay;
mod streams;
mod subscribing;
mod tasks;
mod topology;
mod transactions;
mod unavailable;
mod window;
mod writing;
