//! The whole system on one machine: which services there are, and what is done before they start.
//! For people it is `cargo up`; for tests it is this library, on the servers of [`testkit`].
//!
//! Reading order: [`services`], [`prepare`](prepare()), [`session`]; then `main`, `up`, `welcome`, `system`, which are
//! `cargo up`.
#![warn(missing_docs)]

mod prepare;
pub mod services;
mod session;

pub use prepare::{migrate, prepare, provision};
pub use session::session;
