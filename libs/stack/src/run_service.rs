use crate::services::SERVICES;
use std::process::ExitCode;

/// Runs the `main` of a service, if the first argument names one. Call it first in `main`.
///
/// So one binary starts all processes. In an image the binary gets the arguments of a service, and the variable
/// `STACK_SERVICE` names the service.
pub fn run_service() -> Option<ExitCode> {
    let named = std::env::var_os("STACK_SERVICE");
    let mut args = named.into_iter().chain(std::env::args_os().skip(1)).peekable();
    let name = args.peek()?;
    let service = SERVICES.iter().find(|service| name == service.name)?;
    testkit::end_with_parent();
    Some((service.main)(&mut args))
}
