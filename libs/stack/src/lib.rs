//! A whole system on one machine: Postgres and NATS in containers, and the services beside them as processes.
//! For people it is `cargo up`; for tests it is this library.
//!
//! It guarantees that what a test talks to is the real thing – the pinned images with the durability of production
//! (`fsync`, `sync_interval: always`), the services' own `main` – and that nothing outlives its owner: containers and
//! processes end when they are dropped, and also when the process that started them is killed.
//! It does not make images or containers faster than they are: share what can be shared ([`Postgres::shared`]).
//!
//! Reading order: [`Postgres`] and [`Nats`], the faults both can suffer ([`Container`]), a service as a [`Process`],
//! a [`Client`] to talk to it, and [`eventually`] to wait for what it does.
#![warn(missing_docs)]

mod client;
mod container;
mod eventually;
pub mod images;
pub mod left_over;
mod nats;
mod port;
mod postgres;
mod prepare;
mod process;
mod progress;
mod reaper;
mod session;
mod token;
mod way;

pub use client::{Answer, Client};
pub use container::Container;
pub use eventually::{Attempt, PATIENCE, eventually, eventually_within};
pub use nats::{Nats, NatsSetup, connect, nats_url};
pub use port::{free_port, free_port_from};
pub use postgres::Postgres;
pub use prepare::{migrate, prepare, provision};
pub use process::{Process, Signal, end_with_parent};
pub use progress::{announced, say};
pub use reaper::Reaper;
pub use session::session;
pub use token::{JWT_KEY, cookie, token};
pub use way::Way;
