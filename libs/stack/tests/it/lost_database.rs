//! Postgres comes back older: the service takes over from its stream what its tables lost.

use crate::load::Load;
use crate::records::count;
use crate::system::System;
use anyhow::{Result, ensure};
use serde_json::json;
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use stack::services::{ORDERS, Service, TICKETS};
use std::path::Path;
use std::time::Duration;
use testkit::{Process, Signal, eventually, eventually_within, free_port, nats_url};
use tokio::process::Command;
use tokio::time::sleep;

/// How long a part of the load lasts.
pub const A_WHILE: Duration = Duration::from_secs(2);
const GRACE: Duration = Duration::from_secs(30);

pub async fn load(system: &System) -> Result<Load> {
    let clients = |services: &[Process]| services.iter().map(Process::client).collect();
    Load::new(clients(&system.tickets), clients(&system.orders), &system.nats.server()).await
}

/// Runs a shell command in the container of Postgres.
pub async fn in_postgres(system: &System, command: &str) -> Result<()> {
    let output = Command::new("docker").args(["exec", system.postgres.id(), "sh", "-ec", command]).output().await?;
    ensure!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

pub async fn back_up(system: &System, service: &Service) -> Result<()> {
    let name = service.database;
    in_postgres(system, &format!("pg_dump -U postgres --format=custom --file=/tmp/{name}.dump {name}")).await
}

/// Replaces the tables by those of the dump, as `docs/operations.md` does.
async fn restore(system: &System, service: &Service) -> Result<()> {
    let name = service.database;
    let options = "--clean --if-exists --single-transaction";
    in_postgres(system, &format!("pg_restore -U postgres {options} --dbname={name} /tmp/{name}.dump")).await
}

/// Runs `stack <service> recover --dry-run`, as the role and the user of the service.
async fn shows(system: &System, service: &Service, code: i32, text: &str) -> Result<()> {
    let mut command = Command::new(Path::new(env!("CARGO_BIN_EXE_stack")));
    command.args([service.name, "recover", "--dry-run"]);
    command.env("DATABASE_URL", system.postgres.url(service.database_user, service.database));
    let output = command.env("NATS_URL", nats_url(service.nats_user, &system.nats.server())).output().await?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(code) && said.contains(text), "{}: {said}", output.status);
    Ok(())
}

pub fn logs(system: &System, service: &Service) -> String {
    let replicas = if service.name == TICKETS.name { &system.tickets } else { &system.orders };
    replicas.iter().map(Process::logs).collect()
}

/// Waits until a replica has logged that the service is recovered, then until the system is at rest. Checks all invariants.
pub async fn recovered(system: &System, service: &Service) -> Result<()> {
    eventually_within(Duration::from_mins(1), "the recovery", async || {
        let logs = logs(system, service);
        ensure!(logs.contains("the database is recovered from the stream"), "not in:\n{logs}");
        anyhow::Ok(())
    })
    .await?;
    let logs = logs(system, service);
    let error = logs.lines().find(|line| line.contains("ERROR") && line.contains("the database lost history"));
    ensure!(error.is_some(), "no error in:\n{logs}");
    system.settled().await?;
    tokens_agree(system).await?;
    payments_agree(system).await
}

/// Each ticket has followed the newest event of its orders, and no other one.
pub async fn tokens_agree(system: &System) -> Result<()> {
    let tokens = async |db: &str, sql: &'static str| -> Result<Vec<(String, i64, i64)>> {
        Ok(sqlx::query_as(sql).fetch_all(&mut PgConnection::connect(db).await?).await?)
    };
    let followed = "select id, reservation, order_version from tickets where reservation > 0 order by id";
    let newest = "select distinct on (ticket_id) ticket_id, reservation, version from orders
                  order by ticket_id, reservation desc";
    let (followed, newest) =
        futures::try_join!(tokens(&system.tickets_db, followed), tokens(&system.orders_db, newest))?;
    let wrong = followed.iter().zip(&newest).find(|(followed, newest)| followed != newest);
    ensure!(followed == newest, "{} and {} tickets were ordered: {wrong:?}", followed.len(), newest.len());
    Ok(())
}

/// Each complete order has one payment that is not refunded, and no cancelled one has. Each order has a title.
pub async fn payments_agree(system: &System) -> Result<()> {
    let wrong = "select count(*) from orders
                 where (select count(*) from payments where order_id = orders.id and not refund_due)
                       <> case when status = 'complete' then 1 else 0 end
                    or title = ''";
    let wrong = count(&system.orders_db, wrong).await?;
    ensure!(wrong == 0, "{wrong} orders have wrong payments, or no title");
    Ok(())
}

/// The procedure of `docs/operations.md`: both databases are restored from dumps of different times, while the services are down.
#[tokio::test]
async fn both_databases_are_restored_from_older_dumps() -> Result<()> {
    let mut system = System::start(1, 1).await?;
    let load = load(&system).await?;
    load.during(Box::pin(async {
        sleep(A_WHILE).await; // under load
        back_up(&system, &TICKETS).await?;
        sleep(A_WHILE).await; // under load
        back_up(&system, &ORDERS).await?;
        sleep(A_WHILE).await; // under load
        Ok(())
    }))
    .await?;
    system.settled().await?;
    let (mut tickets, mut orders) = (system.tickets.remove(0), system.orders.remove(0));
    futures::try_join!(tickets.stop(GRACE), orders.stop(GRACE))?;
    for service in [&TICKETS, &ORDERS] {
        shows(&system, service, 0, "nothing to take over").await?;
        restore(&system, service).await?;
        shows(&system, service, 3, "the database is older than its stream").await?;
    }
    let published = system.stream().await?;

    system.add(1, 1).await?;
    recovered(&system, &TICKETS).await?;
    recovered(&system, &ORDERS).await?;
    for service in [&TICKETS, &ORDERS] {
        shows(&system, service, 0, "nothing to take over").await?;
    }
    ensure!(system.stream().await? == published, "a recovery changes nothing that readers see");
    load.was_told_the_truth(&system, 1).await
}

/// While a ticket is locked, the recovery cannot end: reads are served, writes are refused. Then the process dies.
#[tokio::test]
async fn kill_nine_in_the_middle_of_a_recovery_loses_nothing() -> Result<()> {
    let mut system = System::start(1, 1).await?;
    let first = system.ticket().await?;
    back_up(&system, &TICKETS).await?;
    let tickets = system.tickets(600).await?;
    let order = system.order(0, "bob", &tickets[0]).await?;
    let edited = json!({"title": "Concert", "price": 30});
    system.seller(0).put(&format!("/api/tickets/{first}"), edited.clone()).await?.expect(200)?;
    system.settled().await?;
    system.tickets.remove(0).stop(GRACE).await?;
    restore(&system, &TICKETS).await?;

    let mut holder = PgConnection::connect(&system.tickets_db).await?;
    sqlx::query("begin").execute(&mut holder).await?;
    sqlx::query("select 1 from tickets for update").execute(&mut holder).await?;
    system.tickets.push(system.spawn_tickets()?);
    let client = system.tickets[0].client();
    eventually("a part of the recovery", async || {
        let ready = client.get("/readyz").await?;
        let body = ready.body.to_string();
        let is_partial = body.contains("TICKETS is recovered up to") && body.contains(" of 603");
        ensure!(ready.status == 503 && is_partial, "{} {body}", ready.status);
        anyhow::Ok(())
    })
    .await?;
    let refused = system.seller(0).put(&format!("/api/tickets/{}", tickets[1]), edited).await?;
    ensure!(refused.status == 503, "{}", refused.status);
    system.see(&first).await?;
    system.tickets[0].signal(Signal::Kill).await?;
    system.tickets[0].exited().await?;
    sqlx::query("rollback").execute(&mut holder).await?;

    let restarted = system.spawn_tickets()?;
    let killed = std::mem::replace(&mut system.tickets[0], restarted);
    ensure!(killed.logs().contains("the database lost history"), "{}", killed.logs());
    system.tickets[0].wait_ready().await?;
    system.settled().await?;
    tokens_agree(&system).await?;
    let (seen, held) = futures::try_join!(system.see(&first), system.see(&tickets[0]))?;
    ensure!(seen["price"] == 30 && held["orderId"] == json!(order), "{seen} {held}");
    ensure!(count(&system.tickets_db, "select count(*) from tickets").await? == 601);
    Ok(())
}

/// Without NATS, a restored orders cannot know that a ticket was sold since, and sells it again.
#[tokio::test]
async fn an_order_that_contradicts_a_published_one_is_withdrawn() -> Result<()> {
    let mut system = System::start(1, 1).await?;
    let [sold, cancelled, kept] = <[String; 3]>::try_from(system.tickets(3).await?).unwrap_or_default();
    system.settled().await?;
    back_up(&system, &ORDERS).await?;
    let bobs = system.order(0, "bob", &sold).await?;
    let gone = system.order(0, "bob", &cancelled).await?;
    system.buyer(0, "bob").delete(&format!("/api/orders/{gone}")).await?.expect(204)?;
    system.settled().await?;
    system.orders.remove(0).stop(GRACE).await?;
    restore(&system, &ORDERS).await?;

    let servers = std::mem::replace(&mut system.orders_nats, format!("127.0.0.1:{}", free_port()));
    system.orders.push(system.spawn_orders()?);
    system.orders[0].wait_ready().await?;
    let mut withdrawn = Vec::new();
    for ticket in [&sold, &cancelled] {
        withdrawn.push(system.order(0, "carol", ticket).await?);
    }
    // The second order of a ticket whose first one is withdrawn.
    system.buyer(0, "carol").delete(&format!("/api/orders/{}", withdrawn[0])).await?.expect(204)?;
    withdrawn.push(system.order(0, "carol", &sold).await?);
    let carols = system.order(0, "carol", &kept).await?;
    system.orders.remove(0).stop(GRACE).await?;

    system.orders_nats = servers;
    system.orders.push(system.spawn_orders()?);
    recovered(&system, &ORDERS).await?;
    let logs = system.orders[0].logs();
    for order in &withdrawn {
        ensure!(logs.contains(&format!("event_id=\"{order}-0\"")), "{order} is not named in\n{logs}");
        system.buyer(0, "carol").get(&format!("/api/orders/{order}")).await?.expect(404)?;
    }
    let (held, free) = futures::try_join!(system.see(&sold), system.see(&kept))?;
    ensure!(held["orderId"] == json!(bobs) && free["orderId"] == json!(carols), "{held} {free}");
    // The next numbers are above all that were published.
    system.buyer(0, "bob").delete(&format!("/api/orders/{bobs}")).await?.expect(204)?;
    system.order(0, "dave", &sold).await?;
    system.order(0, "dave", &cancelled).await?;
    system.settled().await?;
    tokens_agree(&system).await?;
    let numbers = "select count(*) from orders where reservation = 2";
    ensure!(count(&system.orders_db, numbers).await? == 2, "a reservation number was assigned twice");
    Ok(())
}

/// A ticket is ordered and released after the backup. The restored tables do not know that; the event of the older order is delivered
/// again, and must not hold the ticket.
#[tokio::test]
async fn a_restored_ticket_ignores_events_of_older_orders() -> Result<()> {
    let mut system = System::start(1, 1).await?;
    let ticket = system.ticket().await?;
    system.settled().await?;
    back_up(&system, &TICKETS).await?;
    let order = system.order(0, "bob", &ticket).await?;
    system.buyer(0, "bob").delete(&format!("/api/orders/{order}")).await?.expect(204)?;
    system.settled().await?;
    system.tickets.remove(0).stop(GRACE).await?;
    restore(&system, &TICKETS).await?;
    system.add(1, 0).await?;
    recovered(&system, &TICKETS).await?;
    let db = &mut PgConnection::connect(&system.tickets_db).await?;
    let sql = AssertSqlSafe("select reservation, order_version, version from tickets".to_owned());
    let token: (i64, i64, i64) = sqlx::query_as(sql).fetch_one(db).await?;
    ensure!(token == (1, 1, 2), "{token:?}");
    Ok(())
}

/// With `fsync`, a killed Postgres has everything that it has committed.
#[tokio::test]
async fn a_killed_postgres_has_lost_nothing_and_nothing_is_recovered() -> Result<()> {
    let system = System::start(1, 1).await?;
    let load = load(&system).await?;
    load.during(Box::pin(async {
        for _ in 0..3 {
            sleep(A_WHILE).await; // under load
            system.postgres.kill().await?;
            system.postgres.start_again().await?;
        }
        sleep(A_WHILE).await; // under load
        Ok(())
    }))
    .await?;
    system.settled().await?;
    let logs = logs(&system, &TICKETS) + &logs(&system, &ORDERS);
    for unexpected in ["lost history", "was restored", "recovered from the stream"] {
        ensure!(!logs.contains(unexpected), "{unexpected}: {logs}");
    }
    load.nothing_is_missing(&system).await
}

/// The restored database does not know that an order was paid, and its time is over. The relay cannot compare the database at once.
#[tokio::test]
async fn a_restored_order_does_not_expire_before_the_database_is_compared() -> Result<()> {
    let mut system = System::start_with(1, 1, "6s").await?;
    let ticket = system.tickets(1).await?.remove(0);
    let order = system.order(0, "bob", &ticket).await?;
    back_up(&system, &ORDERS).await?;
    system.publish("payment.created", json!({"id": order, "orderId": order, "stripeId": "pi"})).await?;
    eventually("the payment", async || {
        let seen = system.buyer(0, "bob").get(&format!("/api/orders/{order}")).await?.expect(200)?;
        ensure!(seen["status"] == "complete", "{seen}");
        anyhow::Ok(())
    })
    .await?;
    system.settled().await?;
    system.orders.remove(0).stop(GRACE).await?;
    restore(&system, &ORDERS).await?;
    let expired = "select count(*) from orders where status = 'created' and expires_at < now()";
    let orders_db = system.orders_db.clone();
    let is_expired = async || count(&orders_db, expired).await.is_ok_and(|expired| expired == 1);
    eventually("the time of the order to be over", is_expired).await?;

    let mut holder = PgConnection::connect(&system.orders_db).await?;
    sqlx::query("begin").execute(&mut holder).await?;
    sqlx::query("select 1 from bus.relay for update").execute(&mut holder).await?;
    system.orders.push(system.spawn_orders()?);
    eventually("the relay to wait for its row", async || {
        let waiting =
            "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'";
        ensure!(count(&orders_db, waiting).await? > 0);
        anyhow::Ok(())
    })
    .await?;
    sleep(Duration::from_millis(1200)).await; // two looks for expired orders; less than readiness waits
    ensure!(is_expired().await, "the order was cancelled");
    sqlx::query("rollback").execute(&mut holder).await?;
    recovered(&system, &ORDERS).await?;
    let complete = "select count(*) from orders where status = 'complete'";
    ensure!(count(&system.orders_db, complete).await? == 1, "the payment is lost");
    Ok(())
}
