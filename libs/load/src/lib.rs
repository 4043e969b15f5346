//! The benchmark that anyone can run: `cargo load`.
//!
//! It starts the whole system, sends requests, and measures throughput, latency, lag, CPU, memory and bytes written. The
//! yardstick, pgbench with the same kind of statement, runs in the same run, and the report gives ratios to it.
//! `docs/performance.md` explains every figure.
//!
//! Read [`system`] and [`records`] (what is measured), [`routes`], [`http`], [`drive`], [`tally`] (the load), [`lag`] and
//! [`usage`] (what is measured beside it), [`point`] and [`mod@bench`], [`yardstick`]; then `run`, which calls `growth`,
//! `backlog`, `replicas` and `peer`, and writes the `report` with `markdown` and `plot`.

mod backlog;
pub mod bench;
pub mod drive;
mod growth;
pub mod http;
pub mod lag;
mod machine;
mod markdown;
mod options;
mod peer;
mod plot;
pub mod point;
mod progress;
pub mod records;
mod replicas;
mod report;
pub mod routes;
mod run;
pub mod system;
pub mod tally;
pub mod usage;
pub mod yardstick;

pub use options::Options;
pub use run::run;
