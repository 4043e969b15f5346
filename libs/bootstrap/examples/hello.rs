//! The smallest service, which the process tests start, signal and end.
//!
//! `cargo run -p bootstrap --example hello -- --jwt-key secret --database-url postgres://localhost`

use std::process::ExitCode;

use axum::Router;
use axum::extract::FromRef;
use axum::routing::get;
use bootstrap::{ApiError, Caller, Config, Keys, Running, Service};
use event_bus::{Bus, Schema};
use sqlx::migrate::Migrator;

/// Greets
#[derive(clap::Parser)]
struct HelloConfig {
    #[command(flatten)]
    service: Config,

    /// A background task ends by itself at once
    #[arg(long)]
    broken: bool,
}

impl AsRef<Config> for HelloConfig {
    fn as_ref(&self) -> &Config {
        &self.service
    }
}

#[derive(Clone)]
struct App {
    keys: Keys,
}

impl FromRef<App> for Keys {
    fn from_ref(app: &App) -> Self {
        app.keys.clone()
    }
}

fn main() -> ExitCode {
    bootstrap::main(std::env::args_os(), &schema(), start)
}

/// Only the tables of the bus.
fn schema() -> Schema {
    Schema::new("hello", Migrator::DEFAULT, "")
}

async fn start(config: HelloConfig) -> anyhow::Result<Running> {
    let bus = Bus::open(config.service.bus("hello"), schema()).await?;
    let routes = Router::new()
        .route("/hello", get(hello))
        // For the process tests: a request that keeps the service from stopping.
        .route("/never", get(never))
        .with_state(App { keys: Keys::new(&config.service)? });
    let mut service = Service::new(&config.service);
    service.spawn("background", async move |stop| {
        if !config.broken {
            stop.cancelled().await;
        }
        Ok(())
    });
    service.run(routes, bus).await
}

async fn never() {
    tracing::info!("never ends");
    std::future::pending::<()>().await;
}

async fn hello(caller: Caller) -> Result<String, ApiError> {
    Ok(format!("Hello {}\n", caller.user()?.id))
}
