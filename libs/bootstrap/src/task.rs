//! What a service's binary can do beside serving: `migrate`, `provision`, `health`. Each is done once, with rights that
//! the service itself does not need.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use clap::{Args, Subcommand};
use event_bus::Schema;

use crate::config::{LogConfig, NatsConfig, duration};

// Not documentation: that would take the place of what the service says of itself in `--help`.
// Ends with 0 when it is done, with 1 and the reason otherwise.
#[derive(Subcommand)]
pub(crate) enum Task {
    Migrate(Migrate),
    // Boxed, because it is much larger than the others.
    Provision(Box<Provision>),
    Health(Health),
}

/// Bring the database up to date, and let the service's role use it
///
/// Doing it again, or at once from several places, changes nothing.
#[derive(Args)]
pub(crate) struct Migrate {
    /// The service's database, as the role that owns it: `postgres://owner:password@host/database`
    #[arg(long, env, hide_env_values = true)]
    database_url: String,

    /// Role that the service runs as: it may do what the service does, and nothing else
    #[arg(long, env)]
    database_role: Option<String>,

    /// Time to wait for Postgres to be there: 60s, 5m
    #[arg(long, env, default_value = "60s", value_parser = duration)]
    patience: Duration,

    #[command(flatten)]
    log: LogConfig,
}

/// Create or update the streams and consumers of all services
///
/// Doing it again changes nothing; what somebody has changed is changed back. Fails, after all the rest is done, if the
/// server does not change an option of what exists.
#[derive(Args)]
pub(crate) struct Provision {
    #[command(flatten)]
    nats: NatsConfig,

    /// Time to wait for NATS to be there: 60s, 5m
    #[arg(long, env, default_value = "60s", value_parser = duration)]
    patience: Duration,

    #[command(flatten)]
    log: LogConfig,
}

/// Ask the service in this container whether it can serve
///
/// For health checks, in an image that has nothing else to ask with.
#[derive(Args)]
pub(crate) struct Health {
    /// Address that the service listens on
    #[arg(long, env, default_value = "0.0.0.0:3000")]
    http_addr: SocketAddr,

    #[command(flatten)]
    log: LogConfig,
}

impl Task {
    pub(crate) fn log(&self) -> &LogConfig {
        match self {
            Self::Migrate(task) => &task.log,
            Self::Provision(task) => &task.log,
            Self::Health(task) => &task.log,
        }
    }

    pub(crate) async fn run(self, schema: &Schema) -> anyhow::Result<()> {
        match self {
            Self::Migrate(task) => {
                let role = task.database_role.as_deref();
                event_bus::migrate(&task.database_url, schema, role, task.patience).await?;
                tracing::info!(role, "the database is up to date");
            }
            Self::Provision(task) => {
                event_bus::provision(&task.nats.settings(), &task.nats.topology(), task.patience).await?;
                tracing::info!("streams and consumers are as they should be");
            }
            Self::Health(task) => ready(task.http_addr)?,
        }
        Ok(())
    }
}

/// Whether the service that listens on `address` can serve.
fn ready(mut address: SocketAddr) -> anyhow::Result<()> {
    const PATIENCE: Duration = Duration::from_secs(2);
    match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => address.set_ip(Ipv4Addr::LOCALHOST.into()),
        IpAddr::V6(ip) if ip.is_unspecified() => address.set_ip(Ipv6Addr::LOCALHOST.into()),
        _ => {}
    }
    let ask = || {
        let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(b"GET /readyz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).map(|_| answer)
    };
    let answer = ask().with_context(|| format!("nothing answers at {address}"))?;
    let status = answer.lines().next().unwrap_or_default();
    ensure!(status.starts_with("HTTP/1.1 200 "), "the service at {address} is not ready: {status}");
    Ok(())
}
