//! The copy of tickets in orders is compared with its owner, and repaired while both serve.

use crate::load::Load;
use crate::records::count;
use crate::system::System;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use stack::services::{ORDERS, Service, TICKETS};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use testkit::{Process, Signal, eventually, eventually_within, nats_url};
use tokio::process::Command;
use tokio::time::sleep;

/// A version that no ticket has.
pub const WRONG: i64 = 1_000_000;

/// The exit code and the output of a command of a service, with its role and its user.
async fn command(system: &System, service: &Service, arguments: &[&str]) -> Result<(Option<i32>, String, String)> {
    let mut command = Command::new(Path::new(env!("CARGO_BIN_EXE_stack")));
    command.arg(service.name).args(arguments).env("RUST_LOG", "info");
    command.env("DATABASE_URL", system.postgres.url(service.database_user, service.database));
    let output = command.env("NATS_URL", nats_url(service.nats_user, &system.nats.server())).output().await?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok((output.status.code(), text(&output.stdout), text(&output.stderr)))
}

/// What `orders verify --json` prints about the copy of tickets.
async fn verified(system: &System) -> Result<(Option<i32>, Value)> {
    let (code, out, err) = command(system, &ORDERS, &["verify", "--json"]).await?;
    let printed: Value = serde_json::from_str(&out).with_context(|| format!("{code:?}: {out}{err}"))?;
    ensure!(printed["replicas"].as_array().is_some_and(|replicas| replicas.len() == 1), "{printed}");
    Ok((code, printed["replicas"][0].clone()))
}

pub async fn is_equal(system: &System) -> Result<()> {
    let (code, found) = verified(system).await?;
    ensure!(code == Some(0), "{code:?}: {found}");
    Ok(())
}

pub async fn rebuild(system: &System) -> Result<String> {
    let (code, out, err) = command(system, &ORDERS, &["rebuild"]).await?;
    ensure!(code == Some(0) && out.contains("the replica equals its owner"), "{code:?}: {out}{err}");
    Ok(out)
}

pub async fn sql(system: &System, sql: String) -> Result<()> {
    sqlx::query(AssertSqlSafe(sql)).execute(&mut PgConnection::connect(&system.orders_db).await?).await?;
    Ok(())
}

/// Damages rows in each way. Returns their tickets, by the names that `verify` has for them.
async fn damage(system: &System, tickets: &[String]) -> Result<BTreeMap<&'static str, String>> {
    let invented = "f".repeat(24);
    sql(system, format!("delete from ticket_replica where id = '{}'", tickets[0])).await?;
    sql(system, format!("update ticket_replica set version = version - 1 where id = '{}'", tickets[1])).await?;
    sql(system, format!("update ticket_replica set version = {WRONG} where id = '{}'", tickets[2])).await?;
    sql(system, format!("update ticket_replica set price = price + 1 where id = '{}'", tickets[3])).await?;
    sql(system, format!("insert into ticket_replica values ('{invented}', 'None', 1, 'nobody', 0, null)")).await?;
    let [missing, stale, newer, different] = [0, 1, 2, 3].map(|number: usize| tickets[number].clone());
    Ok([("missing", missing), ("stale", stale), ("newer", newer), ("different", different), ("unknown", invented)]
        .into())
}

#[tokio::test]
async fn verify_finds_exactly_the_damaged_rows_and_rebuild_repairs_them() -> Result<()> {
    let system = System::start(1, 1).await?;
    let tickets = system.tickets(30).await?;
    let order = system.order(0, "bob", &tickets[5]).await?;
    eventually("the ticket to be held", async || {
        ensure!(system.see(&tickets[5]).await?["orderId"] == json!(order));
        anyhow::Ok(())
    })
    .await?;
    system.settled().await?;
    is_equal(&system).await?;
    let (_, out, _) = command(&system, &ORDERS, &["verify"]).await?;
    ensure!(out == "TICKETS: equal; 30 counted in 1 ranges, 0 of them row by row\n", "{out}");

    let damaged = damage(&system, &tickets).await?;
    let (code, found) = verified(&system).await?;
    ensure!(code == Some(3), "{code:?}: {found}");
    for (kind, ticket) in &damaged {
        ensure!(found[kind] == json!({"count": 1, "first": [ticket]}), "{kind} is not {ticket}: {found}");
    }
    let (_, out, _) = command(&system, &ORDERS, &["verify"]).await?;
    let line = format!("\n  1 are newer than their owner's: {}\n", damaged["newer"]);
    ensure!(out.contains(&line), "{out}");

    rebuild(&system).await?;
    is_equal(&system).await?;
    system.settled().await
}

#[tokio::test]
async fn a_service_without_a_replica_has_none_to_verify() -> Result<()> {
    let system = System::start(1, 1).await?;
    for task in ["verify", "rebuild"] {
        let (code, out, err) = command(&system, &TICKETS, &[task]).await?;
        ensure!(code == Some(1) && (out.clone() + &err).contains("this service has no replica"), "{out}{err}");
    }
    Ok(())
}

/// The stream was trimmed below everything: no event of the past is there. Orders starts for the first time.
#[tokio::test]
async fn a_first_start_on_a_trimmed_stream_fills_the_copy() -> Result<()> {
    let mut system = System::prepared().await?;
    system.tickets.push(system.spawn_tickets()?);
    system.tickets[0].wait_ready().await?;
    for _ in 0..50 {
        system.ticket().await?;
    }
    eventually("the events", async || {
        let waiting = count(&system.tickets_db, "select count(*) from bus.outbox").await?;
        ensure!(waiting == 0, "{waiting} wait");
        anyhow::Ok(())
    })
    .await?;
    system.jetstream().await?.get_stream("TICKETS").await?.purge().await?;
    system.add(0, 1).await?;
    eventually("the copy", async || system.copies_agree().await).await?;
    eventually("the log line", async || {
        ensure!(system.orders[0].logs().contains("filled from the owner of TICKETS"));
        anyhow::Ok(())
    })
    .await?;
    is_equal(&system).await
}

/// An order was taken over from the stream while its ticket was unknown: it has no title.
#[tokio::test]
async fn a_fill_completes_the_titles_of_orders() -> Result<()> {
    let system = System::start(1, 1).await?;
    let ticket = system.tickets(1).await?.remove(0);
    let order = system.order(0, "bob", &ticket).await?;
    system.settled().await?;
    sql(&system, "with lost as (delete from ticket_replica) update orders set title = ''".to_owned()).await?;
    sql(&system, "select bus.request_fill('TICKETS', 'orders', 'a test', false)".to_owned()).await?;
    eventually("the title", async || {
        let seen = system.buyer(0, "bob").get(&format!("/api/orders/{order}")).await?.expect(200)?;
        ensure!(seen["ticket"]["title"] == "Concert", "{seen}");
        anyhow::Ok(())
    })
    .await?;
    is_equal(&system).await
}

/// The tickets service is a reader too: its tickets are held by orders.
#[tokio::test]
async fn holds_that_tickets_has_missed_come_from_orders() -> Result<()> {
    let mut system = System::start(1, 1).await?;
    let tickets = system.tickets(3).await?;
    let cancelled = system.order(0, "bob", &tickets[0]).await?;
    system.settled().await?;
    system.tickets.remove(0).stop(Duration::from_secs(30)).await?;
    system.buyer(0, "bob").delete(&format!("/api/orders/{cancelled}")).await?.expect(204)?;
    system.order(0, "bob", &tickets[1]).await?;
    eventually("the events", async || {
        let waiting = count(&system.orders_db, "select count(*) from bus.outbox").await?;
        ensure!(waiting == 0, "{waiting} wait");
        anyhow::Ok(())
    })
    .await?;
    system.jetstream().await?.get_stream("ORDERS").await?.purge().await?;
    system.add(1, 0).await?;
    eventually_within(Duration::from_secs(30), "the holds", async || system.copies_agree().await).await?;
    let log = system.tickets[0].logs();
    ensure!(log.contains("ORDERS has lost the messages"), "{log}");
    is_equal(&system).await
}

/// Compares the versions of the copy with those of the poll before, until `stop`. Fails if a row is missing, or older than before.
///
/// Rows with the version [`WRONG`] and invented ones have to change: they count when they are repaired.
pub async fn no_row_goes_back(system: &System, stop: &AtomicBool) -> Result<()> {
    let mut db = PgConnection::connect(&system.orders_db).await?;
    let table = "create temporary table seen (id text collate \"C\" primary key, version bigint not null)";
    sqlx::query(table).execute(&mut db).await?;
    let mut polls = 0;
    while !stop.load(Ordering::Relaxed) {
        // One statement, so that both parts see the same rows.
        let sql = "with kept as (
                       insert into seen
                       select now.id, now.version from ticket_replica as now left join seen using (id)
                       where now.version is distinct from seen.version and now.version < $1 and now.id < 'f'
                       on conflict (id) do update set version = excluded.version
                   )
                   select seen.id, seen.version, now.version from seen left join ticket_replica as now using (id)
                   where now.version is null or now.version < seen.version limit 1";
        let back: Option<(String, i64, Option<i64>)> = sqlx::query_as(sql).bind(WRONG).fetch_optional(&mut db).await?;
        ensure!(back.is_none(), "ticket, version before and now: {back:?}");
        polls += 1;
        sleep(Duration::from_millis(500)).await; // so that it is not the load
    }
    ensure!(polls > 5, "{polls} polls");
    Ok(())
}

/// Inserts tickets with their events as their owner would, in bulk.
pub async fn many_tickets(system: &System, count: i64) -> Result<()> {
    let insert = "with new as (
                      insert into tickets (id, title, price, user_id, version)
                      select lpad(to_hex(number), 24, '0'), 'Bulk', 20, 'seller', 0 from generate_series(1, $1) as number
                      returning id)
                  select bus.append('TICKETS', 'ticket.created', id, 0,
                      json_build_object('id', id, 'version', 0, 'title', 'Bulk', 'price', 20, 'userId', 'seller')::text, null)
                  from new";
    sqlx::query(insert).bind(count).execute(&mut PgConnection::connect(&system.tickets_db).await?).await?;
    eventually_within(Duration::from_mins(5), "all tickets", async || {
        let known = crate::records::count(&system.orders_db, "select count(*) from ticket_replica").await?;
        ensure!(known >= count, "{known} of {count}");
        anyhow::Ok(())
    })
    .await
}

/// One of two replicas of orders works on the rebuild. It is killed, and the other one continues.
#[tokio::test]
async fn kill_nine_in_the_middle_of_a_rebuild_is_taken_over() -> Result<()> {
    let mut system = System::start(1, 2).await?;
    let tickets = system.tickets(20).await?;
    many_tickets(&system, 6000).await?;
    damage(&system, &tickets).await?;
    let mut holder = PgConnection::connect(&system.orders_db).await?;
    // Nobody gets further than a wrong row that is locked.
    sql(&system, format!("update ticket_replica set price = 1 where id = '{:024x}'", 3000)).await?;
    sqlx::query("begin").execute(&mut holder).await?;
    let hold = format!("select 1 from ticket_replica where id = '{:024x}' for update", 3000);
    sqlx::query(AssertSqlSafe(hold)).execute(&mut holder).await?;
    let stop = AtomicBool::new(false);
    let mut replicas = std::mem::take(&mut system.orders);
    let killing = async {
        eventually_within(Duration::from_secs(30), "a part of the pages", async || {
            let passed = count(&system.orders_db, "select coalesce(max(passed), 0) from bus.fills where exact").await?;
            ensure!(passed > 500, "{passed}");
            anyhow::Ok(())
        })
        .await?;
        let works = |replica: &Process| replica.logs().contains("filling from the owner of TICKETS");
        let victim = replicas.iter_mut().find(|replica| works(replica)).context("a replica that has begun")?;
        victim.signal(Signal::Kill).await?;
        victim.exited().await?;
        sqlx::query("rollback").execute(&mut holder).await?;
        Ok(())
    };
    let rebuilding = async {
        let rebuilt = futures::try_join!(rebuild(&system), killing);
        stop.store(true, Ordering::Relaxed);
        rebuilt
    };
    futures::try_join!(rebuilding, no_row_goes_back(&system, &stop))?;
    let passed = count(&system.orders_db, "select max(passed) from bus.fills where exact").await?;
    ensure!(passed == 6020, "{passed} aggregates were looked at: some pages were repeated");
    is_equal(&system).await
}

/// The only replica is killed in the middle, and started again.
#[tokio::test]
async fn a_rebuild_killed_under_load_resumes() -> Result<()> {
    let mut system = System::start(1, 1).await?;
    let clients = |services: &[Process]| services.iter().map(Process::client).collect();
    let load = Load::new(clients(&system.tickets), clients(&system.orders), &system.nats.server()).await?;
    many_tickets(&system, 5000).await?;
    sql(&system, "update ticket_replica set title = 'Wrong', version = 1000 where id like '%77'".to_owned()).await?;
    let records = system.records.clone();
    load.during(Box::pin(async {
        sql(&system, "select bus.request_fill('TICKETS', 'orders', 'by hand', true)".to_owned()).await?;
        for _ in 0..3 {
            sleep(Duration::from_millis(1200)).await; // the look for requests takes a second
            system.orders[0].signal(Signal::Kill).await?;
            system.orders[0].exited().await?;
            let port = system.orders[0].port();
            system.orders[0] = system.respawn(port)?;
            system.orders[0].wait_ready().await?;
        }
        eventually_within(Duration::from_mins(1), "the rebuild", async || {
            let open = count(&system.orders_db, "select count(*) from bus.fills where finished_at is null").await?;
            ensure!(open == 0, "{open} open");
            anyhow::Ok(())
        })
        .await
    }))
    .await?;
    eventually_within(Duration::from_mins(1), "the copies to agree", async || records.copies_agree().await).await?;
    is_equal(&system).await
}
