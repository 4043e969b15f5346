//! The rights of the users of NATS, by `infra/nats/users.conf`, tested on the server.

use anyhow::{Context, Result, bail, ensure};
use stack::provision;
use testkit::Nats;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

/// An attempt of a user: to publish to a subject, or to subscribe to one.
#[derive(Clone, Copy, Debug)]
enum Try {
    Publish(&'static str),
    Subscribe(&'static str),
    /// Subscribes as a member of a queue group.
    Join(&'static str, &'static str),
}

use Try::{Join, Publish, Subscribe};

const REFUSED: [(&str, Try); 80] = [
    // events of other services, and subjects without a publisher
    ("orders", Publish("ticket.created")),
    ("orders", Publish("ticket.updated")),
    ("orders", Publish("payment.created")),
    ("orders", Publish("expiration.complete")),
    ("orders", Publish("order.refunded")),
    ("tickets", Publish("order.created")),
    ("tickets", Publish("order.cancelled")),
    ("tickets", Publish("order.completed")),
    ("tickets", Publish("payment.created")),
    ("tickets", Publish("ticket.deleted")),
    ("payments", Publish("order.completed")),
    ("payments", Publish("ticket.updated")),
    ("payments", Publish("$JS.API.STREAM.MSG.GET.ORDERS")),
    ("payments", Publish("$JS.API.CONSUMER.DURABLE.CREATE.ORDERS.payments")),
    ("payments", Publish("$JS.API.CONSUMER.MSG.NEXT.PAYMENTS.orders")),
    ("payments", Publish("$JS.ACK.ORDERS.tickets.1.1.1.1.0")),
    ("expiration", Publish("order.cancelled")),
    ("expiration", Publish("payment.created")),
    ("provisioner", Publish("ticket.created")),
    ("monitor", Publish("ticket.created")),
    // stored messages
    ("orders", Publish("$JS.API.STREAM.PURGE.PAYMENTS")),
    ("orders", Publish("$JS.API.STREAM.PURGE.EXPIRATION")),
    ("payments", Publish("$JS.API.STREAM.PURGE.ORDERS")),
    ("expiration", Publish("$JS.API.STREAM.PURGE.EXPIRATION")),
    ("orders", Publish("$JS.API.STREAM.PURGE.TICKETS")),
    ("orders", Publish("$JS.API.STREAM.DELETE.ORDERS")),
    ("orders", Publish("$JS.API.STREAM.MSG.DELETE.ORDERS")),
    ("orders", Publish("$JS.API.DIRECT.GET.TICKETS")),
    ("tickets", Publish("$JS.API.STREAM.PURGE.ORDERS")),
    ("tickets", Publish("$JS.API.CONSUMER.LIST.ORDERS")),
    ("tickets", Publish("$JS.API.STREAM.DELETE.TICKETS")),
    ("tickets", Publish("$JS.API.STREAM.MSG.DELETE.TICKETS")),
    ("tickets", Publish("$JS.API.STREAM.MSG.GET.PAYMENTS")),
    ("tickets", Publish("$JS.API.DIRECT.GET.ORDERS")),
    ("provisioner", Publish("$JS.API.STREAM.PURGE.TICKETS")),
    ("provisioner", Publish("$JS.API.STREAM.DELETE.TICKETS")),
    ("provisioner", Publish("$JS.API.STREAM.MSG.GET.TICKETS")),
    ("provisioner", Publish("$JS.API.STREAM.CREATE.MINE")),
    ("provisioner", Publish("$JS.API.CONSUMER.DURABLE.CREATE.TICKETS.mine")),
    ("tickets", Publish("_INBOX_provisioner.one")),
    ("monitor", Publish("$JS.API.STREAM.PURGE.TICKETS")),
    ("monitor", Publish("$JS.API.STREAM.DELETE.TICKETS")),
    // streams and consumers: a user that may create consumers can read every stream
    ("orders", Publish("$JS.API.STREAM.CREATE.MINE")),
    ("orders", Publish("$JS.API.STREAM.UPDATE.ORDERS")),
    ("orders", Publish("$JS.API.CONSUMER.CREATE.TICKETS")),
    ("orders", Publish("$JS.API.CONSUMER.CREATE.TICKETS.mine.ticket.created")),
    ("orders", Publish("$JS.API.CONSUMER.DURABLE.CREATE.TICKETS.orders")),
    ("orders", Publish("$JS.API.CONSUMER.DELETE.TICKETS.orders")),
    ("tickets", Publish("$JS.API.STREAM.CREATE.MINE")),
    ("tickets", Publish("$JS.API.STREAM.UPDATE.TICKETS")),
    ("tickets", Publish("$JS.API.CONSUMER.CREATE.ORDERS")),
    ("tickets", Publish("$JS.API.CONSUMER.DURABLE.CREATE.ORDERS.tickets")),
    ("tickets", Publish("$JS.API.CONSUMER.DELETE.ORDERS.tickets")),
    ("monitor", Publish("$JS.API.CONSUMER.CREATE.TICKETS")),
    ("monitor", Publish("$JS.API.CONSUMER.DELETE.TICKETS.orders")),
    ("provisioner", Publish("$JS.API.CONSUMER.DELETE.TICKETS.orders")),
    // consumers of other services
    ("orders", Publish("$JS.API.CONSUMER.INFO.ORDERS.tickets")),
    ("tickets", Publish("$JS.API.STREAM.INFO.PAYMENTS")),
    ("orders", Publish("$JS.API.CONSUMER.MSG.NEXT.ORDERS.tickets")),
    ("orders", Publish("$JS.ACK.ORDERS.tickets.1.1.1.1.0")),
    ("tickets", Publish("$JS.API.CONSUMER.MSG.NEXT.TICKETS.orders")),
    ("tickets", Publish("$JS.ACK.TICKETS.orders.1.1.1.1.0")),
    ("tickets", Publish("$JS.ACK._.account.TICKETS.orders.1.1.1.1.0")),
    ("monitor", Publish("$JS.API.CONSUMER.MSG.NEXT.TICKETS.orders")),
    ("monitor", Publish("$JS.ACK.TICKETS.orders.1.1.1.1.0")),
    // the snapshots of others
    ("orders", Join("snapshots.TICKETS", "snapshots")),
    ("tickets", Join("snapshots.ORDERS", "snapshots")),
    ("tickets", Subscribe("snapshots.TICKETS")),
    ("payments", Publish("snapshots.TICKETS")),
    ("expiration", Publish("snapshots.ORDERS")),
    // inboxes of other users
    ("orders", Subscribe("_INBOX_tickets.>")),
    ("orders", Subscribe("_INBOX.>")),
    ("orders", Subscribe("ticket.created")),
    ("orders", Subscribe(">")),
    ("orders", Join("tickets.show", "tickets")),
    ("tickets", Subscribe("_INBOX_orders.>")),
    // without the queue group each request would get two replies
    ("tickets", Subscribe("tickets.show")),
    ("tickets", Subscribe("order.*")),
    ("monitor", Subscribe("_INBOX_orders.>")),
    ("payments", Subscribe("_INBOX_monitor.>")),
];

/// Rights that a user must have: a server that refuses everything must fail the test.
const ALLOWED: [(&str, Try); 39] = [
    ("tickets", Publish("ticket.created")),
    ("tickets", Publish("ticket.updated")),
    ("tickets", Publish("$JS.API.STREAM.INFO.TICKETS")),
    ("tickets", Publish("$JS.API.CONSUMER.LIST.TICKETS")),
    ("tickets", Publish("$JS.API.STREAM.PURGE.TICKETS")),
    ("tickets", Publish("$JS.API.CONSUMER.MSG.NEXT.ORDERS.tickets")),
    ("tickets", Publish("$JS.ACK.ORDERS.tickets.1.1.1.1.0")),
    // as NATS 2.16 has it
    ("tickets", Publish("$JS.ACK._.account.ORDERS.tickets.1.1.1.1.0.token")),
    ("tickets", Subscribe("_INBOX_tickets.one")),
    ("tickets", Join("tickets.show", "tickets")),
    ("tickets", Publish("_INBOX_orders.one")),
    ("orders", Publish("order.created")),
    ("orders", Publish("order.cancelled")),
    ("orders", Publish("order.completed")),
    ("orders", Publish("$JS.API.CONSUMER.LIST.ORDERS")),
    ("orders", Publish("$JS.API.STREAM.PURGE.ORDERS")),
    ("orders", Publish("$JS.API.STREAM.INFO.TICKETS")),
    ("orders", Publish("$JS.API.CONSUMER.INFO.PAYMENTS.orders")),
    ("tickets", Publish("$JS.API.CONSUMER.INFO.ORDERS.tickets")),
    ("orders", Publish("tickets.show")),
    ("orders", Publish("$JS.API.CONSUMER.MSG.NEXT.TICKETS.orders")),
    ("orders", Publish("$JS.ACK._.account.PAYMENTS.orders.1.1.1.1.0.token")),
    ("orders", Subscribe("_INBOX_orders.one")),
    ("tickets", Join("snapshots.TICKETS", "snapshots")),
    ("tickets", Publish("snapshots.ORDERS")),
    ("orders", Join("snapshots.ORDERS", "snapshots")),
    ("orders", Publish("snapshots.TICKETS")),
    ("orders", Publish("_INBOX_payments.one")),
    ("payments", Publish("snapshots.ORDERS")),
    ("payments", Publish("payment.created")),
    ("payments", Publish("$JS.API.STREAM.PURGE.PAYMENTS")),
    ("payments", Publish("$JS.API.CONSUMER.MSG.NEXT.ORDERS.payments")),
    ("provisioner", Publish("$JS.API.CONSUMER.DURABLE.CREATE.ORDERS.payments")),
    ("expiration", Publish("expiration.complete")),
    ("provisioner", Publish("$JS.API.STREAM.CREATE.TICKETS")),
    ("monitor", Publish("$JS.API.STREAM.INFO.TICKETS")),
    ("monitor", Subscribe("order.*")),
    ("monitor", Subscribe("_INBOX_monitor.>")),
    ("admin", Publish("$JS.API.STREAM.MSG.DELETE.ORDERS")),
];

/// A connection with the plain protocol of NATS: a client library would hide the errors.
struct Wire(BufReader<TcpStream>);

impl Wire {
    async fn open(nats: &Nats, connect: &str) -> Result<Self> {
        let mut wire = Self(BufReader::new(TcpStream::connect(nats.server()).await?));
        wire.0.get_mut().write_all(format!("CONNECT {connect}\r\n").as_bytes()).await?;
        Ok(wire)
    }

    async fn user(nats: &Nats, user: &str) -> Result<Self> {
        Self::open(nats, &format!(r#"{{"verbose": false, "user": "{user}", "pass": "{user}"}}"#)).await
    }

    /// Sends `command` and returns every error until the server has processed it.
    async fn errors(&mut self, command: &str) -> Result<Vec<String>> {
        self.0.get_mut().write_all(format!("{command}PING\r\n").as_bytes()).await?;
        let (mut errors, mut line) = (Vec::new(), String::new());
        loop {
            line.clear();
            if self.0.read_line(&mut line).await? == 0 {
                bail!("the server closed the connection after {errors:?}");
            }
            match line.split_once(' ').unwrap_or((line.trim(), "")) {
                ("PONG", _) => return Ok(errors),
                ("-ERR", error) => errors.push(error.trim().to_owned()),
                _ => {}
            }
        }
    }
}

async fn violations(nats: &Nats, user: &str, what: Try) -> Result<Vec<String>> {
    let command = match what {
        Publish(subject) => format!("PUB {subject} 0\r\n\r\n"),
        Subscribe(subject) => format!("SUB {subject} 1\r\n"),
        Join(subject, queue) => format!("SUB {subject} {queue} 1\r\n"),
    };
    let mut wire = Wire::user(nats, user).await?;
    wire.errors(&command).await.with_context(|| format!("{user}: {what:?}"))
}

#[tokio::test]
async fn each_user_has_only_the_rights_it_needs() -> Result<()> {
    let nats = Nats::start().await?;
    provision(&nats.server(), 1).await?;
    let mut surprises = Vec::new();
    for (user, what) in REFUSED {
        let errors = violations(&nats, user, what).await?;
        if !errors.iter().any(|error| error.contains("Permissions Violation")) {
            surprises.push(format!("{user} is not refused {what:?}: {errors:?}"));
        }
    }
    for (user, what) in ALLOWED {
        let errors = violations(&nats, user, what).await?;
        if !errors.is_empty() {
            surprises.push(format!("{user} is refused {what:?}: {errors:?}"));
        }
    }
    ensure!(surprises.is_empty(), "{surprises:#?}");
    Ok(())
}

/// The reply subject of a request deletes a stream, for which the sender has no right.
#[tokio::test]
async fn a_reply_subject_cannot_use_the_rights_of_tickets() -> Result<()> {
    let nats = Nats::start().await?;
    provision(&nats.server(), 1).await?;
    let mut tickets = Wire::user(&nats, "tickets").await?;
    ensure!(tickets.errors("SUB tickets.show tickets 1\r\n").await?.is_empty());
    let delete = "$JS.API.STREAM.DELETE.TICKETS";
    ensure!(
        Wire::user(&nats, "orders")
            .await?
            .errors(&format!("PUB tickets.show {delete} 2\r\n{{}}\r\n"))
            .await?
            .is_empty()
    );
    let mut request = String::new();
    while !request.starts_with("MSG") {
        request.clear();
        ensure!(tickets.0.read_line(&mut request).await? > 0, "the request did not arrive");
    }
    ensure!(request.contains(delete), "{request}");

    let errors = tickets.errors(&format!("PUB {delete} 0\r\n\r\n")).await?;
    ensure!(errors.iter().any(|error| error.contains("Permissions Violation")), "{errors:?}");
    async_nats::jetstream::new(nats.connect().await?).get_stream("TICKETS").await?;
    Ok(())
}

#[tokio::test]
async fn no_client_connects_without_a_user_and_its_password() -> Result<()> {
    let nats = Nats::start().await?;
    for who in [
        "{}",
        r#"{"user": "tickets"}"#,
        r#"{"user": "tickets", "pass": ""}"#,
        r#"{"user": "tickets", "pass": "orders"}"#,
        r#"{"user": "nobody", "pass": "nobody"}"#,
        r#"{"auth_token": "tickets"}"#,
        r#"{"user": "admin", "pass": "$NATS_ADMIN_PASSWORD"}"#,
    ] {
        let mut wire = Wire::open(&nats, who).await?;
        let refused = wire.errors("").await.err().with_context(|| format!("{who} was let in"))?.to_string();
        ensure!(refused.contains("Authorization Violation"), "{who}: {refused}");
    }
    ensure!(Wire::user(&nats, "tickets").await?.errors("").await?.is_empty());
    Ok(())
}
