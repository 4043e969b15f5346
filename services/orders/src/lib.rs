//! The orders service: keeps a copy of what it needs to know about tickets, as their events tell it.
//!
//! [`start`] is the whole wiring; `ticket_events` says what an event means here, `store` writes it.

pub mod store;
pub mod ticket_events;

use axum::Router;
use bootstrap::{Running, Service};
use event_bus::Bus;
use std::ffi::OsString;
use std::process::ExitCode;
use ticket_events::TicketEvents;

/// Keeps a copy of all tickets
#[derive(Debug, Clone, clap::Parser)]
#[command(name = "orders", version)]
pub struct Config {
    #[command(flatten)]
    pub service: bootstrap::Config,
}

impl AsRef<bootstrap::Config> for Config {
    fn as_ref(&self) -> &bootstrap::Config {
        &self.service
    }
}

/// The process: runs until it is told to stop.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    bootstrap::main(args, start)
}

/// Starts the service; Postgres and NATS may come up later.
pub async fn start(config: Config) -> anyhow::Result<Running> {
    let bus = Bus::open(config.service.bus("orders"), sqlx::migrate!()).await?;
    let mut service = Service::new(&config.service);
    service.spawn("ticket events", |stop| bus.clone().subscribe("orders", TicketEvents, stop));
    service.run(Router::new(), bus).await
}
