//! The HTTP contract of tickets, against the real service on a real Postgres. There is no NATS: HTTP does not need it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::disallowed_methods, reason = "tests look into tables that no query! is prepared for")]

mod create_ticket;
mod dead_postgres;
mod edit_ticket;
mod hanging_up;
mod identity;
mod list_tickets;
mod long_lists;
mod requests;
mod show_ticket;
mod tickets;
