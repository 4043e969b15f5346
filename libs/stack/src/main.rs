//! `cargo up`: the whole system on this machine.
//!
//! `stack tickets` and `stack orders` run the `main` of a service, so that `cargo up` and tests start all processes from one
//! binary. In an image the binary gets the arguments of a service, and the variable `STACK_SERVICE` names the service.

mod system;
mod up;
mod welcome;

use clap::Parser;
use stack::services::SERVICES;
use std::process::ExitCode;

fn main() -> ExitCode {
    let named = std::env::var_os("STACK_SERVICE");
    let mut args = named.into_iter().chain(std::env::args_os().skip(1)).peekable();
    let service = args.peek().and_then(|name| SERVICES.iter().find(|service| name == service.name));
    match service {
        Some(service) => {
            testkit::end_with_parent();
            (service.main)(&mut args)
        }
        None => up::run(&up::Up::parse()),
    }
}
