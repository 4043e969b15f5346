use anyhow::{Context, Error, Result, anyhow};
use futures::future::{select_all, try_join_all};
use stack::prepare;
use stack::services::{NATS_MONITORING_PORT, NATS_PORT, POSTGRES_PORT, SERVICES, Service};
use std::io::{IsTerminal, Write, stdout};
use std::path::PathBuf;
use std::time::Duration;
use testkit::{Nats, Postgres, Process, announced, free_port_from, images, left_over, say};

/// The names of the containers and of the volumes that hold their data.
pub(crate) const POSTGRES: &str = "ticketing-postgres";
pub(crate) const NATS: &str = "ticketing-nats";

/// The grace of a service when it stops.
const STOP_GRACE: Duration = Duration::from_secs(10);

/// Green, cyan, yellow, blue, magenta: a colour for each process in the log.
const COLOURS: [u8; 5] = [32, 36, 33, 34, 35];

/// Everything that runs. Dropping it ends everything at once; the data stays.
pub(crate) struct System {
    /// The replicas of each service. This field comes first, so that services are dropped before the servers.
    replicas: Vec<(&'static Service, Vec<Process>)>,
    pub(crate) nats: Nats,
    pub(crate) postgres: Postgres,
}

impl System {
    /// Starts this many replicas of each service, and waits until they are ready. `fresh` removes all data first.
    pub(crate) async fn start(replicas: &[(&'static Service, u8)], fresh: bool) -> Result<Self> {
        tokio::try_join!(images::ensure(images::Image::Postgres), images::ensure(images::Image::Nats))?;
        remove_left_overs(fresh).await?;
        let (postgres, nats) = announced("starting Postgres and NATS", start_servers()).await?;
        let prepared = announced("preparing databases and streams", prepare(&postgres, &nats)).await;
        prepared.context("if the data is of an older version, `cargo up --fresh` deletes it")?;
        let replicas = spawn_services(replicas, &postgres, &nats)?;
        let mut system = Self { replicas, nats, postgres };
        announced("waiting for the services", try_join_all(system.processes().map(Process::wait_ready))).await?;
        Ok(system)
    }

    /// Waits until a service ends by itself.
    pub(crate) async fn ended_by_itself(&mut self) -> Error {
        let ends = self.processes().map(|service| {
            Box::pin(async move {
                let status = service.exited().await;
                (service, status)
            })
        });
        let ((service, status), _, _) = select_all(ends).await;
        let status = status.map_or_else(|error| error.to_string(), |status| status.to_string());
        anyhow!("{service} ended by itself: {status}. The end of its log:\n{}", service.last_lines(20))
    }

    /// Stops the services gracefully, then the servers.
    pub(crate) async fn stop(mut self) -> Result<()> {
        // Longer than the grace of a service: its own deadline must come first.
        let patience = STOP_GRACE + Duration::from_secs(5);
        let stopping = try_join_all(self.processes().map(|service| async move {
            let was_running = service.is_running();
            let status = service.stop(patience).await?;
            if was_running && !status.success() {
                say(&format!("{service} failed while stopping: {status}"));
            }
            anyhow::Ok(())
        }));
        announced("stopping the services", stopping).await?;
        announced("stopping Postgres and NATS", async { tokio::try_join!(self.nats.stop(), self.postgres.stop()) })
            .await?;
        Ok(())
    }

    /// The HTTP addresses of the replicas of a service.
    pub(crate) fn addresses(&self, service: &Service) -> Vec<String> {
        let replicas =
            self.replicas.iter().filter(|(it, _)| it.name == service.name).flat_map(|(_, replicas)| replicas);
        replicas.map(Process::address).collect()
    }

    fn processes(&mut self) -> impl Iterator<Item = &mut Process> {
        self.replicas.iter_mut().flat_map(|(_, replicas)| replicas)
    }
}

/// Removes the containers of a run that was killed while it created them.
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
    let postgres = preferred_port("Postgres", POSTGRES_PORT, POSTGRES_PORT + 1);
    let nats = preferred_port("NATS", NATS_PORT, NATS_PORT + 1);
    let monitoring = preferred_port("NATS' monitoring", NATS_MONITORING_PORT, NATS_MONITORING_PORT + 1);
    tokio::try_join!(Postgres::start_named(POSTGRES, postgres), Nats::start_named(NATS, nats, monitoring))
}

fn spawn_services(
    replicas: &[(&'static Service, u8)],
    postgres: &Postgres,
    nats: &Nats,
) -> Result<Vec<(&'static Service, Vec<Process>)>> {
    let binary = std::env::current_exe().context("cannot find my own binary")?;
    let next_port = SERVICES.iter().map(|service| service.port + 1).max().unwrap_or_default();
    let mut spawner = Spawner { binary, postgres, nats, next_port, spawned: 0 };
    replicas.iter().map(|&(service, count)| Ok((service, spawner.spawn(service, count)?))).collect()
}

struct Spawner<'a> {
    binary: PathBuf,
    postgres: &'a Postgres,
    nats: &'a Nats,
    /// The first port for the next replica. Processes with lower ports may not listen yet.
    next_port: u16,
    spawned: usize,
}

impl Spawner<'_> {
    fn spawn(&mut self, service: &Service, replicas: u8) -> Result<Vec<Process>> {
        (1..=replicas)
            .map(|replica| {
                let name = if replicas == 1 { service.name.to_owned() } else { format!("{}-{replica}", service.name) };
                let port = match replica {
                    1 => preferred_port(service.name, service.port, self.next_port),
                    _ => free_port_from(self.next_port),
                };
                self.next_port = self.next_port.max(port + 1);
                let database_url = self.postgres.url(service.database_user, service.database);
                let mut env = service.environment(database_url, self.nats.url_of(service.nats_user));
                env.push(("NATS_CLIENT_ID", name.clone()));
                env.push(("STOP_GRACE", format!("{}s", STOP_GRACE.as_secs())));
                let printer = printer(&name, COLOURS[self.spawned % COLOURS.len()]);
                self.spawned += 1;
                Process::spawn_at(&self.binary, service.name, port, env, printer)
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
    // The system continues if its output is closed.
    move |line| drop(writeln!(stdout(), "{name} {line}"))
}

/// Returns `port`, or, if it is taken, one from `otherwise` upwards, and prints a message.
fn preferred_port(what: &str, port: u16, otherwise: u16) -> u16 {
    if free_port_from(port) == port {
        return port;
    }
    let other = free_port_from(otherwise);
    say(&format!("port {port} is taken, so {what} gets {other}"));
    other
}
