//! The subcommands of a service: `migrate`, `provision`, `republish`, `recover`, `health`; and, if it has a replica, `verify` and
//! `rebuild`.
//!
//! Each runs once, with rights that the service itself does not need.

mod recover;
mod replica;

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use clap::{Args, Subcommand};
use event_bus::Schema;

use self::recover::Recover;
use self::replica::{Rebuild, Verify};
use crate::config::{DURATIONS, LogConfig, NatsConfig, SecretUrl, duration};

// Not a doc comment: it would replace the description of the service in `--help`.
// The exit code is 0 on success, 1 otherwise, with the reason; 3 if `recover` or `verify` found something.
#[derive(Subcommand)]
pub(crate) enum Task {
    Migrate(Migrate),
    // Boxed, because it is much larger than the others.
    Provision(Box<Provision>),
    Republish(Republish),
    // Boxed for the same reason.
    Recover(Box<Recover>),
    Verify(Box<Verify>),
    Rebuild(Rebuild),
    Health(Health),
}

/// The exit code of `recover` and `verify` if they found something.
const FOUND: u8 = 3;

/// Those of services with a replica.
pub(crate) const OF_REPLICAS: [&str; 2] = ["verify", "rebuild"];

/// Bring the database up to date, and let the service's role use it
///
/// Idempotent: repeated and concurrent runs change nothing.
#[derive(Args)]
#[command(after_help = DURATIONS)]
pub(crate) struct Migrate {
    /// The service's database, with the role that owns it: `postgres://owner:password@host/database`
    #[arg(long, env, hide_env_values = true)]
    database_url: SecretUrl,

    /// Role of the service: it gets the rights that the service needs, and no others
    #[arg(long, env)]
    database_role: Option<String>,

    /// Time to wait for Postgres: 60s, 5m
    #[arg(long, env, default_value = "60s", value_parser = duration)]
    patience: Duration,

    #[command(flatten)]
    log: LogConfig,
}

/// Create or update the streams and consumers of all services
///
/// Idempotent. Options that were changed by hand are changed back, except limits that were raised. Fails, after all other changes, if the server does not
/// change an option of an existing stream or consumer.
#[derive(Args)]
#[command(after_help = DURATIONS)]
pub(crate) struct Provision {
    #[command(flatten)]
    nats: NatsConfig,

    /// Time to wait for NATS: 60s, 5m
    #[arg(long, env, default_value = "60s", value_parser = duration)]
    patience: Duration,

    #[command(flatten)]
    log: LogConfig,
}

/// Publish the current state again, for readers that have missed events
///
/// Only records the request in the database: a running service does the work, and logs its progress. Readers that have the state
/// ignore it.
#[derive(Args)]
#[command(after_help = DURATIONS)]
pub(crate) struct Republish {
    #[command(flatten)]
    scope: Scope,

    /// The service's database: `postgres://user:password@host/database`
    #[arg(long, env, hide_env_values = true)]
    database_url: SecretUrl,

    #[command(flatten)]
    log: LogConfig,
}

/// What is published again.
#[derive(Args)]
#[group(required = true, multiple = false)]
struct Scope {
    /// Everything
    #[arg(long)]
    all: bool,

    /// What has changed in this last time: 2h, 30m
    #[arg(long, value_parser = duration)]
    since: Option<Duration>,

    /// These ids
    #[arg(long, num_args = 1..)]
    id: Vec<String>,
}

impl From<Scope> for event_bus::Republish {
    fn from(Scope { since, id, .. }: Scope) -> Self {
        match since {
            Some(since) => Self::Since(since),
            None if id.is_empty() => Self::All,
            None => Self::Ids(id),
        }
    }
}

/// Check whether the service in this container is ready
///
/// For health checks in an image without other programs.
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
            Self::Republish(task) => &task.log,
            Self::Recover(task) => &task.log,
            Self::Verify(task) => &task.log,
            Self::Rebuild(task) => &task.log,
            Self::Health(task) => &task.log,
        }
    }

    /// Whether its output is on stdout, so that the log goes to stderr.
    pub(crate) fn prints(&self) -> bool {
        matches!(self, Self::Verify(_))
    }

    pub(crate) async fn run(self, schema: &Schema) -> anyhow::Result<ExitCode> {
        match self {
            Self::Migrate(task) => {
                let role = task.database_role.as_deref();
                event_bus::migrate(task.database_url.expose(), schema, role, task.patience).await?;
                tracing::info!(role, "the database is up to date");
            }
            Self::Provision(task) => {
                let topology = task.nats.topology();
                event_bus::provision(&task.nats.settings(), &topology, task.patience).await?;
                tracing::info!(?topology, "streams and consumers are as they should be");
            }
            Self::Republish(task) => {
                if event_bus::request_republish(task.database_url.expose(), schema, task.scope.into()).await? {
                    tracing::info!("the request is recorded; the service has begun, and logs its progress");
                } else {
                    tracing::warn!(
                        "the request is recorded, and no service has begun within 5 s: start one. An earlier request may be under way"
                    );
                }
            }
            Self::Recover(task) => return task.run(schema).await,
            Self::Verify(task) => return task.run(schema).await,
            Self::Rebuild(task) => task.run(schema).await?,
            Self::Health(task) => ready(task.http_addr)?,
        }
        Ok(ExitCode::SUCCESS)
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
