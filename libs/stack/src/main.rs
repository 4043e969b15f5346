//! `cargo up`: the whole system on this machine. Also the services themselves: `stack tickets` and `stack orders` are
//! their `main`, so that `cargo up` and tests start the processes they are about from one binary.

mod lock;
mod system;
mod up;
mod welcome;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1).peekable();
    match args.peek().and_then(|name| name.to_str()) {
        Some("tickets") => {
            stack::end_with_parent();
            tickets::main(args)
        }
        Some("orders") => {
            stack::end_with_parent();
            orders::main(args)
        }
        _ => up::run(&up::Up::parse()),
    }
}
