//! The plots of the report, as SVG. Text is drawn by the program that shows them, so no fonts are needed here.

use crate::growth::Size;
use crate::markdown::cost_ratio;
use crate::point::Point;
use crate::report::Report;
use crate::tally::Percentiles;
use anyhow::{Result, anyhow};
use plotters::prelude::*;
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

const SIZE: (u32, u32) = (900, 520);

/// Named points of a line. A point has the number of its place on the horizontal axis.
type Line = (String, Vec<(usize, f64)>);

/// A plot with a logarithmic vertical axis.
struct Plot {
    file: &'static str,
    title: &'static str,
    x: &'static str,
    y: &'static str,
    /// The labels of the horizontal axis, at equal distances.
    places: Vec<String>,
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
    let connections = report.connections();
    let place = |wanted| connections.iter().position(|connections| connections == wanted);
    let yardstick = report.yardstick.iter().filter_map(|(connections, rate)| Some((place(connections)?, *rate)));
    lines.push(("yardstick".to_owned(), yardstick.collect()));
    over_connections(report, "throughput.svg", "Throughput", "requests per second", lines)
}

fn latencies(report: &Report) -> Plot {
    let lines = percentiles(report, |point| Some(point.seen.latency));
    over_connections(report, "latency.svg", "Latency: p50 and p99", "ms", lines)
}

fn lags(report: &Report) -> Plot {
    let lines = percentiles(report, |point| point.lag);
    over_connections(report, "lag.svg", "Lag of the replica: p50 and p99", "ms", lines)
}

fn over_connections(
    report: &Report,
    file: &'static str,
    title: &'static str,
    y: &'static str,
    lines: Vec<Line>,
) -> Plot {
    let places = report.connections().iter().map(ToString::to_string).collect();
    Plot { file, title, x: "connections", y, places, lines }
}

fn growth(report: &Report) -> Plot {
    let smallest = report.growth.first().map_or(&[][..], |size| &size.points);
    let line = |(number, small): (usize, &Point)| {
        let ratio = |(place, size): (usize, &Size)| Some((place, cost_ratio(size.points.get(number)?, small)?));
        let points = report.growth.iter().enumerate().filter_map(ratio);
        (small.plan.route.to_string(), points.collect())
    };
    let lines = smallest.iter().enumerate().map(line).collect();
    let title = "CPU per request, relative to the smallest size";
    let places = report.growth.iter().map(|size| size.tickets.to_string()).collect();
    Plot { file: "growth.svg", title, x: "tickets", y: "ratio", places, lines }
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
        let at = |(place, connections)| Some((place, y(report.point(route, connections)?)?));
        let points = report.connections().into_iter().enumerate().filter_map(at);
        (route.to_string(), points.collect::<Vec<_>>())
    });
    lines.filter(|(_, points)| !points.is_empty()).collect()
}

impl Plot {
    fn draw(&self, path: &Path) -> Result<(), Box<dyn std::error::Error + '_>> {
        let area = SVGBackend::new(path, SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        let mut builder = ChartBuilder::on(&area);
        builder.caption(self.title, ("sans-serif", 20)).margin(12).x_label_area_size(40).y_label_area_size(70);
        // The end is the last place.
        let x = (0..self.places.len().saturating_sub(1)).into_segmented();
        let mut chart = builder.build_cartesian_2d(x, self.decades().log_scale())?;
        let place = |x: &SegmentValue<usize>| match x {
            SegmentValue::CenterOf(place) => self.places.get(*place).cloned().unwrap_or_default(),
            SegmentValue::Exact(_) | SegmentValue::Last => String::new(),
        };
        let mut mesh = chart.configure_mesh();
        mesh.x_desc(self.x).y_desc(self.y).x_label_formatter(&place).x_labels(self.places.len()).disable_x_mesh();
        mesh.draw()?;
        for (number, (name, points)) in self.lines.iter().enumerate() {
            let colour = Palette99::pick(number).stroke_width(2);
            let points = points.iter().map(|(place, y)| (SegmentValue::CenterOf(*place), *y));
            let line = chart.draw_series(LineSeries::new(points, colour).point_size(3))?;
            line.label(name).legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour));
        }
        let mut labels = chart.configure_series_labels();
        labels.position(SeriesLabelPosition::UpperLeft).background_style(WHITE.mix(0.8)).border_style(BLACK).draw()?;
        Ok(area.present()?)
    }

    /// Powers of ten around all values: the axis has labels only at these.
    fn decades(&self) -> Range<f64> {
        let values = || self.lines.iter().flat_map(|(_, points)| points).map(|(_, y)| *y).filter(|y| *y > 0.0);
        let (least, most) = (values().fold(f64::MAX, f64::min), values().fold(f64::MIN, f64::max));
        let below = 10_f64.powf(least.log10().floor());
        below..10_f64.powf(most.log10().ceil()).max(below * 10.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_axis_begins_and_ends_at_powers_of_ten() {
        let decades = |values: &[f64]| {
            let points = values.iter().copied().enumerate().collect();
            let lines = vec![("any".to_owned(), points)];
            Plot { file: "", title: "", x: "", y: "", places: Vec::new(), lines }.decades()
        };
        assert_eq!(decades(&[30.0, 0.0, 2_000.0]), 10.0..10_000.0);
        assert_eq!(decades(&[1.0, 1.0]), 1.0..10.0);
    }
}
