//! The system under load: servers in containers, services as processes of this binary.

use anyhow::{Context, Result};
use futures::future::try_join_all;
use stack::services::{ORDERS, Service, TICKETS};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;
use testkit::{Container, Nats, Postgres, Process, free_port, nats_url};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// How long a service may take to stop.
const STOP: Duration = Duration::from_secs(15);

/// Everything that runs. Dropping it ends everything, and removes the data.
pub struct System {
    /// The replicas of tickets. Services come first, so that they are dropped before the servers.
    pub tickets: Vec<Process>,
    /// The replicas of orders.
    pub orders: Vec<Process>,
    /// The broker.
    pub nats: Nats,
    /// The database server.
    pub postgres: Postgres,
    /// Where services reach Postgres and NATS.
    addresses: Addresses,
    /// The binary that runs the services.
    binary: PathBuf,
}

/// `host:port` of both servers.
struct Addresses {
    postgres: String,
    nats: String,
    /// Whether these are the published ports, behind Docker's proxy.
    published: bool,
}

impl System {
    /// Starts the servers and one replica of each service. `binary` runs the services: see [`stack::run_service`].
    pub async fn start(binary: &Path) -> Result<Self> {
        let (postgres, nats) = tokio::try_join!(Box::pin(Postgres::start()), Box::pin(Nats::start()))?;
        stack::prepare(&postgres, &nats).await?;
        let addresses = Addresses::find(&postgres, &nats).await?;
        let binary = binary.to_owned();
        let mut system = Self { tickets: Vec::new(), orders: Vec::new(), nats, postgres, addresses, binary };
        system.tickets.push(system.spawn(&TICKETS)?);
        system.orders.push(system.spawn(&ORDERS)?);
        system.wait_ready().await?;
        Ok(system)
    }

    /// Starts a process of this service. Does not wait until it is ready.
    pub fn spawn(&self, service: &Service) -> Result<Process> {
        let database_url = self.url(service.database_user, service.database);
        let mut env = service.environment(database_url, nats_url(service.nats_user, &self.addresses.nats));
        env.push(("RUST_LOG", "warn".to_owned()));
        // Every line is shown: under load, none is expected.
        Process::spawn_at(&self.binary, service.name, free_port(), env, testkit::say)
    }

    /// Starts replicas of tickets until there are this many, and waits until they are ready.
    pub async fn scale_tickets(&mut self, replicas: usize) -> Result<()> {
        while self.tickets.len() < replicas {
            self.tickets.push(self.spawn(&TICKETS)?);
        }
        self.wait_ready().await
    }

    /// Stops all replicas of tickets gracefully.
    pub async fn stop_tickets(&mut self) -> Result<()> {
        try_join_all(self.tickets.iter_mut().map(|replica| replica.stop(STOP))).await?;
        self.tickets.clear();
        Ok(())
    }

    async fn wait_ready(&mut self) -> Result<()> {
        try_join_all(self.tickets.iter_mut().chain(&mut self.orders).map(Process::wait_ready)).await.map(drop)
    }

    /// The URL of a database for a role, at the address that services use.
    pub fn url(&self, role: &str, database: &str) -> String {
        let url = self.postgres.url(role, database);
        url.replace(&published(&self.postgres), &self.addresses.postgres)
    }

    /// The URL of a service's database for the superuser.
    pub fn superuser_url(&self, service: &Service) -> String {
        self.url("postgres", service.database)
    }

    /// Whether services connect through Docker's proxy, which needs CPU.
    pub fn is_proxied(&self) -> bool {
        self.addresses.published
    }
}

impl Addresses {
    /// The containers' own addresses, or the published ports where those cannot be reached (macOS).
    async fn find(postgres: &Postgres, nats: &Nats) -> Result<Self> {
        Ok(match (own(postgres).await, own(nats).await) {
            (Some(postgres), Some(nats)) => {
                Self { postgres: postgres.to_string(), nats: nats.to_string(), published: false }
            }
            _ => Self { postgres: published(postgres), nats: nats.server(), published: true },
        })
    }
}

async fn own(server: &Container) -> Option<SocketAddr> {
    let address = server.address().await.ok()?;
    timeout(Duration::from_secs(2), TcpStream::connect(address)).await.ok()?.ok()?;
    Some(address)
}

/// `host:port` of Postgres on this machine.
fn published(postgres: &Postgres) -> String {
    let url = postgres.url("", "");
    url.trim_start_matches("postgres://:@").trim_end_matches('/').to_owned()
}

/// The path of this binary.
pub fn this_binary() -> Result<PathBuf> {
    std::env::current_exe().context("cannot find my own binary")
}
