//! A network between the services that delivers everything twice and shuffled.

use crate::system::{System, id};
use anyhow::{Context, Result, ensure};
use async_nats::jetstream::{self, consumer};
use futures::StreamExt;
use futures::future::{select, try_join_all};
use rand::seq::SliceRandom;
use serde_json::json;
use stack::{Nats, eventually_within};
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout_at};

const ROUNDS: usize = 50;
const TICKETS: usize = 20;

/// Brings every message of `stream` from one server to the other twice. At any moment half of what is on its way arrives,
/// in random order, so that messages overtake each other by far.
async fn carry(stream: &str, from: &str, to: &str) -> Result<()> {
    let source = jetstream::new(stack::connect(from).await?).get_stream(stream).await?;
    let target = jetstream::new(stack::connect(to).await?);
    let mut messages = source.create_consumer(consumer::pull::OrderedConfig::default()).await?.messages().await?;
    let mut under_way = Vec::new();
    loop {
        let until = Instant::now() + Duration::from_millis(20);
        while let Ok(message) = timeout_at(until, messages.next()).await {
            let message = message.context("the stream ended")??;
            under_way.extend([(); 2].map(|()| (message.subject.clone(), message.payload.clone())));
        }
        under_way.shuffle(&mut rand::rng());
        for (subject, payload) in under_way.split_off(under_way.len() / 2) {
            target.publish(subject, payload).await?.await?;
        }
    }
}

/// Orders and cancels, each time as another user at another replica, while the seller keeps trying to edit.
async fn fifty_rounds(system: &System, number: usize, ticket: &str) -> Result<()> {
    for round in 0..ROUNDS {
        let buyer = system.buyer(round + number, &format!("user {round}"));
        let order = id(&buyer.post("/api/orders", json!({"ticketId": ticket})).await?.expect(201)?)?;
        let edit = json!({"title": "Concert", "price": round + 1});
        let edited = system.seller(round).put(&format!("/api/tickets/{ticket}"), edit).await?;
        ensure!([200, 400].contains(&edited.status), "{}: {}", edited.status, edited.body);
        // Every second ticket is sold in the end.
        if round + 1 < ROUNDS || number.is_multiple_of(2) {
            buyer.delete(&format!("/api/orders/{order}")).await?.expect(204)?;
        }
    }
    Ok(())
}

#[tokio::test]
async fn fifty_rounds_of_order_and_cancel_on_twenty_tickets_end_with_every_ticket_held_by_its_live_order() -> Result<()>
{
    // Each service has a server of its own, and the test is the network between them.
    let mut system = System::start(2, 0).await?;
    let far = Nats::start().await?;
    stack::provision(&far.server(), 1).await?;
    system.orders_nats = far.server();
    system.add(0, 2).await?;

    let (near, far) = (system.nats.url(), far.url());
    let network = async { tokio::try_join!(carry("TICKETS", &near, &far), carry("ORDERS", &far, &near)).map(drop) };
    let story = async {
        let tickets = try_join_all((0..TICKETS).map(|_| system.ticket())).await?;
        eventually_within(Duration::from_secs(30), "the tickets to be known", async || {
            ensure!(system.replica_rows().await?.len() == TICKETS);
            anyhow::Ok(())
        })
        .await?;
        try_join_all(tickets.iter().enumerate().map(|(number, ticket)| fifty_rounds(&system, number, ticket))).await?;
        eventually_within(Duration::from_mins(1), "the system to settle", async || {
            system.relayed_and_applied().await?;
            system.copies_agree().await
        })
        .await?;
        // Settled means that it stays so, whatever is still on its way.
        sleep(Duration::from_secs(1)).await;
        system.copies_agree().await
    };
    let outcome = select(Box::pin(network), Box::pin(story)).await.factor_first().0;
    outcome?;
    let held = system.tickets_rows().await?.iter().filter(|row| row.split('|').count() == 6).count();
    ensure!(held == TICKETS / 2, "{held} tickets are held");
    Ok(())
}
