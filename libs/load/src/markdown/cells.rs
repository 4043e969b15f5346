use crate::drive::Pace;
use crate::point::{Costs, Point};
use crate::tally::Percentiles;
use std::fmt::Write;
use std::time::Duration;

/// A cell without a figure.
pub(crate) const NONE: &str = "–";

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

/// A section with a table. None without rows.
pub(crate) fn table(title: &str, head: &[&str], rows: Vec<Vec<String>>) -> Option<String> {
    if rows.is_empty() {
        return None;
    }
    let rows = rows.into_iter().map(|row| format!("| {} |\n", row.join(" | ")));
    let line = "---|".repeat(head.len());
    Some(format!("## {title}\n\n| {} |\n|{line}\n{}", head.join(" | "), rows.collect::<String>()))
}

pub(crate) fn costs(costs: &Costs) -> Vec<String> {
    let processes = [costs.tickets, costs.orders, costs.postgres, costs.nats];
    let each = processes.iter().map(|usage| costs.per_request(usage));
    let cpu = each.chain([costs.total(), costs.per_request(&costs.generator)]).map(|cpu| format!("{cpu:.0}"));
    let memory = [costs.tickets_memory, costs.orders_memory].map(megabytes);
    let written = [costs.postgres, costs.nats].map(|usage| match usage.written {
        Some(bytes) => (bytes / costs.requests.max(1)).to_string(),
        None => NONE.to_owned(),
    });
    cpu.chain(memory).chain(written).collect()
}

pub(crate) fn ratio(ratio: f64) -> String {
    format!("{ratio:.2}")
}

pub(crate) fn milliseconds(time: Duration) -> String {
    format!("{:.2}", time.as_secs_f64() * 1e3)
}

fn megabytes(kilobytes: u64) -> String {
    format!("{}.{}", kilobytes / 1024, kilobytes % 1024 * 10 / 1024)
}
