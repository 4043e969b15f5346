//! Payments beside the real tickets and orders, on real servers, with a provider that misbehaves.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::disallowed_methods, reason = "tests look into tables that no query! is prepared for")]

mod killing;
mod page;
mod paying;
mod provider;
mod shop;
