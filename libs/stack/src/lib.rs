//! The whole system on one machine: which services there are, and what is done before they start.
//! For people it is `cargo up`; for tests it is this library, on the servers of [`testkit`].
//!
//! Reading order: [`prepare`], then [`session`]; `main`, `up`, `system`, `welcome` are `cargo up`.
#![warn(missing_docs)]

mod prepare;
mod session;

pub use prepare::{migrate, prepare, provision};
pub use session::session;
