//! The orders service: owns orders, and publishes every version of them as an event.
//!
//! An order reserves a ticket for a user until it is paid, cancelled or expired. A request goes through `api` (parse, check),
//! `order` (the rules) and `store` (row and event); the event bus does the rest. `ticket_events` keeps the `replica` of
//! tickets. `payment_events` and `expiration_events` apply the events of other services; `expiry` needs no events.
//! [`start`] is the whole wiring.

pub mod api;
pub mod expiration_events;
pub mod expiry;
pub mod meters;
pub mod order;
pub mod payment_events;
pub mod replica;
pub mod store;
pub mod ticket_events;

use api::App;
use bootstrap::{Keys, Running, Service};
use event_bus::{Bus, Schema};
use expiration_events::ExpirationEvents;
use payment_events::PaymentEvents;
use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Duration;
use store::{FindOffers, InsertOrders, OrderSnapshots};
use ticket_events::TicketEvents;

/// Reserves tickets: order, cancel, list; expires what is not paid
#[derive(Debug, Clone, clap::Parser)]
#[command(name = "orders", version)]
pub struct Config {
    /// Time to pay an order, after which it is cancelled: 15m, 90s, 1h
    #[arg(long, env, default_value = "15m", value_parser = order_ttl)]
    pub order_ttl: Duration,

    #[command(flatten)]
    pub service: bootstrap::Config,
}

impl AsRef<bootstrap::Config> for Config {
    fn as_ref(&self) -> &bootstrap::Config {
        &self.service
    }
}

/// Parses a duration of at most a year: more is a typing error, and far more overflows in Postgres.
fn order_ttl(text: &str) -> Result<Duration, String> {
    let ttl = bootstrap::config::duration(text)?;
    if ttl > Duration::from_hours(366 * 24) { Err("at most a year".to_owned()) } else { Ok(ttl) }
}

/// The tables, and the rights of the service's role in them.
pub fn schema() -> Schema {
    Schema::new("orders", sqlx::migrate!(), include_str!("../grants.sql")).with_replica("orders", TicketEvents)
}

/// The process: serves until a signal stops it, or runs one subcommand.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    bootstrap::main(args, &schema(), start)
}

/// Starts the service; Postgres and NATS may come up later.
pub async fn start(config: Config) -> anyhow::Result<Running> {
    let keys = Keys::new(&config.service)?;
    let bus = Bus::open(config.service.bus("orders"), schema()).await?;
    let mut service = Service::new(&config.service);
    meters::meters();
    let (offers, finding) = bus.batcher(FindOffers { ttl: config.order_ttl });
    let (inserts, inserting) = bus.batcher(InsertOrders);
    service.spawn("offers", |stop| finding.run(stop));
    service.spawn("inserts", |stop| inserting.run(stop));
    service.spawn("relay", |stop| bus.clone().relay_with(OrderSnapshots, stop));
    service.spawn("ticket events", |stop| bus.clone().replicate("orders", TicketEvents, stop));
    service.spawn("payment events", |stop| bus.clone().subscribe("orders", PaymentEvents, stop));
    service.spawn("expiration events", |stop| bus.clone().subscribe("orders", ExpirationEvents, stop));
    service.spawn("expiry", |stop| expiry::run(bus.clone(), stop));
    service.run(api::routes(App { bus: bus.clone(), keys, offers, inserts }), bus).await
}
