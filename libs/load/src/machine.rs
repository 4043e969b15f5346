//! The machine that was measured on.

use crate::bench::Bench;
use crate::records::text;
use anyhow::Result;
use std::fs;
use testkit::Client;

/// What a reader must know to compare two reports.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Cores that this process may use.
    pub cores: usize,
    /// Such as `15.6 GB`.
    pub memory: String,
    /// As the processor names itself.
    pub processor: String,
    /// The version of Postgres.
    pub postgres: String,
    /// The version of NATS.
    pub nats: String,
    /// Whether services connect through Docker's proxy.
    pub is_proxied: bool,
}

impl Machine {
    /// This machine, and the servers of the system.
    pub async fn describe(bench: &mut Bench) -> Result<Self> {
        let varz = Client::new(&bench.system.nats.monitoring_url()).get("/varz").await?.expect(200)?;
        Ok(Self {
            cores: std::thread::available_parallelism()?.get(),
            memory: memory().unwrap_or_else(|| "unknown memory".to_owned()),
            processor: processor().unwrap_or_else(|| "unknown processor".to_owned()),
            postgres: text(&mut bench.records.tickets, "show server_version").await?,
            nats: varz["version"].as_str().unwrap_or("unknown").to_owned(),
            is_proxied: bench.system.is_proxied(),
        })
    }
}

fn memory() -> Option<String> {
    let kilobytes: u64 = field("/proc/meminfo", "MemTotal")?.split(' ').next()?.parse().ok()?;
    Some(format!("{}.{} GB", kilobytes / 1_000_000, kilobytes / 100_000 % 10))
}

fn processor() -> Option<String> {
    field("/proc/cpuinfo", "model name")
}

/// The value of a line `name : value`.
fn field(file: &str, name: &str) -> Option<String> {
    let text = fs::read_to_string(file).ok()?;
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}
