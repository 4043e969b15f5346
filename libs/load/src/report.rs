//! The report as Markdown. Ratios first; absolute figures are true for this machine only.

use crate::drive::Pace;
use crate::machine::Machine;
use crate::point::{Costs, Point};
use crate::routes::Route;
use crate::tally::Percentiles;
use anyhow::{Context, Result};
use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::time::Duration;
use testkit::say;

/// The number of connections of the summary.
const TYPICAL: u16 = 32;

/// Everything that was measured.
#[derive(Debug)]
pub struct Report {
    pub(crate) machine: Option<Machine>,
    /// Pairs of connections and statements per second.
    pub(crate) yardstick: Vec<(u16, f64)>,
    pub(crate) points: Vec<Point>,
    /// The open loop at half of the rate of the closed loop.
    pub(crate) half: Option<Point>,
}

impl Report {
    pub(crate) fn new(machine: Option<Machine>) -> Self {
        Self { machine, yardstick: Vec::new(), points: Vec::new(), half: None }
    }

    /// Requests that failed.
    pub(crate) fn failures(&self) -> u64 {
        self.all_points().flat_map(|point| &point.seen.failures).map(|(_, count)| count).sum()
    }

    fn all_points(&self) -> impl Iterator<Item = &Point> {
        self.points.iter().chain(&self.half)
    }

    /// The routes that were measured, in their order.
    pub(crate) fn routes(&self) -> Vec<Route> {
        let mut routes: Vec<_> = self.points.iter().map(|point| point.plan.route).collect();
        routes.dedup();
        routes
    }

    /// The numbers of connections that were measured, in their order.
    pub(crate) fn connections(&self) -> Vec<u16> {
        let mut connections: Vec<_> = self.points.iter().map(|point| point.plan.connections).collect();
        connections.sort_unstable();
        connections.dedup();
        connections
    }

    fn point(&self, route: Route, connections: u16) -> Option<&Point> {
        self.points.iter().find(|point| (point.plan.route, point.plan.connections) == (route, connections))
    }

    /// The yardstick at this number of connections, or at the greatest that is smaller.
    fn yardstick_at(&self, connections: u16) -> Option<f64> {
        self.yardstick.iter().rfind(|(measured, _)| *measured <= connections).map(|(_, rate)| *rate)
    }

    fn ratio(&self, point: &Point) -> Option<f64> {
        Some(point.seen.rate / self.yardstick_at(point.plan.connections)?)
    }

    fn markdown(&self) -> String {
        let sections = [
            self.introduction(),
            self.summary(),
            self.throughput(),
            self.latencies(),
            self.costs(),
            self.lags(),
            self.half_load(),
            self.failed(),
        ];
        sections.into_iter().flatten().collect::<Vec<_>>().join("\n")
    }

    fn introduction(&self) -> Option<String> {
        let mut text =
            "# Load report\n\nWhat each figure means and how it is measured: docs/performance.md.\n".to_owned();
        if let Some(machine) = &self.machine {
            let Machine { cores, memory, processor, postgres, nats, is_proxied } = machine;
            text += &format!("\n{cores} cores, {memory}, {processor}; Postgres {postgres}, NATS {nats}.\n");
            text += "Services, servers and the load generator share this machine.\n";
            if *is_proxied {
                text += "The services connect to published ports: Docker's proxy is a part of every figure.\n";
            }
        }
        Some(text)
    }

    fn summary(&self) -> Option<String> {
        let rows: Vec<_> = self
            .routes()
            .into_iter()
            .filter_map(|route| {
                let ratio = self.ratio(self.point(route, TYPICAL)?)?;
                Some(format!("| {route} | {ratio:.2} |"))
            })
            .collect();
        (!rows.is_empty()).then(|| {
            let title = format!("## Throughput at {TYPICAL} connections, relative to the yardstick");
            table(&title, &["route", "ratio"], &rows)
        })
    }

    fn throughput(&self) -> Option<String> {
        let routes = self.routes();
        let mut head = vec!["connections".to_owned(), "yardstick /s".to_owned()];
        head.extend(routes.iter().map(ToString::to_string));
        let rows: Vec<_> = self
            .connections()
            .into_iter()
            .map(|connections| {
                let yardstick = self.yardstick_at(connections).map_or("–".to_owned(), |rate| format!("{rate:.0}"));
                let cells = routes.iter().map(|route| {
                    self.point(*route, connections).map_or("–".to_owned(), |point| {
                        let ratio = self.ratio(point).map_or(String::new(), |ratio| format!("{ratio:.2} "));
                        format!("{ratio}({:.0}/s)", point.seen.rate)
                    })
                });
                format!("| {connections} | {yardstick} | {} |", cells.collect::<Vec<_>>().join(" | "))
            })
            .collect();
        let head: Vec<_> = head.iter().map(String::as_str).collect();
        Some(table("## Throughput against connections, relative to the yardstick", &head, &rows))
    }

    fn latencies(&self) -> Option<String> {
        let rows = self.rows(|point| {
            let Percentiles { p50, p99, p999, .. } = point.seen.latency;
            Some([p50, p99, p999].map(milliseconds).join(" | "))
        });
        Some(table("## Latency, ms", &["route", "connections", "p50", "p99", "p99.9"], &rows))
    }

    fn costs(&self) -> Option<String> {
        let rows = self.rows(|point| point.costs.as_ref().map(cost_cells));
        let head = [
            "route",
            "connections",
            "tickets",
            "orders",
            "Postgres",
            "NATS",
            "sum",
            "generator",
            "tickets MB",
            "orders MB",
            "Postgres B",
            "NATS B",
        ];
        let title = "## Cost: µs of CPU per request; peak memory of a service; bytes written per request";
        Some(match rows.is_empty() {
            true => format!("{title}\n\nNot measured: this machine shows no processes of the containers.\n"),
            false => table(title, &head, &rows),
        })
    }

    fn lags(&self) -> Option<String> {
        let rows = self.rows(|point| {
            let lag = point.lag.map_or(["–"; 4].map(str::to_owned), |lag| {
                [lag.count.to_string(), milliseconds(lag.p50), milliseconds(lag.p99), milliseconds(lag.max)]
            });
            Some(format!("{} | {} | {}", lag.join(" | "), point.outbox, milliseconds(point.drain)))
        });
        let head = ["route", "connections", "probes", "p50", "p99", "max", "outbox at the end", "drain"];
        Some(table(
            "## Lag from the response to visible in the replica, ms; events in the outboxes; drain, ms",
            &head,
            &rows,
        ))
    }

    fn half_load(&self) -> Option<String> {
        let point = self.half.as_ref()?;
        let lag = point.lag?;
        let row = [point.seen.latency.p50, point.seen.latency.p99, lag.p50, lag.p99].map(milliseconds).join(" | ");
        let title = format!(
            "## {} in an open loop, at half of the rate at {} connections, ms",
            point.plan.route, point.plan.connections
        );
        Some(table(&title, &["latency p50", "latency p99", "lag p50", "lag p99"], &[format!("| {row} |")]))
    }

    fn failed(&self) -> Option<String> {
        let rows: Vec<_> = self
            .all_points()
            .flat_map(|point| {
                point.seen.failures.iter().map(|(what, count)| {
                    format!("| {} | {} | {what} | {count} |", point.plan.route, point.plan.connections)
                })
            })
            .collect();
        (!rows.is_empty()).then(|| table("## Failed requests", &["route", "connections", "what", "number"], &rows))
    }

    /// A row for each point for which there are cells.
    fn rows(&self, cells: impl Fn(&Point) -> Option<String>) -> Vec<String> {
        let row =
            |point: &Point| Some(format!("| {} | {} | {} |", point.plan.route, point.plan.connections, cells(point)?));
        self.points.iter().filter_map(row).collect()
    }
}

/// Writes `report.md` into this directory.
pub(crate) fn write(report: &Report, directory: &Path) -> Result<()> {
    fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
    let path = directory.join("report.md");
    fs::write(&path, report.markdown()).with_context(|| format!("cannot write {}", path.display()))?;
    say(&format!("the report is {}", path.display()));
    Ok(())
}

/// A point in one line.
pub(crate) fn line(point: &Point) -> String {
    let mut line = format!("{}, {} connections", point.plan.route, point.plan.connections);
    if let Pace::Open(rate) = point.plan.pace {
        let _ = write!(line, ", {rate}/s due");
    }
    let Percentiles { p50, p99, .. } = point.seen.latency;
    let _ = write!(line, ": {:.0}/s, p50 {} ms, p99 {} ms", point.seen.rate, milliseconds(p50), milliseconds(p99));
    if let Some(lag) = point.lag {
        let _ = write!(line, "; lag p50 {} ms, p99 {} ms", milliseconds(lag.p50), milliseconds(lag.p99));
    }
    for (what, count) in &point.seen.failures {
        let _ = write!(line, "; FAILED {count}: {what}");
    }
    line
}

fn cost_cells(costs: &Costs) -> String {
    let mut cells: Vec<_> = [costs.tickets, costs.orders, costs.postgres, costs.nats]
        .iter()
        .map(|usage| format!("{:.0}", costs.per_request(usage)))
        .collect();
    cells.push(format!("{:.0}", costs.total()));
    cells.push(format!("{:.0}", costs.per_request(&costs.generator)));
    cells.extend([costs.tickets_memory, costs.orders_memory].map(|kilobytes| format!("{:.1}", megabytes(kilobytes))));
    cells.extend(
        [costs.postgres, costs.nats]
            .map(|usage| usage.written.map_or("–".to_owned(), |bytes| (bytes / costs.requests.max(1)).to_string())),
    );
    cells.join(" | ")
}

#[expect(clippy::cast_precision_loss, reason = "memory in MB needs no 52 bits")]
fn megabytes(kilobytes: u64) -> f64 {
    kilobytes as f64 / 1024.0
}

fn table(title: &str, head: &[&str], rows: &[String]) -> String {
    let line = "---|".repeat(head.len());
    format!("{title}\n\n| {} |\n|{line}\n{}\n", head.join(" | "), rows.join("\n"))
}

fn milliseconds(time: Duration) -> String {
    format!("{:.2}", time.as_secs_f64() * 1e3)
}
