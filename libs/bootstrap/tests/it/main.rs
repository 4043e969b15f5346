//! The guarantees of the crate, tested on a real server on a free port. Each file tests one behaviour.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod bodies;
mod connections;
mod errors;
mod hanging_up;
mod health;
mod identities;
mod metrics;
mod overload;
mod process;
mod provisioning;
mod request_ids;
mod server;
mod stopping;
mod tasks;
