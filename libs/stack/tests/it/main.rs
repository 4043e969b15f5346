//! The whole system, and the machinery that starts it.

#![allow(clippy::disallowed_methods, reason = "tests look into tables, and publish what no relay would")]

mod containers;
mod nats_outage;
mod poison;
mod postgres_restart;
mod relay_crashes;
mod starting_and_stopping;
mod system;
mod the_pair;
