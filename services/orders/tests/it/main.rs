//! The HTTP contract of orders, against the real service on a real Postgres. There is no NATS: HTTP does not need it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::disallowed_methods, reason = "tests look into tables that no query! is prepared for")]

mod cancel_order;
mod configuration;
mod create_order;
mod dead_postgres;
mod expiry;
mod hanging_up;
mod list_orders;
mod orders;
mod racing;
mod requests;
mod show_order;
