//! What a request costs, counted and not timed: the figures are the same on every machine.
//!
//! `open_loop` tests the load generator itself.

#![allow(clippy::disallowed_methods, reason = "tests look into the statistics of Postgres")]

mod growing;
mod open_loop;
mod statements;
mod statistics;
