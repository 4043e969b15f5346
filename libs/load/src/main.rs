//! `cargo load`: the benchmark that anyone can run.
//!
//! `load tickets` and `load orders` run the `main` of a service, so that all processes start from this binary.

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    stack::run_service().unwrap_or_else(|| load::run(&load::Options::parse()))
}
