//! The payments service of `docs/a-service-of-your-own.md`: charges cards for orders.
//! `orders` keeps a replica of the orders, `api` commits a payment with the task to charge it, `charge` performs the task.

mod api;
mod charge;
mod orders;

use bootstrap::{Keys, Running, Service};
use contracts::PaymentEvent;
use event_bus::{Bus, Schema, Settings};
use std::process::ExitCode;
use std::time::Duration;

/// Charges cards for orders
#[derive(clap::Parser)]
#[command(name = "payments", version)]
struct Config {
    /// URL that charges are posted to: `http://provider/charges`
    #[arg(long, env, hide_env_values = true)]
    provider_url: reqwest::Url,

    /// Secret that authenticates this service to the provider
    #[arg(long, env, hide_env_values = true)]
    provider_key: String,

    /// Time for one request to the provider, after which it is made again: 10s, 1m
    #[arg(long, env, default_value = "10s", value_parser = bootstrap::config::duration)]
    provider_timeout: Duration,

    #[command(flatten)]
    service: bootstrap::Config,
}

impl AsRef<bootstrap::Config> for Config {
    fn as_ref(&self) -> &bootstrap::Config {
        &self.service
    }
}

fn schema() -> Schema {
    Schema::new("payments", sqlx::migrate!(), include_str!("../grants.sql"))
}

fn main() -> ExitCode {
    bootstrap::main(std::env::args_os(), &schema(), start)
}

async fn start(config: Config) -> anyhow::Result<Running> {
    let keys = Keys::new(&config.service)?;
    let settings = Settings { task_timeout: config.provider_timeout, ..config.service.bus("payments") };
    let bus = Bus::open(settings, schema()).await?;
    let charge = charge::Charge::new(config.provider_url, &config.provider_key)?;
    let mut service = Service::new(&config.service);
    service.spawn("relay", |stop| bus.clone().relay::<PaymentEvent>(stop));
    service.spawn("order events", |stop| bus.clone().subscribe("payments", orders::Replica, stop));
    service.spawn("charges", |stop| bus.clone().perform(charge, stop));
    service.run(api::routes(api::App { bus: bus.clone(), keys }), bus).await
}
