//! A large copy of tickets is rebuilt, while both services are used.

use crate::replica::{WRONG, is_equal, no_row_goes_back, rebuild, sql};
use crate::system::System;
use anyhow::{Result, ensure};
use futures::future::try_join_all;
use serde_json::json;
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use testkit::{eventually, eventually_within};
use tokio::time::interval;

const MANY: i64 = 100_000;
/// Writes per second that are offered: edits of tickets; and orders, each of which is cancelled.
const EDITS: u32 = 160;
const EDITORS: u32 = 40;
const ORDERS: u32 = 20;
/// Writes per second that a busy machine does at least.
const FEWEST: f64 = 100.0;

/// Inserts the same tickets into the table of their owner and into the copy.
async fn many_tickets(system: &System) -> Result<()> {
    for (db, table) in [(&system.tickets_db, "tickets"), (&system.orders_db, "ticket_replica")] {
        let insert = format!(
            "insert into {table} (id, title, price, user_id, version)
             select lpad(to_hex(number), 24, '0'), 'Bulk', 20, 'seller', 0 from generate_series(1, {MANY}) as number"
        );
        let mut db = PgConnection::connect(db).await?;
        sqlx::query(AssertSqlSafe(insert)).execute(&mut db).await?;
        sqlx::query(AssertSqlSafe(format!("analyze {table}"))).execute(&mut db).await?;
    }
    Ok(())
}

/// Damages some thousand rows of half of the copy, in each way.
async fn damage(system: &System) -> Result<()> {
    let half = format!("id < '{:024x}'", MANY / 2);
    for damage in [
        format!("delete from ticket_replica where {half} and id like '%7'"),
        format!("update ticket_replica set version = -1 where {half} and id like '%a3'"),
        format!("update ticket_replica set version = {WRONG} where {half} and id like '%b3'"),
        format!("update ticket_replica set price = price + 1 where {half} and id like '%c3'"),
        format!(
            "insert into ticket_replica select overlay(id placing 'f' from 1), title, price, user_id, version, order_id
             from ticket_replica where {half} and id like '%d3'"
        ),
    ] {
        sql(system, damage).await?;
    }
    Ok(())
}

/// Edits tickets anywhere in the table, so many times per second, until `stop`. No request may fail.
///
/// Most are edited once: if the rebuild sets one of them back, no later event hides it.
async fn edit(system: &System, rate: u32, stop: &AtomicBool, written: &AtomicU64) -> Result<()> {
    let (seller, mut ticks) = (system.seller(0), interval(Duration::from_secs(1) / rate));
    while !stop.load(Ordering::Relaxed) {
        ticks.tick().await;
        let ticket = rand::random_range(1..=MANY);
        let body = json!({"title": "Concert", "price": 30});
        seller.put(&format!("/api/tickets/{ticket:024x}"), body).await?.expect(200)?;
        written.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

/// Orders and cancels, until `stop`. Each ticket exists, so no request may fail, whatever the copy has.
async fn order(system: &System, tickets: &[String], stop: &AtomicBool, written: &AtomicU64) -> Result<()> {
    let mut ticks = interval(Duration::from_secs(1) / ORDERS);
    for ticket in tickets.iter().cycle() {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        ticks.tick().await;
        let order = system.order(0, "bob", ticket).await?;
        system.buyer(0, "bob").delete(&format!("/api/orders/{order}")).await?.expect(204)?;
        written.fetch_add(2, Ordering::Relaxed);
    }
    Ok(())
}

#[tokio::test]
async fn a_rebuild_of_100_000_tickets_under_writes_sets_no_row_back() -> Result<()> {
    let system = System::start(1, 1).await?;
    let tickets = system.tickets(10).await?;
    many_tickets(&system).await?;
    damage(&system).await?;
    let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut rate = 0.0;
    let rebuilding = async {
        eventually("writes", async || written.load(Ordering::Relaxed) > 200).await?;
        let (before, begun) = (written.load(Ordering::Relaxed), Instant::now());
        let rebuilt = rebuild(&system).await;
        rate = f64::from(u32::try_from(written.load(Ordering::Relaxed) - before)?) / begun.elapsed().as_secs_f64();
        stop.store(true, Ordering::Relaxed);
        testkit::say(&format!("{rate:.0} writes per second for {:?}", begun.elapsed()));
        rebuilt.map(drop)
    };
    futures::try_join!(
        rebuilding,
        try_join_all((0..EDITORS).map(|_| edit(&system, EDITS / EDITORS, &stop, &written))),
        order(&system, &tickets, &stop, &written),
        no_row_goes_back(&system, &stop),
    )?;
    ensure!(rate > FEWEST, "only {rate:.0} writes per second");
    eventually_within(Duration::from_mins(1), "the copies to agree", async || system.copies_agree().await).await?;
    is_equal(&system).await
}
