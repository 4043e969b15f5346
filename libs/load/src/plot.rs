//! The plots of the report, as SVG. Text is drawn by the program that shows them, so no fonts are needed here.

use crate::markdown::cost_ratio;
use crate::point::Point;
use crate::report::Report;
use crate::tally::Percentiles;
use anyhow::{Result, anyhow};
use plotters::prelude::*;
use std::path::Path;
use std::time::Duration;

const SIZE: (u32, u32) = (900, 520);

/// Named points of a line.
type Line = (String, Vec<(f64, f64)>);

/// A plot with logarithmic axes.
struct Plot {
    file: &'static str,
    title: &'static str,
    x: &'static str,
    y: &'static str,
    lines: Vec<Line>,
}

/// Writes the plots for which there are points. Returns the names of their files.
pub(crate) fn write(report: &Report, directory: &Path) -> Result<Vec<&'static str>> {
    let plots = [throughput(report), latencies(report), lags(report), growth(report)];
    let mut files = Vec::new();
    for plot in plots.into_iter().filter(|plot| plot.lines.iter().any(|(_, points)| points.len() > 1)) {
        plot.draw(&directory.join(plot.file)).map_err(|error| anyhow!("{}: {error}", plot.file))?;
        files.push(plot.file);
    }
    Ok(files)
}

fn throughput(report: &Report) -> Plot {
    let mut lines = by_route(report, |point| Some(point.seen.rate));
    lines.push(("yardstick".to_owned(), report.yardstick.iter().map(|(x, rate)| (f64::from(*x), *rate)).collect()));
    Plot { file: "throughput.svg", title: "Throughput", x: "connections", y: "requests per second", lines }
}

fn latencies(report: &Report) -> Plot {
    let lines = percentiles(report, |point| Some(point.seen.latency));
    Plot { file: "latency.svg", title: "Latency: p50 and p99", x: "connections", y: "ms", lines }
}

fn lags(report: &Report) -> Plot {
    let lines = percentiles(report, |point| point.lag);
    Plot { file: "lag.svg", title: "Lag of the replica: p50 and p99", x: "connections", y: "ms", lines }
}

fn growth(report: &Report) -> Plot {
    let smallest = report.growth.first().map_or(&[][..], |size| &size.points);
    let line = |(number, small): (usize, &Point)| {
        let points = report.growth.iter().filter_map(|size| {
            #[expect(clippy::cast_precision_loss, reason = "a position in a plot needs no 52 bits")]
            let tickets = size.tickets as f64;
            Some((tickets, cost_ratio(size.points.get(number)?, small)?))
        });
        (small.plan.route.to_string(), points.collect())
    };
    let lines = smallest.iter().enumerate().map(line).collect();
    let title = "CPU per request, relative to the smallest size";
    Plot { file: "growth.svg", title, x: "tickets", y: "ratio", lines }
}

fn percentiles(report: &Report, of: impl Fn(&Point) -> Option<Percentiles>) -> Vec<Line> {
    let named = |name: &str, time: fn(Percentiles) -> Duration| {
        let lines = by_route(report, |point| Some(time(of(point)?).as_secs_f64() * 1e3));
        lines.into_iter().map(|(route, points)| (format!("{route} {name}"), points)).collect::<Vec<_>>()
    };
    let (medians, tails) = (named("p50", |times| times.p50), named("p99", |times| times.p99));
    medians.into_iter().zip(tails).flat_map(|(median, tail)| [median, tail]).collect()
}

/// A line for each route over the numbers of connections.
fn by_route(report: &Report, y: impl Fn(&Point) -> Option<f64>) -> Vec<Line> {
    let lines = report.routes().into_iter().map(|route| {
        let points = report
            .connections()
            .into_iter()
            .filter_map(|connections| Some((f64::from(connections), y(report.point(route, connections)?)?)));
        (route.to_string(), points.collect::<Vec<_>>())
    });
    lines.filter(|(_, points)| !points.is_empty()).collect()
}

impl Plot {
    fn draw(&self, path: &Path) -> Result<(), Box<dyn std::error::Error + '_>> {
        let points = || self.lines.iter().flat_map(|(_, points)| points);
        let x = range(points().map(|point| point.0));
        let y = range(points().map(|point| point.1));
        let area = SVGBackend::new(path, SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        let mut builder = ChartBuilder::on(&area);
        builder.caption(self.title, ("sans-serif", 20)).margin(12).x_label_area_size(40).y_label_area_size(70);
        let mut chart = builder.build_cartesian_2d(x.log_scale(), y.log_scale())?;
        chart.configure_mesh().x_desc(self.x).y_desc(self.y).light_line_style(WHITE).draw()?;
        for (number, (name, points)) in self.lines.iter().enumerate() {
            let colour = Palette99::pick(number).stroke_width(2);
            let line = chart.draw_series(LineSeries::new(points.iter().copied(), colour).point_size(3))?;
            line.label(name).legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour));
        }
        let position = SeriesLabelPosition::UpperLeft;
        chart
            .configure_series_labels()
            .position(position)
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK)
            .draw()?;
        Ok(area.present()?)
    }
}

/// From below the smallest to above the greatest value.
fn range(values: impl Iterator<Item = f64>) -> std::ops::Range<f64> {
    let (least, most) = values.fold((f64::MAX, f64::MIN), |(least, most), value| (least.min(value), most.max(value)));
    (least * 0.9).max(1e-3)..most * 1.2
}
