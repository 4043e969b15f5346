use crate::system::{POSTGRES, System};
use stack::services::{ORDERS, SERVICES, TICKETS};
use std::io::{Write, stdout};

/// Prints the addresses of all services and servers, and a session to paste.
pub(crate) fn welcome(system: &System) {
    let services = SERVICES.map(|service| line(service.name, &system.addresses(service).join("  ")));
    let databases = SERVICES.map(|service| {
        let url = system.postgres.url(service.database_owner, service.database);
        line("Postgres", &format!("psql {url}"))
    });
    let nats = line("NATS", &system.nats.url_of("monitor"));
    let monitoring = line("monitoring", &system.nats.monitoring_url());
    let text = format!(
        "
Ready. Ctrl-C ends it.

{}{}{nats}{monitoring}
Try it in another terminal: alice sells a ticket and changes it; bob orders it, so that it is reserved, and cancels.

{}
The copy of the tickets that orders keeps:

docker exec {POSTGRES} psql -U postgres {} -c 'select * from ticket_replica'

",
        services.concat(),
        databases.concat(),
        stack::session(&system.addresses(&TICKETS)[0], &system.addresses(&ORDERS)[0]),
        ORDERS.database,
    );
    // The system continues if its output is closed.
    let _ = stdout().write_all(text.as_bytes());
}

fn line(name: &str, text: &str) -> String {
    format!("  {name:<11} {text}\n")
}
