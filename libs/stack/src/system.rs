use crate::up::Up;
use anyhow::{Context, Error, Result, anyhow};
use futures::future::{select_all, try_join_all};
use stack::prepare;
use std::io::{IsTerminal, Write, stdout};
use std::path::PathBuf;
use std::time::Duration;
use testkit::{Nats, Postgres, Process, announced, free_port_from, images, left_over, say};

/// The names of the containers and of the volumes that hold their data.
pub(crate) const POSTGRES: &str = "ticketing-postgres";
pub(crate) const NATS: &str = "ticketing-nats";

/// How long a service may finish what it does.
const STOP_GRACE: Duration = Duration::from_secs(10);

/// Green, cyan, yellow, blue, magenta: a colour for each process in the log.
const COLOURS: [u8; 5] = [32, 36, 33, 34, 35];

/// Everything that runs. Dropping it ends everything at once; the data stays.
pub(crate) struct System {
    /// Before the servers, so that it is dropped before them.
    pub(crate) tickets: Vec<Process>,
    pub(crate) orders: Vec<Process>,
    pub(crate) nats: Nats,
    pub(crate) postgres: Postgres,
}

impl System {
    pub(crate) async fn start(up: &Up) -> Result<Self> {
        tokio::try_join!(images::ensure(images::Image::Postgres), images::ensure(images::Image::Nats))?;
        remove_left_overs(up.fresh).await?;
        let (postgres, nats) = announced("starting Postgres and NATS", start_servers()).await?;
        let prepared = announced("preparing databases and streams", prepare(&postgres, &nats)).await;
        prepared.context("data of an older version? `cargo up --fresh` starts without")?;
        let (tickets, orders) = spawn_services(up, &postgres, &nats)?;
        let mut system = Self { tickets, orders, nats, postgres };
        announced("waiting for the services", try_join_all(system.services().map(Process::wait_ready))).await?;
        Ok(system)
    }

    /// Returns when a service has ended although nobody asked it to.
    pub(crate) async fn ended_by_itself(&mut self) -> Error {
        let ends = self.services().map(|service| {
            Box::pin(async move {
                let status = service.exited().await;
                (service, status)
            })
        });
        let ((service, status), _, _) = select_all(ends).await;
        let status = status.map_or_else(|error| error.to_string(), |status| status.to_string());
        anyhow!("{service} ended by itself: {status}. It said last:\n{}", service.last_lines(20))
    }

    /// Lets the services finish what they do, then ends the servers.
    pub(crate) async fn stop(mut self) -> Result<()> {
        // Longer than a service gives itself, so that it is its own deadline that is seen to work.
        let patience = STOP_GRACE + Duration::from_secs(5);
        let stopping = try_join_all(self.services().map(|service| async move {
            let was_running = service.is_running();
            let status = service.stop(patience).await?;
            if was_running && !status.success() {
                say(&format!("{service} did not end well: {status}"));
            }
            anyhow::Ok(())
        }));
        announced("stopping the services", stopping).await?;
        announced("stopping Postgres and NATS", async { tokio::try_join!(self.nats.stop(), self.postgres.stop()) })
            .await?;
        Ok(())
    }

    fn services(&mut self) -> impl Iterator<Item = &mut Process> {
        self.tickets.iter_mut().chain(&mut self.orders)
    }
}

/// Removes the containers of a run that was killed while they were made.
async fn remove_left_overs(volumes_too: bool) -> Result<()> {
    for name in [POSTGRES, NATS] {
        left_over::remove_container(name).await?;
        if volumes_too {
            left_over::remove_volume(name).await?;
        }
    }
    Ok(())
}

async fn start_servers() -> Result<(Postgres, Nats)> {
    let postgres = preferred_port("Postgres", 5432, 5433);
    let nats = preferred_port("NATS", 4222, 4223);
    let monitoring = preferred_port("NATS' monitoring", 8222, 8223);
    tokio::try_join!(Postgres::start_named(POSTGRES, postgres), Nats::start_named(NATS, nats, monitoring))
}

fn spawn_services<'a>(up: &Up, postgres: &'a Postgres, nats: &'a Nats) -> Result<(Vec<Process>, Vec<Process>)> {
    let binary = std::env::current_exe().context("cannot find my own binary")?;
    let mut spawner = Spawner { binary, postgres, nats, next_port: 3003, spawned: 0 };
    let tickets = spawner.spawn("tickets", up.tickets, 3001)?;
    let orders = spawner.spawn("orders", up.orders, 3002)?;
    Ok((tickets, orders))
}

struct Spawner<'a> {
    binary: PathBuf,
    postgres: &'a Postgres,
    nats: &'a Nats,
    /// Where replicas are looked for a port, past those that have been given out and may not be bound yet.
    next_port: u16,
    spawned: usize,
}

impl Spawner<'_> {
    fn spawn(&mut self, service: &str, replicas: u8, first_port: u16) -> Result<Vec<Process>> {
        (1..=replicas)
            .map(|replica| {
                let name = if replicas == 1 { service.to_owned() } else { format!("{service}-{replica}") };
                let port = match replica {
                    1 => preferred_port(service, first_port, self.next_port),
                    _ => free_port_from(self.next_port),
                };
                self.next_port = self.next_port.max(port + 1);
                let env = [
                    ("DATABASE_URL", self.postgres.url(service, service)),
                    ("NATS_URL", self.nats.url_of(service)),
                    ("PROVISION", "false".to_owned()),
                    ("NATS_CLIENT_ID", name.clone()),
                    ("JWT_KEY", testkit::JWT_KEY.to_owned()),
                    ("STOP_GRACE", format!("{}s", STOP_GRACE.as_secs())),
                ];
                let printer = printer(&name, COLOURS[self.spawned % COLOURS.len()]);
                self.spawned += 1;
                Process::spawn_at(&self.binary, service, port, env, printer)
            })
            .collect()
    }
}

/// Prints the lines of a process with its name before them.
fn printer(name: &str, colour: u8) -> impl Fn(&str) + Clone + Send + use<> {
    let mut name = format!("{name:<9}");
    if stdout().is_terminal() {
        name = format!("\x1b[{colour}m{name}\x1b[0m");
    }
    // A closed output is no reason to stop the system.
    move |line| drop(writeln!(stdout(), "{name} {line}"))
}

/// `port`, or one from `otherwise` upwards, and a word about it, if somebody has taken that.
fn preferred_port(what: &str, port: u16, otherwise: u16) -> u16 {
    if free_port_from(port) == port {
        return port;
    }
    let other = free_port_from(otherwise);
    say(&format!("port {port} is taken, so {what} gets {other}"));
    other
}
