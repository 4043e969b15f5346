//! Logs and metrics.
//!
//! Logs: one line per entry on stdout, or on stderr if the output of a command is on stdout, with times in UTC. Metrics: recorded with
//! the `metrics` crate, exposed at `/metrics` in the text format of Prometheus.

mod prometheus;

use std::io::IsTerminal as _;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::writer::BoxMakeWriter;

pub(crate) use prometheus::{keep, name_build, render, start_counting};

/// The format of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line, for machines.
    Json,
}

/// Starts logging with a filter in the syntax of `RUST_LOG`.
///
/// Only the first call has an effect: tests start several services in one process. Fails only if the filter is malformed.
pub fn init(format: LogFormat, filter: &str, to_stderr: bool) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(filter).with_context(|| format!("malformed log filter {filter:?}"))?;
    let (writer, is_terminal) = if to_stderr {
        (BoxMakeWriter::new(std::io::stderr), std::io::stderr().is_terminal())
    } else {
        (BoxMakeWriter::new(std::io::stdout), std::io::stdout().is_terminal())
    };
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(is_terminal).with_writer(writer);
    // An error means that a subscriber is already set.
    let _ = match format {
        LogFormat::Text => lines.try_init(),
        LogFormat::Json => lines.json().flatten_event(true).with_current_span(true).with_span_list(false).try_init(),
    };
    Ok(())
}

/// Permits one log line per minute, and counts the others.
pub(crate) struct Throttle(Mutex<(Option<Instant>, u64)>);

impl Throttle {
    pub(crate) const fn new() -> Self {
        Self(Mutex::new((None, 0)))
    }

    /// Returns how many lines were not logged since the last one, if the next one is due.
    pub(crate) fn pass(&self) -> Option<u64> {
        const PERIOD: Duration = Duration::from_mins(1);
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (last, unlogged) = &mut *state;
        if last.is_some_and(|last| last.elapsed() < PERIOD) {
            *unlogged += 1;
            return None;
        }
        *last = Some(Instant::now());
        Some(std::mem::take(unlogged))
    }
}
