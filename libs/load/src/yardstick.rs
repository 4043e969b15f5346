//! The yardstick: pgbench with a statement like that of `POST /api/tickets`, in a database that no service uses.
//!
//! Each client of pgbench sends one row and one event per statement. So the figure is what the database does for a service that
//! does not coalesce writes, and needs no CPU itself.

use crate::records::execute;
use anyhow::{Context, Result, ensure};
use sqlx::{Connection, PgConnection};
use stack::services::TICKETS;
use std::process::Stdio;
use std::time::Duration;
use testkit::Postgres;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

const SCRIPT: &str = include_str!("yardstick.sql");

/// More are not measured: Postgres has 300 connections, and the services need some.
pub const MOST_CONNECTIONS: u16 = 128;

/// Runs pgbench in the container of Postgres. Its password and user are those of the superuser.
const RUN: &str = r#"
    PATH="$PATH:$(echo /usr/lib/postgresql/*/bin)"
    PGUSER=postgres PGPASSWORD=postgres exec pgbench --no-vacuum --protocol prepared --file - "$@"
"#;

/// A database with the tables of tickets.
pub struct Yardstick {
    container: String,
    database: String,
    connection: PgConnection,
}

impl Yardstick {
    /// Creates the database.
    pub async fn prepare(postgres: &Postgres) -> Result<Self> {
        let url = postgres.database("yardstick").await?;
        Box::pin(event_bus::migrate(&url, &(TICKETS.schema)(), None, Duration::from_mins(1))).await?;
        let database = url.rsplit('/').next().unwrap_or_default().to_owned();
        Ok(Self { container: postgres.id().to_owned(), database, connection: PgConnection::connect(&url).await? })
    }

    /// Statements per second on this many connections.
    pub async fn measure(&mut self, connections: u16, seconds: u16) -> Result<f64> {
        execute(&mut self.connection, "truncate tickets, bus.outbox".to_owned()).await?;
        let threads = std::thread::available_parallelism()?.get().min(usize::from(connections));
        let mut docker = Command::new("docker");
        docker.args(["exec", "--interactive", &self.container, "sh", "-c", RUN, "pgbench"]);
        docker.args(["--client", &connections.to_string(), "--jobs", &threads.to_string()]);
        docker.args(["--time", &seconds.to_string(), &self.database]);
        docker.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut pgbench = docker.spawn().context("cannot run docker")?;
        let mut script = pgbench.stdin.take().context("stdin is a pipe")?;
        script.write_all(SCRIPT.as_bytes()).await?;
        drop(script);
        let output = pgbench.wait_with_output().await?;
        let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        ensure!(output.status.success(), "pgbench failed: {}", stderr.trim());
        rate(&stdout).with_context(|| format!("pgbench printed no rate: {stdout}"))
    }
}

/// Reads `tps = 11398.1 (without initial connection time)`.
fn rate(printed: &str) -> Option<f64> {
    printed.lines().find_map(|line| line.strip_prefix("tps = "))?.split(' ').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_read() {
        let printed = "latency average = 2.8 ms\ntps = 11398.25 (without initial connection time)\n";
        assert_eq!(rate(printed), Some(11398.25));
    }
}
