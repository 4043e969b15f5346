//! What a request costs, counted and not timed: the figures are the same on every machine.

#![allow(clippy::disallowed_methods, reason = "tests look into the statistics of Postgres")]

mod growing;
mod statements;
mod statistics;
