//! A service as a process: configuration, signals, exit codes.

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser;
use event_bus::Schema;
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::{error, info, warn};

use super::Running;
use super::command::Command;
use crate::config::Config;
use crate::telemetry;

/// Runs a service until SIGTERM or SIGINT, or runs one of its subcommands.
///
/// A service stops within the configured grace. `migrate` applies the migrations of `schema`, `provision` creates streams and
/// consumers, `republish` publishes the current state again, `recover` shows what an older database would take over, `health` checks whether
/// the service is ready. If `schema` has a replica, `verify` compares it with its owner, and `rebuild` repairs it.
///
/// The exit code is
/// - 0 after a clean stop or a successful subcommand;
/// - 130 or 143 if a second signal came while stopping, which ends the process at once;
/// - 2 if the configuration is wrong;
/// - 3 if `recover` found something that would be taken over, or `verify` a difference;
/// - 1 if the service could not start, did not stop in time, or a part of it ended by itself, or if a subcommand failed.
pub fn main<C, F>(args: impl IntoIterator<Item = OsString>, schema: &Schema, start: fn(C) -> F) -> ExitCode
where
    C: Parser + AsRef<Config>,
    F: Future<Output = anyhow::Result<Running>>,
{
    let name = C::command().get_name().to_owned();
    let command = Command::<C>::parse(args, schema);
    let (log, prints) = match &command {
        Command::Serve(config) => (&config.as_ref().log, false),
        Command::Do(task) => (task.log(), task.prints()),
    };
    let runtime = telemetry::init(log.format, &log.filter, prints).and_then(|()| Ok(Runtime::new()?));
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("{name}: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    let outcome = match command {
        Command::Serve(config) => {
            info!(service = name, config = ?config.as_ref(), "starting");
            runtime.block_on(live(start(config)))
        }
        Command::Do(task) => runtime.block_on(task.run(schema)),
    };
    let code = outcome.unwrap_or_else(|error| {
        error!(error = format!("{error:#}"), "ended");
        ExitCode::FAILURE
    });
    // Tasks that still run were aborted, and must not keep the process running.
    runtime.shutdown_background();
    code
}

async fn live(start: impl Future<Output = anyhow::Result<Running>>) -> anyhow::Result<ExitCode> {
    let mut signals = Signals::new()?;
    let mut running = tokio::select! {
        started = start => started.context("cannot start")?,
        // No request has been accepted yet.
        _ = signals.next() => return Ok(ExitCode::SUCCESS),
    };
    let failure = tokio::select! {
        failure = running.wait() => {
            error!(error = format!("{failure:#}"), "stopping, because a part of the service ended");
            Err(failure)
        }
        name = signals.next() => {
            info!(signal = name.0, "stopping");
            Ok(())
        }
    };
    tokio::select! {
        stopped = running.stop() => failure.and(stopped)?,
        (name, code) = signals.next() => {
            warn!(signal = name, "ending at once");
            return Ok(ExitCode::from(code));
        }
    }
    info!("stopped");
    Ok(ExitCode::SUCCESS)
}

/// The two signals that stop a process gracefully.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> anyhow::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// Waits for the next signal. Returns its name, and the exit code of a process that it ends.
    async fn next(&mut self) -> (&'static str, u8) {
        tokio::select! {
            _ = self.terminate.recv() => ("SIGTERM", 143),
            _ = self.interrupt.recv() => ("SIGINT", 130),
        }
    }
}
