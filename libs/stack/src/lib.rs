//! The whole system on one machine: the list of services, and the steps before they start.
//!
//! `cargo up` uses it from the command line, tests use it as a library, on the servers of [`testkit`].
//!
//! Read [`services`], [`prepare`](prepare()), [`session`]; then `main`, `up`, `welcome`, `system`, which are `cargo up`.
#![warn(missing_docs)]

mod prepare;
pub mod services;
mod session;

pub use prepare::{migrate, prepare, provision};
pub use session::session;
