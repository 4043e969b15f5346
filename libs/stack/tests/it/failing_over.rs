//! A service fails over to an older database, under load, and recovers.

use crate::load::Seen;
use crate::lost_database::{A_WHILE, back_up, in_postgres, load, logs, payments_agree, recovered, tokens_agree};
use crate::records::count;
use crate::replica::many_tickets;
use crate::system::System;
use anyhow::{Context, Result, ensure};
use sqlx::{Connection, PgConnection};
use stack::services::{ORDERS, Service, TICKETS};
use std::time::Duration;
use testkit::{Process, Signal, eventually, eventually_within};
use tokio::time::sleep;

/// Tickets that are created after the backup: the recovery takes longer than all kills.
const MANY: i64 = 20_000;
const KILLS: usize = 5;

/// Ends all connections, and replaces the database by another one with the tables of the dump, as a fail-over does.
async fn fail_over(system: &System, service: &Service) -> Result<()> {
    let (name, owner, role) = (service.database, service.database_owner, service.database_user);
    let prepare = format!(
        "psql -qU postgres -v ON_ERROR_STOP=1 -c 'create database standby owner {owner}' \
             -c 'revoke all on database standby from public' -c 'grant connect on database standby to {role}'
         pg_restore -U postgres --dbname=standby /tmp/{name}.dump"
    );
    in_postgres(system, &prepare).await?;
    let swap = format!(
        "psql -qU postgres -v ON_ERROR_STOP=1 -c 'alter database {name} allow_connections false' \
             -c \"select pg_terminate_backend(pid, 5000) from pg_stat_activity where datname = '{name}'\" \
             -c 'alter database {name} rename to lost' -c 'alter database standby rename to {name}'"
    );
    in_postgres(system, &swap).await
}

/// A payment of an order that was acknowledged less than a second before the loss, or withdrawn, has no order. It is a dead letter, which
/// waits for a person.
async fn close_payments_of_lost_orders(system: &System, acknowledged: &Seen) -> Result<()> {
    let mut db = PgConnection::connect(&system.orders_db).await?;
    let close = "update bus.dead_letters set status = 'superseded' where status = 'dead' and stream = 'PAYMENTS'
                 returning error, convert_from(payload, 'UTF8')";
    let letters: Vec<(String, String)> = sqlx::query_as(close).fetch_all(&mut db).await?;
    for (error, payment) in letters {
        let payment: serde_json::Value = serde_json::from_str(&payment)?;
        let order = payment["orderId"].as_str().unwrap_or_default();
        ensure!(error.contains(&format!("order {order} does not exist")), "{payment}: {error}");
        ensure!(!acknowledged.has_order(order), "{order} was acknowledged long before, and is lost");
    }
    Ok(())
}

/// A release before had another consumer, which was deleted since. The recovery does not wait for it.
async fn an_abandoned_consumer(system: &System, service: &Service) -> Result<()> {
    let (url, stream) =
        if service.name == TICKETS.name { (&system.tickets_db, "ORDERS") } else { (&system.orders_db, "TICKETS") };
    let insert = "insert into bus.read_positions (stream, consumer, seq) values ($1, 'gone', 0)";
    sqlx::query(insert).bind(stream).execute(&mut PgConnection::connect(url).await?).await?;
    Ok(())
}

/// Two replicas of each service under load; one of the databases fails over to its state of some seconds ago. `kill`: the replica that
/// recovers is killed.
async fn fails_over_under_load(service: &Service, kill: bool) -> Result<()> {
    let system = System::start(2, 2).await?;
    let load = load(&system).await?;
    let mut acknowledged = Seen::default();
    load.during(Box::pin(async {
        sleep(A_WHILE).await; // under load
        an_abandoned_consumer(&system, service).await?;
        back_up(&system, service).await?;
        sleep(A_WHILE).await; // under load
        acknowledged = load.so_far().await?;
        sleep(Duration::from_secs(1)).await; // what is older than this must not be lost
        fail_over(&system, service).await?;
        if kill {
            let replicas = if service.name == TICKETS.name { &system.tickets } else { &system.orders };
            eventually("the replica that recovers", async || {
                let recovers = replicas.iter().find(|replica| replica.logs().contains("the database lost history"));
                recovers.context("none recovers yet")?.signal(Signal::Kill).await
            })
            .await?;
        }
        eventually_within(Duration::from_mins(1), "the recovery", async || {
            ensure!(logs(&system, service).contains("the database is recovered from the stream"));
            anyhow::Ok(())
        })
        .await?;
        sleep(A_WHILE).await; // under load
        Ok(())
    }))
    .await?;
    eventually_within(Duration::from_mins(1), "no event to be tried again", async || {
        let tried = count(&system.orders_db, "select count(*) from bus.dead_letters where status = 'retrying'").await?;
        system.is_caught_up("PAYMENTS", "orders").await?;
        ensure!(tried == 0);
        anyhow::Ok(())
    })
    .await?;
    close_payments_of_lost_orders(&system, &acknowledged).await?;
    recovered(&system, service).await?;
    acknowledged.is_stored(&system).await
}

#[tokio::test]
async fn tickets_fail_over_to_an_older_database_under_load() -> Result<()> {
    fails_over_under_load(&TICKETS, false).await
}

#[tokio::test]
async fn orders_fail_over_to_an_older_database_under_load() -> Result<()> {
    fails_over_under_load(&ORDERS, false).await
}

#[tokio::test]
async fn a_replica_killed_while_it_recovers_orders_under_load_is_replaced() -> Result<()> {
    fails_over_under_load(&ORDERS, true).await
}

/// Both replicas of tickets are killed again and again while they recover. Clients repeat what gets a 503 or no response.
#[tokio::test]
async fn kill_nine_of_tickets_again_and_again_while_it_recovers_under_load() -> Result<()> {
    let mut system = System::start(2, 1).await?;
    let load = load(&system).await?.patient();
    let mut acknowledged = Seen::default();
    load.during(Box::pin(async {
        sleep(A_WHILE).await; // under load
        back_up(&system, &TICKETS).await?;
        many_tickets(&system, MANY).await?;
        sleep(A_WHILE).await; // under load
        acknowledged = load.so_far().await?;
        sleep(Duration::from_secs(1)).await; // what is older than this must not be lost
        fail_over(&system, &TICKETS).await?;
        let mut reached = 0;
        for _ in 0..KILLS {
            reached = further_than(&system, reached).await?;
            for replica in &mut system.tickets {
                replica.signal(Signal::Kill).await?;
                replica.exited().await?;
            }
            let ports = system.tickets.iter().map(Process::port);
            system.tickets = ports.map(|port| system.respawn(port)).collect::<Result<_>>()?;
        }
        further_than(&system, reached).await?;
        eventually_within(Duration::from_mins(1), "the recovery", async || {
            ensure!(logs(&system, &TICKETS).contains("the database is recovered from the stream"));
            anyhow::Ok(())
        })
        .await?;
        sleep(A_WHILE).await; // under load
        Ok(())
    }))
    .await?;
    system.settled().await?;
    tokens_agree(&system).await?;
    payments_agree(&system).await?;
    let many = count(&system.tickets_db, "select count(*) from tickets where title = 'Bulk'").await?;
    ensure!(many == MANY, "{many} of {MANY} tickets");
    acknowledged.is_stored(&system).await
}

/// Waits until the recovery of tickets has committed another page. Fails if it is over.
async fn further_than(system: &System, reached: i64) -> Result<i64> {
    eventually_within(Duration::from_secs(30), "another page of the recovery", async || {
        let sql = "select max(last_seq) from bus.position where exists (select from bus.recovery where not walked)";
        let mut db = PgConnection::connect(&system.tickets_db).await?;
        let now: Option<i64> = sqlx::query_scalar(sql).fetch_one(&mut db).await?;
        let now = now.context("no recovery is under way")?;
        ensure!(now > reached, "still at {now}");
        Ok(now)
    })
    .await
}
