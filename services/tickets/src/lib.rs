//! The tickets service: owns tickets, and publishes every version of them as an event.
//!
//! A ticket has a title, a price, an owner, and the order that holds it. A request goes through `api` (parse, check),
//! `ticket` (the rules) and `store` (row and event); the event bus does the rest. `order_events` applies the events of
//! orders. [`start`] is the whole wiring.

pub mod api;
pub mod meters;
pub mod order_events;
pub mod store;
pub mod ticket;

use api::App;
use bootstrap::{Keys, Running, Service};
use contracts::endpoint::SHOW_TICKET;
use event_bus::{Bus, Schema};
use order_events::OrderEvents;
use std::ffi::OsString;
use std::process::ExitCode;
use store::{FindTickets, InsertTickets, ListTickets, SaveTickets, TicketSnapshots};

/// Sells tickets: create, change, list
#[derive(Debug, Clone, clap::Parser)]
#[command(name = "tickets", version)]
pub struct Config {
    #[command(flatten)]
    pub service: bootstrap::Config,
}

impl AsRef<bootstrap::Config> for Config {
    fn as_ref(&self) -> &bootstrap::Config {
        &self.service
    }
}

/// The tables, and the rights of the service's role in them.
pub fn schema() -> Schema {
    Schema::new("tickets", sqlx::migrate!(), include_str!("../grants.sql"))
}

/// The process: serves until a signal stops it, or runs one subcommand.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    bootstrap::main(args, &schema(), start)
}

/// Starts the service; Postgres and NATS may come up later.
pub async fn start(config: Config) -> anyhow::Result<Running> {
    let keys = Keys::new(&config.service)?;
    let bus = Bus::open(config.service.bus("tickets"), schema()).await?;
    let mut service = Service::new(&config.service);
    meters::stale();
    let (finds, finding) = bus.batcher(FindTickets);
    let (lists, listing) = bus.batcher(ListTickets);
    let (inserts, inserting) = bus.batcher(InsertTickets);
    let (saves, saving) = bus.batcher(SaveTickets);
    service.spawn("finds", |stop| finding.run(stop));
    service.spawn("lists", |stop| listing.run(stop));
    service.spawn("inserts", |stop| inserting.run(stop));
    service.spawn("saves", |stop| saving.run(stop));
    service.spawn("relay", |stop| bus.clone().relay_with(TicketSnapshots, stop));
    service.spawn("order events", |stop| bus.clone().subscribe("tickets", OrderEvents, stop));
    service.spawn("requests", |stop| bus.clone().reply(SHOW_TICKET, api::reply, stop));
    service.run(api::routes(App { keys, finds, lists, inserts, saves }), bus).await
}
