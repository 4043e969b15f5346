//! The order in which everything is measured.

use crate::bench::Bench;
use crate::drive::Pace;
use crate::machine::Machine;
use crate::markdown::cells::line;
use crate::options::Options;
use crate::point::{Plan, Point};
use crate::progress::print;
use crate::report::Report;
use crate::routes::Route;
use crate::system::this_binary;
use crate::yardstick::{MOST_CONNECTIONS, Yardstick};
use crate::{backlog, growth, markdown, peer, plot, replicas};
use anyhow::{Context, Result};
use std::fs;
use std::path::Path;
use std::process::ExitCode;
use testkit::{Lock, announced, say};

/// The number of connections of the open loop, and of the closed loop that its rate is derived from.
const BUSY: u16 = 128;

/// Runs the benchmark.
pub fn run(options: &Options) -> ExitCode {
    let outcome = runtime().and_then(|runtime| runtime.block_on(measure(options)));
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            say(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// A quarter of the cores: the services and servers need the others.
fn runtime() -> Result<tokio::runtime::Runtime> {
    let workers = std::thread::available_parallelism()?.get().div_ceil(4);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(workers).enable_all().build();
    runtime.context("cannot start the runtime")
}

/// Returns whether all responses were as expected.
async fn measure(options: &Options) -> Result<bool> {
    let report = if let Some((url, token)) = options.against.as_ref().zip(options.token.as_ref()) {
        peer::measure(options, url, token).await?
    } else {
        let _lock = Lock::take("ticketing-load")?;
        Box::pin(measure_system(options)).await?
    };
    write(&report, &options.out)?;
    Ok(report.failures() == 0)
}

async fn measure_system(options: &Options) -> Result<Report> {
    let binary = this_binary()?;
    let mut bench = announced("starting the system", Bench::start(&binary, options.tickets)).await?;
    let mut report = Report::new(Some(Machine::describe(&mut bench).await?));
    measure_yardstick(options, &bench, &mut report).await?;
    measure_routes(options, &mut bench, &mut report).await?;
    if options.replicas {
        report.replicas = replicas::measure(options, &mut bench).await?;
    }
    if let Some(stream) = options.stream {
        backlog::limit(&bench, stream << 20).await?;
    }
    for events in options.backlogs() {
        report.backlogs.push(backlog::measure(&mut bench, events).await?);
    }
    // The other system gets the whole machine.
    drop(bench);
    report.growth = growth::measure(options, &binary, &options.sizes()).await?;
    Ok(report)
}

async fn measure_yardstick(options: &Options, bench: &Bench, report: &mut Report) -> Result<()> {
    let mut yardstick = Yardstick::prepare(&bench.system.postgres).await?;
    for &connections in options.connections.iter().filter(|&&connections| connections <= MOST_CONNECTIONS) {
        match yardstick.measure(connections, options.seconds).await {
            Ok(rate) => {
                print(&format!("yardstick, {connections} connections: {rate:.0}/s"));
                report.yardstick.push((connections, rate));
            }
            Err(error) => {
                say(&format!("no yardstick: {error:#}"));
                break;
            }
        }
    }
    Ok(())
}

async fn measure_routes(options: &Options, bench: &mut Bench, report: &mut Report) -> Result<()> {
    for &route in &options.routes {
        for &connections in &options.connections {
            let pace = options.rate.map_or(Pace::Closed, Pace::Open);
            let point = bench.measure(Plan::new(options, route, connections, pace)).await?;
            print(&line(&point));
            report.points.push(point);
        }
        if route == Route::Post && options.rate.is_none() {
            measure_half(options, bench, report).await?;
        }
    }
    Ok(())
}

/// An open loop at half of the rate that the closed loop reached.
async fn measure_half(options: &Options, bench: &mut Bench, report: &mut Report) -> Result<()> {
    let is_busy = |point: &&Point| point.plan.route == Route::Post && point.plan.connections == BUSY;
    let Some(busy) = report.points.iter().find(is_busy) else { return Ok(()) };
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate is positive and small")]
    let half = (busy.seen.rate / 2.0).max(1.0) as u32;
    let point = bench.measure(Plan::new(options, Route::Post, BUSY, Pace::Open(half))).await?;
    print(&line(&point));
    report.half = Some(point);
    Ok(())
}

/// Writes `report.md` and its plots into this directory.
fn write(report: &Report, directory: &Path) -> Result<()> {
    fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
    let plots = plot::write(report, directory).context("cannot write the plots")?;
    let path = directory.join("report.md");
    fs::write(&path, markdown::of(report, &plots)).with_context(|| format!("cannot write {}", path.display()))?;
    say(&format!("the report is {}", path.display()));
    Ok(())
}
