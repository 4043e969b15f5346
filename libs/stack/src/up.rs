use crate::system::System;
use crate::welcome::welcome;
use anyhow::{Context, Result, bail};
use stack::services::{ORDERS, Service, TICKETS};
use std::process::ExitCode;
use testkit::{Lock, say};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Runs the whole system on this machine until Ctrl-C
///
/// Runs Postgres and NATS in containers, and the services as processes. It prints its progress; when all are ready, it
/// prints their addresses, tokens, and requests to try. Their logs follow, each line with the name of its process.
///
/// The data is kept in the Docker volumes ticketing-postgres and ticketing-nats. Tickets are at port 3001, orders at 3002,
/// replicas from 3003 upwards, Postgres at 5432, NATS at 4222 and 8222 (monitoring). If a port is taken, it uses another
/// one and prints a message. Images that are not on this machine and cannot be pulled are built.
///
/// The exit code is 0 after Ctrl-C or SIGTERM, when everything has stopped in order; a second Ctrl-C stops it at once. It is
/// 1 if a service ends by itself or something cannot be started. The services take all other settings, such as the log
/// filter, from the environment: see `cargo up tickets --help` and `cargo up orders --help`.
#[derive(clap::Parser)]
#[command(bin_name = "cargo up")]
pub(crate) struct Up {
    /// Delete all data first: start with empty volumes
    #[arg(long)]
    pub(crate) fresh: bool,

    /// Number of replicas of tickets
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u8).range(1..=9))]
    pub(crate) tickets: u8,

    /// Number of replicas of orders
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u8).range(1..=9))]
    pub(crate) orders: u8,
}

impl Up {
    fn replicas(&self) -> [(&'static Service, u8); 2] {
        [(&TICKETS, self.tickets), (&ORDERS, self.orders)]
    }
}

pub(crate) fn run(up: &Up) -> ExitCode {
    let outcome = tokio::runtime::Runtime::new()
        .context("cannot start the runtime")
        .and_then(|runtime| runtime.block_on(until_stopped(up)));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

async fn until_stopped(up: &Up) -> Result<()> {
    let _lock = Lock::take("ticketing-stack")?;
    let mut stop = Stop::listen()?;
    let replicas = up.replicas();
    let started = tokio::select! {
        system = System::start(&replicas, up.fresh) => Some(system?),
        () = stop.asked() => None,
    };
    let Some(mut system) = started else {
        say("stopped before everything was up");
        return Ok(());
    };
    welcome(&system);
    let died = tokio::select! {
        died = system.ended_by_itself() => Some(died),
        () = stop.asked() => None,
    };
    tokio::select! {
        stopped = system.stop() => stopped?,
        () = stop.asked() => bail!("stopped at once by a second signal"),
    }
    if let Some(error) = died {
        return Err(error);
    }
    say("stopped; the data is kept (`cargo up --fresh` deletes it)");
    Ok(())
}

/// The signals that stop it: Ctrl-C, `kill`, and the closing of the terminal.
struct Stop([Signal; 3]);

impl Stop {
    fn listen() -> Result<Self> {
        let [interrupt, terminate, hangup] =
            [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()].map(signal);
        Ok(Self([interrupt?, terminate?, hangup?]))
    }

    async fn asked(&mut self) {
        let Self([interrupt, terminate, hangup]) = self;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use stack::services::{NATS_MONITORING_PORT, NATS_PORT, POSTGRES_PORT};

    #[test]
    fn help_names_the_ports_of_services_and_servers() {
        let help = Up::command().render_long_help().to_string();
        let words = help.split_whitespace().collect::<Vec<_>>().join(" ");
        for part in [
            format!("Tickets are at port {}, orders at {}, replicas", TICKETS.port, ORDERS.port),
            format!("replicas from {} upwards", TICKETS.port.max(ORDERS.port) + 1),
            format!("Postgres at {POSTGRES_PORT}, NATS at {NATS_PORT} and {NATS_MONITORING_PORT} (monitoring)"),
        ] {
            assert!(words.contains(&part), "{part} is not in: {words}");
        }
    }
}
