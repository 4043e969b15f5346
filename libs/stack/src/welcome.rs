use crate::system::{POSTGRES, System};
use stack::Process;
use std::io::{Write, stdout};

/// Says where everything is, and what can be done with it by copy and paste.
pub(crate) fn welcome(system: &System) {
    let (tickets, orders) = (addresses(&system.tickets), addresses(&system.orders));
    let (nats, monitoring) = (system.nats.url(), system.nats.monitoring_url());
    let databases = &system.databases;
    let text = format!(
        "
Ready. Ctrl-C ends it.

  tickets     {tickets}
  orders      {orders}
  Postgres    psql {}
              psql {}
  NATS        {nats}
  monitoring  {monitoring}

{}",
        databases.tickets,
        databases.orders,
        session(&system.tickets[0].address()),
    );
    // A closed output is no reason to stop the system.
    let _ = stdout().write_all(text.as_bytes());
}

fn addresses(replicas: &[Process]) -> String {
    replicas.iter().map(Process::address).collect::<Vec<_>>().join("  ")
}

fn session(tickets: &str) -> String {
    let token = stack::token("alice");
    format!(
        r#"Try it in another terminal: sell a ticket as alice, change it, and look at the copy that orders keeps.

TOKEN={token}
call() {{ curl -sS -H "Authorization: Bearer $TOKEN" -H "Content-Type: application/json" "$@"; echo; }}

ID=$(call {tickets}/api/tickets -d '{{"title": "Concert", "price": 20}}' | sed 's/.*"id":"\([0-9a-f]*\)".*/\1/'); echo $ID
call -X PUT {tickets}/api/tickets/$ID -d '{{"title": "Concert", "price": 25.5}}'
call {tickets}/api/tickets

docker exec {POSTGRES} psql -U postgres orders -c 'select * from ticket_replica'

"#
    )
}
