//! Real servers for tests: Postgres and NATS in containers, services as processes, and their faults.
//!
//! It knows no service. It guarantees that tests use the real servers – the pinned images with the durability of production
//! (`fsync`, `sync_interval: always`), and the services' own `main` – and that containers and processes end when they are
//! dropped, and also when the process that started them is killed. Containers take seconds to start: share them where
//! possible ([`Postgres::shared`]).
//!
//! Read [`Postgres`] and [`Nats`] (and [`Prometheus`], which watches services), their faults ([`Container`], [`Proxy`]), a service as a [`Process`] or within the test
//! ([`HttpService`]), its [`Client`], and [`eventually`], which waits for its effects.
#![warn(missing_docs)]

mod client;
mod container;
mod eventually;
mod http_service;
pub mod images;
pub mod left_over;
mod lock;
mod metrics;
mod nats;
mod port;
mod postgres;
mod process;
mod progress;
mod prometheus;
mod proxy;
mod reaper;
mod token;

pub use client::{Answer, Client};
pub use container::Container;
pub use eventually::{Attempt, PATIENCE, eventually, eventually_within};
pub use http_service::{HttpService, UNAVAILABLE, error, hostile_texts, id};
pub use lock::Lock;
pub use metrics::Metrics;
pub use nats::{Nats, NatsSetup, connect, nats_url};
pub use port::{free_port, free_port_from};
pub use postgres::Postgres;
pub use process::{Process, Signal, end_with_parent};
pub use progress::{announced, say};
pub use prometheus::{Prometheus, promtool};
pub use proxy::Proxy;
pub use reaper::Reaper;
pub use token::{JWT_KEY, cookie, token};
