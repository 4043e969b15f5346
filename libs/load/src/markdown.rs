//! The report as Markdown. Ratios first; absolute figures are true for one machine only.

pub(crate) mod cells;
mod other;

use crate::machine::Machine;
use crate::point::Point;
use crate::report::Report;
use crate::tally::Percentiles;
use cells::{NONE, costs, milliseconds, ratio, table};
pub(crate) use other::cost_ratio;

/// The number of connections of the summary.
const TYPICAL: u16 = 32;

/// The text of the report, with these images.
pub(crate) fn of(report: &Report, plots: &[&str]) -> String {
    let sections = [
        Some(introduction(report)),
        summary(report),
        throughput(report),
        latencies(report),
        lags(report),
        other::half_load(report),
        cost(report),
        other::replicas(report),
        other::backlogs(report),
        other::growth(report),
        other::failed(report),
        images(plots),
    ];
    sections.into_iter().flatten().collect::<Vec<_>>().join("\n")
}

fn introduction(report: &Report) -> String {
    let title = "# Load report\n\ndocs/performance.md says what each figure means and how it is measured.\n";
    let Some(Machine { cores, memory, processor, postgres, nats, is_proxied }) = &report.machine else {
        return title.to_owned();
    };
    let proxied = "The services connect to published ports, so the CPU of Docker's proxy is missing in the costs.\n";
    format!(
        "{title}\nMachine: {cores} cores, {memory}, {processor}. Postgres {postgres}, NATS {nats}.\n\
         Services, servers and the load generator share this machine.\n{}",
        if *is_proxied { proxied } else { "" }
    )
}

fn summary(report: &Report) -> Option<String> {
    let row = |route| {
        let point = report.point(route, TYPICAL)?;
        Some(vec![route.to_string(), ratio(report.ratio(point)?)])
    };
    let title = format!("Throughput at {TYPICAL} connections, relative to the yardstick");
    table(&title, &["route", "ratio"], report.routes().into_iter().filter_map(row).collect())
}

fn throughput(report: &Report) -> Option<String> {
    let routes = report.routes();
    let head =
        ["connections", "yardstick"].into_iter().map(str::to_owned).chain(routes.iter().map(ToString::to_string));
    let row = |connections: u16| {
        let yardstick = report.yardstick_at(connections).map_or(NONE.to_owned(), |rate| format!("{rate:.0}/s"));
        let points = routes.iter().map(|route| report.point(*route, connections));
        let cells = points.map(|point| point.map_or(NONE.to_owned(), |point| against_yardstick(report, point)));
        [connections.to_string(), yardstick].into_iter().chain(cells).collect()
    };
    let rows = report.connections().into_iter().map(row).collect();
    let head: Vec<_> = head.collect();
    let head: Vec<_> = head.iter().map(String::as_str).collect();
    table("Throughput against connections: ratio to the yardstick (requests per second)", &head, rows)
}

fn against_yardstick(report: &Report, point: &Point) -> String {
    match report.ratio(point) {
        Some(to_yardstick) => format!("{} ({:.0}/s)", ratio(to_yardstick), point.seen.rate),
        None => format!("{:.0}/s", point.seen.rate),
    }
}

fn latencies(report: &Report) -> Option<String> {
    let rows = rows(report, |point| {
        let Percentiles { p50, p99, p999, .. } = point.seen.latency;
        Some([p50, p99, p999].map(milliseconds).into())
    });
    table("Latency, ms", &["route", "connections", "p50", "p99", "p99.9"], rows)
}

fn lags(report: &Report) -> Option<String> {
    let rows = rows(report, |point| {
        let rest = point.rest?;
        let lag = point.lag.map_or([NONE; 4].map(str::to_owned), |lag| {
            [lag.count.to_string(), milliseconds(lag.p50), milliseconds(lag.p99), milliseconds(lag.max)]
        });
        let changes = point.plan.route.is_change();
        changes.then(|| lag.into_iter().chain([rest.events.to_string(), milliseconds(rest.drain)]).collect())
    });
    let head = ["route", "connections", "probes", "p50", "p99", "max", "events in the outboxes", "drain"];
    table(
        "Lag from the response to visible in the replica, ms; the outboxes at the end, and their drain, ms",
        &head,
        rows,
    )
}

fn cost(report: &Report) -> Option<String> {
    let rows = rows(report, |point| point.costs.as_ref().map(costs));
    let head = [
        "route",
        "connections",
        "tickets",
        "orders",
        "Postgres",
        "NATS",
        "sum",
        "generator",
        "tickets, MB",
        "orders, MB",
        "Postgres, B",
        "NATS, B",
    ];
    let title = "Cost: µs of CPU per request; peak memory of a service, MB; bytes written per request";
    let measured = table(title, &head, rows);
    let missing = "## Cost\n\nNot measured: this machine does not show the processes of the containers.\n".to_owned();
    measured.or_else(|| report.machine.is_some().then_some(missing))
}

fn images(plots: &[&str]) -> Option<String> {
    let images: Vec<_> = plots.iter().map(|file| format!("![{}]({file})\n", file.trim_end_matches(".svg"))).collect();
    (!images.is_empty()).then(|| format!("## Plots\n\n{}", images.join("\n")))
}

/// A row for each point for which there are cells.
fn rows(report: &Report, cells: impl Fn(&Point) -> Option<Vec<String>>) -> Vec<Vec<String>> {
    let row = |point: &Point| {
        let names = [point.plan.route.to_string(), point.plan.connections.to_string()];
        Some(names.into_iter().chain(cells(point)?).collect())
    };
    report.points.iter().filter_map(row).collect()
}
