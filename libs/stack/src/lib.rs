//! The whole system on one machine: the list of services, and the steps before they start.
//!
//! `cargo up` uses it from the command line; `cargo load` and tests use it as a library, on the servers of [`testkit`].
//!
//! Read [`services`], [`run_service`], [`prepare`](prepare()), [`session`]; then `main`, `up`, `welcome`, `system`, which are
//! `cargo up`.
#![warn(missing_docs)]

mod prepare;
mod run_service;
pub mod services;
mod session;

pub use prepare::{migrate, prepare, provision};
pub use run_service::run_service;
pub use session::session;
