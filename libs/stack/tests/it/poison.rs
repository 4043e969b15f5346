//! Malformed messages in the stream, and events that arrive twice or in the wrong order.

use crate::records::count;
use crate::system::System;
use anyhow::{Context, Result, ensure};
use async_nats::HeaderMap;
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection, Row};
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use testkit::eventually;

fn id(number: usize) -> String {
    format!("{number:024x}")
}

fn event(number: usize, version: i64, title: &str) -> Vec<u8> {
    let event = json!({"id": id(number), "version": version, "title": title, "price": 5, "userId": "seller"});
    event.to_string().into_bytes()
}

async fn publish(system: &System, subject: &'static str, bodies: impl IntoIterator<Item = Vec<u8>>) -> Result<()> {
    let jetstream = system.jetstream().await?;
    for body in bodies {
        let mut headers = HeaderMap::new();
        headers.insert("X-Origin", "test");
        jetstream.publish_with_headers(subject, headers, body.into()).await?.await?;
    }
    Ok(())
}

#[tokio::test]
async fn malformed_events_in_a_batch_become_dead_letters_and_others_apply() -> Result<()> {
    let mut system = System::start(1, 0).await?;
    let wrong_version = String::from_utf8(event(9, 0, "x"))?.replace("\"version\":0", "\"version\":\"0\"").into_bytes();
    let poison = [
        b"not json \x00\xff".to_vec(),
        b"{\"hello\":\"world\"}".to_vec(),
        wrong_version,
        Vec::new(),
        b"[".repeat(100_000),
    ];
    // All messages are in the stream before orders starts, so that they are one batch.
    publish(&system, "ticket.created", (0..20).map(|number| event(number, 0, "before"))).await?;
    publish(&system, "ticket.updated", poison.clone()).await?;
    publish(&system, "ticket.created", (20..40).map(|number| event(number, 0, "after"))).await?;

    system.orders.push(system.spawn_orders()?);
    system.orders[0].wait_ready().await?;
    system.caught_up("TICKETS", "orders").await?;
    ensure!(system.replica_rows().await?.len() == 40, "neighbours are missing");

    let mut db = PgConnection::connect(&system.orders_db).await?;
    let letters = sqlx::query(
        "select payload, headers::text, error, subject, consumer, seq, attempts, status from bus.dead_letters order by seq",
    )
    .fetch_all(&mut db)
    .await?;
    ensure!(letters.len() == poison.len(), "{} dead letters", letters.len());
    for ((letter, poison), seq) in letters.iter().zip(&poison).zip(21_i64..) {
        ensure!(letter.get::<Vec<u8>, _>(0) == *poison, "other bytes");
        let headers: Value = serde_json::from_str(letter.get(1))?;
        ensure!(headers["X-Origin"] == json!(["test"]), "other headers: {headers}");
        ensure!(letter.get::<String, _>(2).contains("JSON"), "no reason: {:?}", letter.get::<String, _>(2));
        ensure!(letter.get::<String, _>(3) == "ticket.updated" && letter.get::<String, _>(4) == "orders");
        ensure!(letter.get::<i64, _>(5) == seq && letter.get::<i32, _>(6) == 1 && letter.get::<String, _>(7) == "dead");
    }
    ensure!(system.consumer().await?.num_redelivered == 0, "poison is being redelivered");

    // The relay finds messages of another publisher in its stream, and continues after them.
    system.seller(0).post("/api/tickets", json!({"title": "Real", "price": 5})).await?.expect(201)?;
    system.caught_up("TICKETS", "orders").await?;
    eventually("the real ticket", async || {
        ensure!(system.replica_rows().await?.len() == 41);
        anyhow::Ok(())
    })
    .await
}

#[tokio::test]
async fn an_event_that_postgres_refuses_is_retried_then_a_dead_letter() -> Result<()> {
    let system = System::start(1, 1).await?;
    // Postgres cannot store this title: the event decodes, and its handler fails every time.
    publish(&system, "ticket.created", [event(1, 0, "before"), event(2, 0, "\0"), event(3, 0, "after")]).await?;
    let dead = "select count(*) from bus.dead_letters where status = 'dead' and attempts = 5";
    testkit::eventually_within(std::time::Duration::from_mins(1), "the dead letter", async || {
        ensure!(count(&system.orders_db, dead).await? == 1);
        anyhow::Ok(())
    })
    .await?;
    system.caught_up("TICKETS", "orders").await?;
    ensure!(system.replica_rows().await?.len() == 2, "its neighbours were not applied");

    // A newer version of the same ticket supersedes it.
    publish(&system, "ticket.updated", [event(2, 1, "fine")]).await?;
    let open = "select count(*) from bus.dead_letters where status <> 'superseded'";
    eventually("the newer version", async || {
        ensure!(system.replica_rows().await?.len() == 3 && count(&system.orders_db, open).await? == 0);
        anyhow::Ok(())
    })
    .await
}

#[tokio::test]
async fn events_replayed_doubled_and_shuffled_leave_the_replica_unchanged() -> Result<()> {
    let system = System::start(1, 2).await?;
    let seller = system.seller(0);
    for number in 0..40 {
        let body = json!({"title": format!("Ticket {number}"), "price": 5});
        let ticket = seller.post("/api/tickets", body).await?.expect(201)?;
        for price in 6..9 {
            let path = format!("/api/tickets/{}", ticket["id"].as_str().context("an id")?);
            seller.put(&path, json!({"title": format!("Ticket {number}"), "price": price})).await?.expect(200)?;
        }
    }
    system.settled().await?;
    let (before, stored) = (system.replica_rows().await?, system.stream().await?);

    let jetstream = system.jetstream().await?;
    let stream = jetstream.get_stream("TICKETS").await?;
    let mut replays = Vec::new();
    for seq in 1..=stored.len() as u64 {
        let message = stream.get_raw_message(seq).await?;
        let update = message.subject.as_str() == "ticket.updated";
        let subject = if update { "ticket.updated" } else { "ticket.created" };
        replays.extend([(subject, message.payload.clone()), (subject, message.payload)]);
    }
    // The order is by the hash of the position, so it is the same in every run.
    let mut shuffled: Vec<_> = replays.into_iter().enumerate().collect();
    shuffled.sort_by_key(|(position, _)| BuildHasherDefault::<DefaultHasher>::default().hash_one(position));
    for (_, (subject, body)) in shuffled {
        jetstream.publish(subject, body).await?.await?;
    }
    system.caught_up("TICKETS", "orders").await?;
    ensure!(system.replica_rows().await? == before, "the replica has changed");
    ensure!(count(&system.orders_db, "select count(*) from bus.dead_letters").await? == 0);
    Ok(())
}

#[tokio::test]
async fn an_older_version_that_arrives_later_is_acknowledged_without_effect() -> Result<()> {
    let system = System::start(1, 1).await?;
    publish(&system, "ticket.updated", [event(1, 2, "newest")]).await?;
    system.caught_up("TICKETS", "orders").await?;
    let newest = system.replica_rows().await?;
    ensure!(newest.len() == 1 && newest[0].contains("|newest|"), "{newest:?}");
    publish(&system, "ticket.updated", [event(1, 1, "older")]).await?;
    publish(&system, "ticket.created", [event(1, 0, "oldest")]).await?;
    system.caught_up("TICKETS", "orders").await?;
    ensure!(system.replica_rows().await? == newest, "an older version had an effect");
    ensure!(system.consumer().await?.num_redelivered == 0);
    Ok(())
}
