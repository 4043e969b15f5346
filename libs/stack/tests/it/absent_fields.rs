//! Events without fields that their reader does not need, and events without a field that it needs.
//!
//! Each body is published to the real stream, as the user with the right to publish it. The publishing service does not run.

use crate::records::count;
use crate::system::System;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};
use testkit::{eventually, nats_url};

fn new_id() -> String {
    format!("{:024x}", rand::random::<u64>())
}

/// `body` without the field at `path`, for example `ticket.price`.
fn without(body: &Value, path: &str) -> Value {
    let (object, field) = path.rsplit_once('.').unwrap_or(("", path));
    let pointer = if object.is_empty() { String::new() } else { format!("/{}", object.replace('.', "/")) };
    let mut body = body.clone();
    let removed = body.pointer_mut(&pointer).and_then(Value::as_object_mut).and_then(|object| object.remove(field));
    assert!(removed.is_some(), "{body} has no {path}");
    body
}

/// `body` unchanged, without each field of `unused`, and without all of them.
fn forms(body: &Value, unused: &[&str]) -> Vec<Value> {
    let mut forms = vec![body.clone()];
    forms.extend(unused.iter().map(|path| without(body, path)));
    forms.push(unused.iter().fold(body.clone(), |body, path| without(&body, path)));
    forms
}

/// The same event of another aggregate.
fn with_id(body: &Value, id: &str) -> Value {
    let mut body = body.clone();
    body["id"] = json!(id);
    body
}

async fn publish(system: &System, user: &str, subject: &'static str, body: &Value) -> Result<()> {
    let nats = testkit::connect(&nats_url(user, &system.nats.server())).await?;
    async_nats::jetstream::new(nats).publish(subject, body.to_string().into()).await?.await?;
    Ok(())
}

async fn no_dead_letters(database_url: &str) -> Result<()> {
    let letters = count(database_url, "select count(*) from bus.dead_letters").await?;
    ensure!(letters == 0, "{letters} dead letters");
    Ok(())
}

fn ticket() -> Value {
    json!({"id": new_id(), "version": 0, "title": "Concert", "price": 20.5, "userId": "seller"})
}

fn order(ticket: &str) -> Value {
    json!({"id": new_id(), "version": 0, "status": "created", "userId": "buyer",
           "expiresAt": "2026-01-31T12:15:00.000Z",
           "ticket": {"id": ticket, "price": 20.5, "version": 0, "reservation": 1}})
}

const UNUSED_OF_TICKETS: &[&str] = &["userId"];
const UNUSED_OF_ORDERS: &[&str] =
    &["status", "userId", "expiresAt", "ticket.price", "ticket.version", "ticket.reservation"];

#[tokio::test]
async fn ticket_events_without_unused_fields_reach_the_replica() -> Result<()> {
    let mut system = System::prepared().await?;
    system.add(0, 1).await?;
    let mut updated = ticket();
    updated["orderId"] = json!(new_id());
    let unused_of_updates = [UNUSED_OF_TICKETS, &["orderId"]].concat();
    for (subject, forms) in [
        ("ticket.created", forms(&ticket(), UNUSED_OF_TICKETS)),
        ("ticket.updated", forms(&updated, &unused_of_updates)),
    ] {
        for form in forms {
            let ticket = new_id();
            publish(&system, "tickets", subject, &with_id(&form, &ticket)).await?;
            system.caught_up("TICKETS", "orders").await?;
            no_dead_letters(&system.orders_db).await.with_context(|| format!("{subject} {form}"))?;
            let order = system.buyer(0, "buyer").post("/api/orders", json!({"ticketId": ticket})).await?.expect(201)?;
            let expected = json!({"id": ticket, "title": "Concert", "price": 20.5, "version": 0});
            ensure!(order["ticket"] == expected, "{subject} {form}: {order}");
        }
    }
    Ok(())
}

/// Publishes an order event, and waits until its ticket is held by its order, or free.
async fn follows(system: &System, subject: &'static str, event: &Value, held: bool) -> Result<()> {
    let ticket = event["ticket"]["id"].as_str().context("an id")?;
    publish(system, "orders", subject, event).await?;
    let what = format!("the ticket to follow {subject} {event}");
    eventually(&what, async || {
        no_dead_letters(&system.tickets_db).await?;
        let ticket = system.see(ticket).await?;
        ensure!(ticket.get("orderId") == held.then_some(&event["id"]), "{ticket}");
        anyhow::Ok(())
    })
    .await
}

#[tokio::test]
async fn order_events_without_unused_fields_hold_and_release_their_ticket() -> Result<()> {
    let system = System::start(1, 0).await?;
    let mut forms = forms(&order(""), UNUSED_OF_ORDERS);
    // The event of an older publisher, without the reservation number and the version of the ticket.
    forms.push(without(&without(&order(""), "ticket.version"), "ticket.reservation"));
    for form in forms {
        for (last, version, held) in [("order.cancelled", 1, false), ("order.completed", 1, true)] {
            let mut event = with_id(&form, &new_id());
            event["ticket"]["id"] = json!(system.ticket().await?);
            follows(&system, "order.created", &event, true).await?;
            event["version"] = json!(version);
            follows(&system, last, &event, held).await?;
        }
        // A completed order holds its ticket even if its creation was never delivered.
        let mut event = with_id(&form, &new_id());
        event["ticket"]["id"] = json!(system.ticket().await?);
        follows(&system, "order.completed", &event, true).await?;
    }
    system.caught_up("ORDERS", "tickets").await?;
    no_dead_letters(&system.tickets_db).await
}

#[tokio::test]
async fn payments_and_expirations_without_unused_fields_end_their_order() -> Result<()> {
    let system = System::start(1, 1).await?;
    let payment = json!({"id": new_id(), "orderId": "", "stripeId": "pi_1"});
    let mut cases: Vec<_> = forms(&payment, &["stripeId"])
        .into_iter()
        .map(|form| ("payments", "payment.created", with_id(&form, &new_id()), "complete"))
        .collect();
    cases.push(("expiration", "expiration.complete", json!({"orderId": ""}), "cancelled"));
    for (user, subject, mut event, status) in cases {
        let ticket = system.tickets(1).await?.remove(0);
        let order = system.order(0, "buyer", &ticket).await?;
        event["orderId"] = json!(order);
        publish(&system, user, subject, &event).await?;
        eventually(&format!("{subject} {event} to end its order"), async || {
            no_dead_letters(&system.orders_db).await?;
            let order = system.buyer(0, "buyer").get(&format!("/api/orders/{order}")).await?.expect(200)?;
            ensure!(order["status"] == status, "{order}");
            anyhow::Ok(())
        })
        .await?;
    }
    Ok(())
}

/// Publishes `body` without each of `needed` in turn; each becomes a dead letter that names the field.
async fn refused(system: &System, user: &str, subject: &'static str, body: &Value, needed: &[&str]) -> Result<()> {
    let database_url = if user == "orders" { &system.tickets_db } else { &system.orders_db };
    let mut db = PgConnection::connect(database_url).await?;
    for path in needed {
        let incomplete = without(body, path);
        publish(system, user, subject, &incomplete).await?;
        let field = path.rsplit('.').next().context("a path")?;
        let (error, status) = eventually(&format!("the dead letter of {subject} {incomplete}"), async || {
            let letter = "select error, status from bus.dead_letters where subject = $1 and payload = $2";
            let letter = sqlx::query_as::<_, (String, String)>(letter).bind(subject);
            letter.bind(incomplete.to_string().into_bytes()).fetch_one(&mut db).await
        })
        .await?;
        ensure!(error.contains(&format!("missing field `{field}`")) && status == "dead", "{path}: {status}: {error}");
    }
    Ok(())
}

#[tokio::test]
async fn an_event_without_a_needed_field_becomes_a_dead_letter_that_names_it() -> Result<()> {
    let mut system = System::prepared().await?;
    system.add(1, 1).await?;
    let held = order(&system.ticket().await?);
    for subject in ["ticket.created", "ticket.updated"] {
        refused(&system, "tickets", subject, &ticket(), &["id", "version", "title", "price"]).await?;
    }
    for subject in ["order.created", "order.cancelled", "order.completed"] {
        refused(&system, "orders", subject, &held, &["id", "version", "ticket", "ticket.id"]).await?;
    }
    let payment = json!({"id": new_id(), "orderId": new_id(), "stripeId": "pi_1"});
    refused(&system, "payments", "payment.created", &payment, &["id", "orderId"]).await?;
    refused(&system, "expiration", "expiration.complete", &json!({"orderId": new_id()}), &["orderId"]).await
}
