//! Starting and stopping a service: its background tasks, its server, and a stop in order.
//!
//! Requests end before background tasks do: their commits wake the bus, which must still be there to publish them.

mod command;
mod process;

use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use axum::Router;
use event_bus::Bus;
use futures::FutureExt as _;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use crate::config::Config;
use crate::http::{self, Health, Middleware};
use crate::telemetry;

pub use process::main;

/// A service that does not serve yet. Dropping it aborts the tasks that were spawned.
pub struct Service {
    config: Config,
    background: Background,
}

impl Service {
    /// A service without background tasks.
    pub fn new(config: &Config) -> Self {
        telemetry::start_counting();
        Self { config: config.clone(), background: Background::default() }
    }

    /// Starts a background task, which must run until its token is cancelled, and then end soon.
    ///
    /// The token is cancelled after the last response. A task that ends earlier, for any reason, ends the service.
    pub fn spawn<F>(&mut self, name: &'static str, task: impl FnOnce(CancellationToken) -> F)
    where
        F: Future<Output = anyhow::Result<()>> + Send + 'static,
    {
        let task = AssertUnwindSafe(task(self.background.stop.clone())).catch_unwind();
        self.background.tasks.spawn(async move {
            let result =
                task.await.unwrap_or_else(|panic| Err(anyhow!("panicked: {}", event_bus::panic_message(&*panic))));
            (name, result)
        });
    }

    /// Listens and serves. Needs neither Postgres nor NATS: until `bus` is ready, `/readyz` is 503.
    ///
    /// The bus is closed when the service stops.
    #[expect(clippy::unused_async, reason = "it spawns, and so is called within a runtime")]
    pub async fn run(mut self, routes: Router, bus: Bus) -> anyhow::Result<Running> {
        let address = self.config.http_addr;
        let listener = http::listen(address).with_context(|| format!("cannot listen on {address}"))?;
        let address = listener.local_addr()?;
        telemetry::name_build(bus.service());
        self.spawn("metrics", |stop| measure(bus.clone(), stop));
        let stop = CancellationToken::new();
        let health = Health { bus: bus.clone(), stop: stop.clone() };
        let middleware = Arc::new(Middleware::new(routes, health, &self.config));
        let mut server = JoinSet::new();
        server.spawn(http::serve(listener, middleware, stop.clone()));
        info!(%address, "serving");
        Ok(Running { address, stop, stop_grace: self.config.stop_grace, server, background: self.background, bus })
    }
}

/// Measures what is not measured where it happens, until `stop`.
async fn measure(bus: Bus, stop: CancellationToken) -> anyhow::Result<()> {
    tokio::select! {
        () = bus.measure(&stop) => Ok(()),
        never = telemetry::keep() => match never {},
    }
}

/// A running service. Dropping it without [`Running::stop`] is like a crash: listener, connections and background tasks
/// end at once; only handlers that have begun continue.
#[must_use = "dropping it ends the service"]
pub struct Running {
    /// The address it listens on, with the actual port.
    pub address: SocketAddr,
    /// Cancelled first: not ready, no new connections.
    stop: CancellationToken,
    stop_grace: Duration,
    /// One task. A set aborts it when dropped, and can be polled again after the task has ended.
    server: JoinSet<()>,
    background: Background,
    bus: Bus,
}

impl Running {
    /// Waits until a part of the service ends by itself. Returns which and why.
    ///
    /// Cancel safe: it may be dropped and called again.
    pub async fn wait(&mut self) -> anyhow::Error {
        tokio::select! {
            error = self.background.ended() => error,
            ended = self.server.join_next() => anyhow!("the server ended by itself: {ended:?}"),
        }
    }

    /// Stops in order: not ready, no new connections, last response, background tasks, connections.
    ///
    /// Returns an error if this takes longer than the configured grace; the rest is then aborted.
    pub async fn stop(self) -> anyhow::Result<()> {
        let grace = self.stop_grace;
        tokio::time::timeout(grace, self.stop_in_order())
            .await
            .unwrap_or_else(|_| Err(anyhow!("not stopped within {grace:?}, the rest is aborted")))
    }

    async fn stop_in_order(mut self) -> anyhow::Result<()> {
        self.stop.cancel();
        // A handler that hangs must not use up the time in which the bus returns its messages.
        let drained = tokio::time::timeout(self.stop_grace.mul_f32(0.75), self.server.join_next())
            .await
            .map_err(|_| anyhow!("requests were still running"))
            .and_then(|ended| Ok(ended.transpose()?));
        let ended = self.background.stop().await;
        self.bus.close().await;
        drained.and(ended)
    }
}

/// The background tasks, and the token that stops them.
#[derive(Default)]
struct Background {
    stop: CancellationToken,
    tasks: JoinSet<(&'static str, anyhow::Result<()>)>,
}

impl Background {
    /// Waits until a task ends. Never returns for a service without background tasks.
    async fn ended(&mut self) -> anyhow::Error {
        match self.tasks.join_next().await {
            Some(Ok((name, Ok(())))) => anyhow!("{name} ended by itself"),
            Some(Ok((name, Err(error)))) => error.context(format!("{name} failed")),
            Some(Err(error)) => anyhow::Error::new(error).context("a background task was aborted"),
            None => futures::future::pending().await,
        }
    }

    /// Returns the first failure; the others are logged.
    async fn stop(&mut self) -> anyhow::Result<()> {
        self.stop.cancel();
        let mut result = Ok(());
        while let Some(ended) = self.tasks.join_next().await {
            let (name, ended) = ended.context("a background task was aborted")?;
            let Err(failure) = ended.with_context(|| format!("{name} failed while stopping")) else { continue };
            if result.is_ok() {
                result = Err(failure);
            } else {
                error!(error = format!("{failure:#}"), "another failure");
            }
        }
        result
    }
}
