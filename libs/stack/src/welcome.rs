use crate::system::{POSTGRES, System};
use std::io::{Write, stdout};
use testkit::Process;

/// Says where everything is, and what can be done with it by copy and paste.
pub(crate) fn welcome(system: &System) {
    let (tickets, orders) = (addresses(&system.tickets), addresses(&system.orders));
    let (nats, monitoring) = (system.nats.url_of("monitor"), system.nats.monitoring_url());
    let text = format!(
        "
Ready. Ctrl-C ends it.

  tickets     {tickets}
  orders      {orders}
  Postgres    psql {}
              psql {}
  NATS        {nats}
  monitoring  {monitoring}

Try it in another terminal: alice sells a ticket and changes it; bob orders it, so that it is reserved, and cancels.

{}
The copy of the tickets that orders keeps:

docker exec {POSTGRES} psql -U postgres orders -c 'select * from ticket_replica'

",
        system.postgres.url("tickets_owner", "tickets"),
        system.postgres.url("orders_owner", "orders"),
        stack::session(&system.tickets[0].address(), &system.orders[0].address()),
    );
    // A closed output is no reason to stop the system.
    let _ = stdout().write_all(text.as_bytes());
}

fn addresses(replicas: &[Process]) -> String {
    replicas.iter().map(Process::address).collect::<Vec<_>>().join("  ")
}
