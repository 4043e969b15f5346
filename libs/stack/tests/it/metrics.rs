//! What the services expose at `/metrics`.

#![expect(clippy::float_cmp, reason = "most values are whole numbers")]

use crate::records::count;
use crate::system::System;
use anyhow::{Context, Result, ensure};
use reqwest::Method;
use serde_json::json;
use sqlx::{Connection, Executor, PgConnection};
use std::collections::BTreeSet;
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use testkit::images::Image;
use testkit::{Answer, Client, Metrics, Process, Signal, eventually, eventually_within, images};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

const OPERATIONS: &str = include_str!("../../../../docs/operations.md");

/// Metrics that neither service has: those of durable tasks.
const OF_OTHERS: [&str; 1] = ["event_bus_tasks_total"];

/// Waits until a sum of series is as expected.
async fn becomes(
    process: &Process,
    name: &str,
    labels: &[(&str, &str)],
    is_expected: impl Fn(f64) -> bool,
) -> Result<f64> {
    eventually_within(Duration::from_secs(40), &format!("{name} {labels:?}"), async || {
        let metrics = Metrics::of(&process.client()).await?;
        let value = metrics.sum(name, labels);
        ensure!(metrics.has(name, labels) && is_expected(value), "{value}");
        anyhow::Ok(value)
    })
    .await
}

async fn value(process: &Process, name: &str, labels: &[(&str, &str)]) -> Result<f64> {
    Ok(Metrics::of(&process.client()).await?.sum(name, labels))
}

/// The first columns of the table of metrics: names, without labels.
pub fn documented() -> BTreeSet<&'static str> {
    let section = OPERATIONS.split_once("\n## Metrics\n").map_or("", |(_, section)| section);
    let section = section.split("\n## ").next().unwrap_or_default();
    let cells = section.lines().filter_map(|line| line.strip_prefix("| `")?.split_once(" |"));
    cells
        .flat_map(|(cell, _)| cell.split('`'))
        .filter_map(|name| name.split('{').next())
        .filter(|name| !name.is_empty() && name.chars().all(|c| c.is_ascii_lowercase() || c == '_'))
        .collect()
}

async fn promtool(metrics: &Metrics) -> Result<()> {
    images::ensure(Image::Prometheus).await?;
    let (name, tag) = Image::Prometheus.name();
    let mut check = Command::new("docker")
        .args(["run", "--rm", "--interactive", "--network=none", "--entrypoint=promtool"])
        .args([&format!("{name}:{tag}"), "check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    check.stdin.take().context("it has an input")?.write_all(metrics.text.as_bytes())?;
    let output = check.wait_with_output()?;
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success() && stderr.is_empty(), "{stdout}{stderr}");
    Ok(())
}

#[tokio::test]
async fn all_metrics_are_described_documented_and_pass_promtool() -> Result<()> {
    let system = System::start_with(1, 1, "1s").await?;
    let tickets = system.tickets(2).await?;
    system.order(0, "buyer", &tickets[0]).await?;
    let (mine, theirs) = (&system.tickets[0], &system.orders[0]);
    for (process, stream) in [(mine, "TICKETS"), (theirs, "ORDERS")] {
        becomes(process, "event_bus_stream_bytes", &[("stream", stream)], |bytes| bytes > 0.0).await?;
    }
    becomes(theirs, "orders_expiry_lag_seconds_count", &[], |count| count == 1.0).await?;
    let mut real = BTreeSet::new();
    for process in [mine, theirs] {
        let metrics = Metrics::of(&process.client()).await?;
        for (family, has_help) in metrics.families() {
            ensure!(has_help, "{family} has no help text");
            real.insert(family.to_owned());
        }
        promtool(&metrics).await?;
    }
    let real: BTreeSet<&str> = real.iter().map(String::as_str).chain(OF_OTHERS).collect();
    let documented = documented();
    let (undocumented, unreal): (Vec<_>, Vec<_>) =
        (real.difference(&documented).collect(), documented.difference(&real).collect());
    ensure!(undocumented.is_empty() && unreal.is_empty(), "not documented: {undocumented:?}; no metric: {unreal:?}");
    Ok(())
}

#[tokio::test]
async fn each_step_of_an_event_is_measured() -> Result<()> {
    let system = System::start_with(1, 1, "2s").await?;
    let tickets = system.tickets(2).await?;
    system.order(0, "buyer", &tickets[0]).await?;
    let refused = system.buyer(0, "other").post("/api/orders", json!({"ticketId": tickets[0]})).await?;
    refused.expect(400)?;
    let unknown = system.buyer(0, "buyer").post("/api/orders", json!({"ticketId": "f".repeat(24)})).await?;
    unknown.expect(404)?;
    let (mine, theirs) = (&system.tickets[0], &system.orders[0]);
    let stream = [("stream", "TICKETS")];
    for name in ["event_bus_publish_duration_seconds_count", "event_bus_publish_batch_events_sum"] {
        becomes(mine, name, &stream, |published| published >= 1.0).await?;
    }
    for name in ["event_bus_apply_duration_seconds_count", "event_bus_apply_batch_events_sum"] {
        becomes(theirs, name, &stream, |applied| applied >= 1.0).await?;
    }
    let lags = becomes(theirs, "event_bus_replication_lag_seconds_count", &stream, |lags| lags >= 2.0).await?;
    let lag = value(theirs, "event_bus_replication_lag_seconds_sum", &stream).await? / lags;
    ensure!(lag > 0.0 && lag < 2.0, "a lag of {lag} s");
    for (outcome, expected) in
        [("created", 1.0), ("already_reserved", 1.0), ("unknown_ticket", 1.0), ("unavailable", 0.0)]
    {
        becomes(theirs, "orders_reservations_total", &[("outcome", outcome)], |count| count == expected).await?;
    }
    for statement in ["FindOffers", "InsertOrders"] {
        for name in [
            "event_bus_batch_items_sum",
            "event_bus_batch_duration_seconds_count",
            "event_bus_batch_wait_seconds_count",
        ] {
            becomes(theirs, name, &[("statement", statement)], |items| items >= 1.0).await?;
        }
    }
    system.buyer(0, "buyer").get("/api/orders").await?.expect(200)?;
    for pool in ["requests", "background", "batches"] {
        becomes(theirs, "event_bus_pool_wait_seconds_count", &[("pool", pool)], |waits| waits >= 1.0).await?;
    }
    becomes(theirs, "event_bus_pool_max_connections", &[("pool", "requests")], |most| most == 6.0).await?;
    let open = becomes(theirs, "event_bus_pool_connections", &[("pool", "background")], |open| open >= 1.0).await?;
    ensure!(open <= 8.0, "{open} connections");
    becomes(theirs, "orders_expiry_lag_seconds_count", &[], |count| count == 1.0).await?;
    let lag = value(theirs, "orders_expiry_lag_seconds_sum", &[]).await?;
    ensure!(lag > 0.0 && lag < 10.0, "an order was cancelled {lag} s too late");
    becomes(theirs, "process_resident_memory_bytes", &[], |bytes| bytes > 1_000_000.0).await?;
    becomes(theirs, "build_info", &[("service", "orders")], |one| one == 1.0).await?;
    Ok(())
}

#[tokio::test]
async fn an_event_delayed_by_a_frozen_nats_shows_in_age_and_then_in_lag() -> Result<()> {
    let system = System::start(1, 1).await?;
    system.tickets(1).await?;
    let (mine, theirs) = (&system.tickets[0], &system.orders[0]);
    let stream = [("stream", "TICKETS")];
    let before = value(theirs, "event_bus_replication_lag_seconds_sum", &stream).await?;
    becomes(mine, "event_bus_outbox_events", &stream, |events| events == 0.0).await?;
    system.nats.pause().await?;
    for _ in 0..3 {
        system.ticket().await?;
    }
    becomes(mine, "event_bus_outbox_events", &stream, |events| events == 3.0).await?;
    becomes(mine, "event_bus_outbox_oldest_event_age_seconds", &stream, |age| age > 8.0).await?;
    becomes(mine, "event_bus_publish_failures_total", &[("code", "no_reply")], |failures| failures >= 1.0).await?;
    system.nats.unpause().await?;
    becomes(mine, "event_bus_outbox_events", &stream, |events| events == 0.0).await?;
    becomes(mine, "event_bus_outbox_oldest_event_age_seconds", &stream, |age| age == 0.0).await?;
    becomes(theirs, "event_bus_replication_lag_seconds_sum", &stream, |lag| lag > before + 3.0 * 8.0).await?;
    becomes(theirs, "event_bus_pending_messages", &stream, |pending| pending == 0.0).await?;
    Ok(())
}

#[tokio::test]
async fn an_event_that_fails_is_counted_at_each_step() -> Result<()> {
    let system = System::start(1, 1).await?;
    system.publish("ticket.created", json!({"hello": "world"})).await?;
    let theirs = &system.orders[0];
    let stream = [("stream", "TICKETS")];
    becomes(theirs, "event_bus_dead_letters_total", &stream, |letters| letters == 1.0).await?;
    becomes(theirs, "event_bus_dead_letters_open", &[("status", "dead")], |letters| letters == 1.0).await?;
    // The stream has a message that the relay has not published.
    system.ticket().await?;
    becomes(&system.tickets[0], "event_bus_reconciliations_total", &[("stream_is", "ahead")], |times| times >= 1.0)
        .await?;

    let unknown = json!({"id": "f".repeat(24), "version": 0, "status": "created", "userId": "buyer",
        "expiresAt": "2030-01-01T00:00:00.000Z", "ticket": {"id": "e".repeat(24), "price": 20, "version": 0, "reservation": 1}});
    system.publish("order.created", unknown).await?;
    let mine = &system.tickets[0];
    let stream = [("stream", "ORDERS")];
    becomes(mine, "event_bus_dead_letters_open", &[("status", "retrying")], |letters| letters == 1.0).await?;
    becomes(mine, "event_bus_failed_attempts_total", &stream, |attempts| attempts >= 2.0).await?;
    becomes(mine, "event_bus_redelivered_messages_total", &stream, |messages| messages >= 1.0).await?;
    becomes(mine, "event_bus_unacknowledged_messages", &stream, |messages| messages == 1.0).await?;
    Ok(())
}

#[tokio::test]
async fn an_event_that_arrives_again_is_counted_as_stale() -> Result<()> {
    let system = System::start(1, 1).await?;
    let ticket = system.tickets(1).await?.remove(0);
    system.order(0, "buyer", &ticket).await?;
    // Until then, the streams may not have all events.
    system.settled().await?;
    for stream in ["TICKETS", "ORDERS"] {
        for (subject, body) in system.bodies(stream).await? {
            system.jetstream().await?.publish(subject, body.into()).await?.await?;
        }
    }
    becomes(&system.orders[0], "orders_stale_ticket_events_total", &[], |events| events >= 1.0).await?;
    becomes(&system.tickets[0], "tickets_stale_order_events_total", &[], |events| events >= 1.0).await?;
    Ok(())
}

#[tokio::test]
async fn events_that_wait_for_a_lock_are_pending() -> Result<()> {
    let system = System::start(1, 1).await?;
    let ticket = system.tickets(1).await?.remove(0);
    let mut db = PgConnection::connect(&system.orders_db).await?;
    db.execute("begin; lock table ticket_replica").await?;
    let jetstream = system.jetstream().await?;
    for version in 1..=1500 {
        let event = json!({"id": ticket, "version": version, "title": "Concert", "price": 20, "userId": "seller"});
        jetstream.publish("ticket.updated", event.to_string().into()).await?;
    }
    let stream = [("stream", "TICKETS")];
    becomes(&system.orders[0], "event_bus_pending_messages", &stream, |pending| pending >= 1.0).await?;
    becomes(&system.orders[0], "event_bus_unacknowledged_messages", &stream, |messages| messages >= 100.0).await?;
    db.execute("rollback").await?;
    becomes(&system.orders[0], "event_bus_pending_messages", &stream, |pending| pending == 0.0).await?;
    becomes(&system.orders[0], "event_bus_unacknowledged_messages", &stream, |messages| messages == 0.0).await?;
    Ok(())
}

#[tokio::test]
async fn a_full_stream_is_counted_by_the_code_of_nats() -> Result<()> {
    let mut system = System::prepared().await?;
    let jetstream = system.jetstream().await?;
    let mut config = jetstream.get_stream("TICKETS").await?.cached_info().config.clone();
    config.max_bytes = 65_536;
    jetstream.update_stream(config).await?;
    system.add(1, 1).await?;
    system.orders[0].signal(Signal::Stop).await?;
    let stream = ("stream", "TICKETS");
    eventually_within(Duration::from_mins(1), "the stream to be full", async || {
        for _ in 0..20 {
            system.ticket().await?;
        }
        let failures =
            value(&system.tickets[0], "event_bus_publish_failures_total", &[stream, ("code", "10077")]).await?;
        ensure!(failures >= 1.0, "{failures}");
        anyhow::Ok(())
    })
    .await?;
    becomes(&system.tickets[0], "event_bus_outbox_events", &[stream], |events| events >= 1.0).await?;
    system.orders[0].signal(Signal::Continue).await?;
    becomes(&system.tickets[0], "event_bus_outbox_events", &[stream], |events| events == 0.0).await?;
    Ok(())
}

#[tokio::test]
async fn a_scrape_answers_within_a_second_while_postgres_is_frozen() -> Result<()> {
    let system = System::start(1, 1).await?;
    let (tickets, orders) = (&system.tickets[0], &system.orders[0]);
    becomes(tickets, "event_bus_database_up", &[], |up| up == 1.0).await?;
    system.postgres.pause().await?;
    let down = eventually("Postgres to be noticed", async || {
        let begun = Instant::now();
        let metrics = Metrics::of(&tickets.client()).await?;
        let took = begun.elapsed();
        ensure!(took < Duration::from_secs(1), "a scrape took {took:?}");
        ensure!(metrics.sum("event_bus_database_up", &[]) == 0.0, "it is up");
        anyhow::Ok(metrics)
    });
    let down = down.await?;
    ensure!(down.sum("event_bus_outbox_events", &[("stream", "TICKETS")]).is_nan(), "an old value");
    let refused = tickets.client().signed_in("seller").post("/api/tickets", json!({"title": "x", "price": 1})).await?;
    refused.expect(503)?;
    orders.client().signed_in("buyer").get("/api/orders").await?.expect(503)?;
    becomes(orders, "event_bus_pool_timeouts_total", &[("pool", "requests")], |timeouts| timeouts == 1.0).await?;
    let refused = [("http_request_method", "POST"), ("http_response_status_code", "503")];
    becomes(tickets, "http_server_request_duration_seconds_count", &refused, |count| count == 1.0).await?;
    system.postgres.unpause().await?;
    becomes(tickets, "event_bus_database_up", &[], |up| up == 1.0).await?;
    becomes(tickets, "event_bus_outbox_events", &[("stream", "TICKETS")], |events| events >= 0.0).await?;
    Ok(())
}

#[tokio::test]
async fn requests_that_are_not_done_are_measured() -> Result<()> {
    let system = System::start(1, 0).await?;
    let tickets = &system.tickets[0];
    for name in ["event_bus_fills_open", "event_bus_republishes_open", "event_bus_recovering"] {
        becomes(tickets, name, &[], |open| open == 0.0).await?;
    }
    let mut db = PgConnection::connect(&system.tickets_db).await?;
    // No process of this service reads or publishes to these streams.
    db.execute("select bus.request_fill('OTHER', 'nobody', 'a test', false)").await?;
    db.execute("insert into bus.republish (stream, reason) values ('OTHER', 'a test')").await?;
    db.execute("insert into bus.recovery (stream, from_seq, until_seq) values ('OTHER', 1, 2)").await?;
    for name in ["event_bus_fills_open", "event_bus_republishes_open", "event_bus_recovering"] {
        becomes(tickets, name, &[], |open| open == 1.0).await?;
    }
    Ok(())
}

/// Requests of each kind, with this number in them.
async fn strange_requests(process: &Process, number: usize) -> Result<()> {
    let client: Client = process.client().signed_in(&format!("user{number}"));
    client.get(&format!("/api/tickets/{number:024x}")).await?.expect(404)?;
    client.get(&format!("/api/tickets/malformed{number}")).await?.expect(400)?;
    client.get(&format!("/unknown/{number}?query={number}")).await?.expect(404)?;
    client.put(&format!("/api/tickets/{number:024x}"), json!({"title": number, "price": 1})).await?.expect(404)?;
    let method = Method::from_bytes(format!("METHOD{number}").as_bytes())?;
    Answer::to(client.request(method, "/api/tickets")).await?.expect(404)?;
    let header = format!("value{number}");
    Answer::to(client.request(Method::GET, "/api/tickets?limit=1").header("x-request-id", header))
        .await?
        .expect(200)?;
    let mut broken = TcpStream::connect(process.address().trim_start_matches("http://")).await?;
    broken.write_all(format!("\x01{number} / HTTP/9.{number}\r\n\r\n").as_bytes()).await?;
    Ok(())
}

#[tokio::test]
async fn a_thousand_different_requests_add_no_series() -> Result<()> {
    let system = System::start(1, 0).await?;
    let tickets = &system.tickets[0];
    strange_requests(tickets, 0).await?;
    becomes(tickets, "http_server_malformed_requests_total", &[], |count| count == 1.0).await?;
    // The subscription registers its metrics when it begins.
    becomes(tickets, "event_bus_pending_messages", &[("stream", "ORDERS")], |_| true).await?;
    let before = Metrics::of(&tickets.client()).await?;
    for number in 1..=150 {
        strange_requests(tickets, number).await?;
    }
    becomes(tickets, "http_server_malformed_requests_total", &[], |count| count == 151.0).await?;
    let after = Metrics::of(&tickets.client()).await?;
    let (before, after_series) = (before.series(), after.series());
    let new: Vec<_> = after_series.difference(&before).collect();
    ensure!(new.is_empty(), "{} new series, such as {:?}", new.len(), new.first());
    let unrouted = [("http_request_method", "_OTHER"), ("http_route", "/api/tickets")];
    ensure!(after.sum("http_server_request_duration_seconds_count", &unrouted) == 151.0, "{}", after.text);
    ensure!(count(&system.tickets_db, "select count(*) from tickets").await? == 0);
    Ok(())
}
