//! What all services share: configuration, logs, HTTP, identity, health, start and stop.
//!
//! A service defines its routes and its background tasks; this crate runs them:
//!
//! ```no_run
//! # use bootstrap::{Config, Running, Service};
//! async fn start(config: Config, routes: axum::Router, bus: event_bus::Bus) -> anyhow::Result<Running> {
//!     let mut service = Service::new(&config);
//!     service.spawn("clock", async |stop| {
//!         stop.cancelled().await;
//!         Ok(())
//!     });
//!     service.run(routes, bus).await
//! }
//! ```
//!
//! `examples/hello.rs` is a whole service.
//!
//! It guarantees that
//! - every response that is not 2xx has the body `{"errors":[{"message","field"?}]}`;
//! - a request that has begun is finished, even if its client hangs up;
//! - slow clients hold a bounded amount of memory, and do not block others;
//! - a service stops in order: not ready, no new connections, last response, background tasks, connections;
//! - a background task that ends by itself ends the process with a non-zero code.
//!
//! It contains no rule of tickets or orders. It contains the configuration of the bus, and the built-in files of streams
//! and consumers.
//!
//! Read [`run`], then [`http`], [`error`], [`body`], [`list`], [`identity`].

#![warn(missing_docs)]

pub mod body;
pub mod config;
pub mod error;
pub mod http;
pub mod identity;
pub mod list;
pub mod run;
mod task;
pub mod telemetry;
pub mod topology;

pub use body::{Field, JsonBody};
pub use config::Config;
pub use error::{ApiError, FieldError};
pub use identity::{Caller, Keys, User};
pub use list::List;
pub use run::{Running, Service, main};
