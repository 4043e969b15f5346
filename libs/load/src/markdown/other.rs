use super::cells::{NONE, milliseconds, ratio, table};
use crate::backlog::Backlog;
use crate::growth::Size;
use crate::point::Point;
use crate::report::Report;
use std::time::Duration;

/// The open loop at half of the rate.
pub(super) fn half_load(report: &Report) -> Option<String> {
    let point = report.half.as_ref()?;
    let lag = point.lag?;
    let row = [point.seen.latency.p50, point.seen.latency.p99, lag.p50, lag.p99].map(milliseconds);
    let (route, connections) = (point.plan.route, point.plan.connections);
    let title = format!("{route}, open loop at half of the rate of {connections} connections, ms");
    table(&title, &["latency p50", "latency p99", "lag p50", "lag p99"], vec![row.into()])
}

pub(super) fn replicas(report: &Report) -> Option<String> {
    let single = report.replicas.first()?.seen.rate;
    let row = |(replicas, point): (usize, &Point)| vec![replicas.to_string(), ratio(point.seen.rate / single)];
    let rows = (1..).zip(&report.replicas).map(row).collect();
    table("Throughput of POST tickets, relative to one replica of tickets", &["replicas", "ratio"], rows)
}

pub(super) fn backlogs(report: &Report) -> Option<String> {
    let row = |backlog: &Backlog| {
        let start = backlog.start_full.as_secs_f64() / backlog.start_empty.as_secs_f64();
        let rates = [backlog.relayed, backlog.applied].map(|time| per_second(backlog.events, time));
        let cells = [backlog.events.to_string()].into_iter().chain(rates);
        cells.chain([ratio(start), (backlog.stream_bytes >> 20).to_string()]).collect()
    };
    let head = [
        "events in the outbox",
        "published /s",
        "applied /s",
        "start, relative to an empty outbox",
        "stream at most, MiB",
    ];
    table("Backlog", &head, report.backlogs.iter().map(row).collect())
}

/// Cost and throughput relative to the smallest size.
pub(super) fn growth(report: &Report) -> Option<String> {
    let smallest = report.growth.first()?;
    let row = |size: &Size| {
        let cells = size.points.iter().zip(&smallest.points).map(|(point, small)| {
            let cost = cost_ratio(point, small).map_or(NONE.to_owned(), ratio);
            format!("{cost} ({})", ratio(point.seen.rate / small.seen.rate))
        });
        [size.tickets.to_string()].into_iter().chain(cells).collect()
    };
    let routes = smallest.points.iter().map(|point| point.plan.route.to_string());
    let head: Vec<_> = ["tickets".to_owned()].into_iter().chain(routes).collect();
    let head: Vec<_> = head.iter().map(String::as_str).collect();
    let title = "CPU per request (throughput) against size, relative to the smallest";
    table(title, &head, report.growth.iter().map(row).collect())
}

/// CPU per request, relative to that of another point.
pub(crate) fn cost_ratio(point: &Point, other: &Point) -> Option<f64> {
    Some(point.costs?.total() / other.costs?.total())
}

pub(super) fn failed(report: &Report) -> Option<String> {
    let rows = report.all_points().flat_map(|point| {
        let plan = point.plan;
        let row = move |(what, count): &(String, u64)| {
            vec![plan.route.to_string(), plan.connections.to_string(), what.clone(), count.to_string()]
        };
        point.seen.failures.iter().map(row)
    });
    table("Failed requests", &["route", "connections", "what", "number"], rows.collect())
}

#[expect(clippy::cast_precision_loss, reason = "a rate needs no 52 bits")]
fn per_second(events: u64, time: Duration) -> String {
    format!("{:.0}", events as f64 / time.as_secs_f64())
}
