//! `cargo up`: the whole system on this machine.
//!
//! `stack tickets` and `stack orders` run the `main` of a service, so that `cargo up` and tests start all processes from one
//! binary.

mod system;
mod up;
mod welcome;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    stack::run_service().unwrap_or_else(|| up::run(&up::Up::parse()))
}
