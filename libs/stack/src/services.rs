//! The list of services, and the ports of services and servers.
//!
//! Everything in this crate uses it. `docker-compose.yml`, `skaffold.yaml`, `infra/k8s`, `infra/docker`, `infra/postgres` and
//! `infra/nats` repeat it; `tests/manifests` compares them with it.

use event_bus::Schema;
use std::ffi::OsString;
use std::process::ExitCode;
use testkit::JWT_KEY;

/// A service of this system.
#[derive(Debug)]
pub struct Service {
    /// Its name. The image is `ticketing/<name>`.
    pub name: &'static str,
    /// Its port on this machine, with `cargo up`, compose and skaffold.
    pub port: u16,
    /// Its database.
    pub database: &'static str,
    /// The role that it runs as.
    pub database_user: &'static str,
    /// The role that owns its database and migrates it.
    pub database_owner: &'static str,
    /// Its user of NATS.
    pub nats_user: &'static str,
    /// The settings that every deployment gives it, apart from addresses and secrets.
    pub settings: &'static [(&'static str, &'static str)],
    /// The schema of its database.
    pub schema: fn() -> Schema,
    /// Its `main`.
    pub main: fn(&mut dyn Iterator<Item = OsString>) -> ExitCode,
}

/// All services.
pub static SERVICES: [&Service; 2] = [&TICKETS, &ORDERS];

/// The tickets service.
pub static TICKETS: Service = Service {
    name: "tickets",
    port: 3001,
    database: "tickets",
    database_user: "tickets",
    database_owner: "tickets_owner",
    nats_user: "tickets",
    settings: &[PROVISIONED],
    schema: tickets::schema,
    main: |args| tickets::main(args),
};

/// The orders service.
pub static ORDERS: Service = Service {
    name: "orders",
    port: 3002,
    database: "orders",
    database_user: "orders",
    database_owner: "orders_owner",
    nats_user: "orders",
    settings: &[PROVISIONED],
    schema: orders::schema,
    main: |args| orders::main(args),
};

/// Streams and consumers are created before the service starts: its user has no right to create them.
const PROVISIONED: (&str, &str) = ("PROVISION", "false");

/// The port of a service in a container.
pub const HTTP_PORT: u16 = 3000;

/// The port of Postgres.
pub const POSTGRES_PORT: u16 = 5432;

/// The port of NATS for clients.
pub const NATS_PORT: u16 = 4222;

/// The port of the monitoring of NATS over HTTP.
pub const NATS_MONITORING_PORT: u16 = 8222;

impl Service {
    /// The environment that it needs, with these URLs of its database and of NATS.
    pub fn environment(&self, database_url: String, nats_url: String) -> Vec<(&'static str, String)> {
        let needed =
            [("DATABASE_URL", database_url), ("NATS_URL", nats_url), ("JWT_KEY", JWT_KEY.to_owned())].into_iter();
        needed.chain(self.settings.iter().map(|(name, value)| (*name, (*value).to_owned()))).collect()
    }
}
