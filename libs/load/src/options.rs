use crate::routes::Route;
use std::path::PathBuf;

/// Measures the system on this machine, and writes a report
///
/// Starts Postgres and NATS in containers that are removed afterwards, and the services as processes. Measures each route with
/// each number of connections. Each connection sends its next request when the previous response has arrived (a closed loop).
/// pgbench measures the database alone in the same run: the yardstick, to which throughput is compared. The report is Markdown,
/// with plots as SVG. docs/performance.md explains every figure.
///
/// The exit code is 1 if any request failed, or if the run could not be completed.
#[derive(Clone, Debug, clap::Parser)]
#[command(bin_name = "cargo load")]
pub struct Options {
    /// Numbers of connections
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "1,8,32,64,128,512",
          value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub connections: Vec<u16>,

    /// Routes to measure
    #[arg(long, value_name = "ROUTE,…", value_delimiter = ',', default_value = "post,put,get,list,orders,mix")]
    pub routes: Vec<Route>,

    /// Seconds per point
    #[arg(long, value_name = "N", default_value = "5", value_parser = clap::value_parser!(u16).range(1..))]
    pub seconds: u16,

    /// Seconds before each point that are not measured
    #[arg(long, value_name = "N", default_value = "1")]
    pub warm_up: u16,

    /// Tickets in the tables before the first point
    #[arg(long, value_name = "N", default_value = "10000", value_parser = clap::value_parser!(u64).range(1000..))]
    pub tickets: u64,

    /// Send this many requests per second (an open loop) instead of a closed loop
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub rate: Option<u32>,

    /// Events in the outbox for the measurement of a backlog; 0: none
    #[arg(long, value_name = "N", default_value = "200000")]
    pub backlog: u64,

    /// Limit the stream of tickets to this many MiB before a backlog: its owner trims it meanwhile
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..))]
    pub stream: Option<u64>,

    /// Measure the cost of a request with 10⁴, 10⁵ and 10⁶ tickets, and a backlog of a million events
    #[arg(long)]
    pub growth: bool,

    /// Also with 10⁷ tickets; implies --growth
    #[arg(long)]
    pub ten_million: bool,

    /// Measure POST tickets with 1 to 4 replicas of tickets
    #[arg(long)]
    pub replicas: bool,

    /// Directory of the report
    #[arg(long, value_name = "DIR", default_value = "target/load")]
    pub out: PathBuf,

    /// Send the load to another service with the same HTTP interface, such as <http://127.0.0.1:3000>, and start nothing
    #[arg(long, value_name = "URL", requires = "token")]
    pub against: Option<String>,

    /// The user's token (JWT) for --against
    #[arg(long, value_name = "JWT", requires = "against")]
    pub token: Option<String>,
}

impl Options {
    /// The sizes of the tables for `--growth`.
    pub(crate) fn sizes(&self) -> Vec<u64> {
        match (self.growth, self.ten_million) {
            (_, true) => vec![10_000, 100_000, 1_000_000, 10_000_000],
            (true, false) => vec![10_000, 100_000, 1_000_000],
            (false, false) => vec![],
        }
    }

    /// The sizes of the backlog.
    pub(crate) fn backlogs(&self) -> Vec<u64> {
        let large = (self.growth || self.ten_million).then_some(1_000_000);
        Some(self.backlog).filter(|&events| events > 0).into_iter().chain(large).collect()
    }
}
