//! A network between the services that delivers every event twice, in random order.

use crate::records::Records;
use crate::system::{System, id};
use anyhow::{Context, Result, ensure};
use async_nats::jetstream::{self, consumer};
use futures::future::{select, try_join_all};
use futures::{StreamExt, TryStreamExt, stream};
use rand::seq::SliceRandom;
use serde_json::json;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;
use testkit::{Nats, eventually_within};
use tokio::time::{Instant, timeout_at};

const ROUNDS: usize = 50;
const TICKETS: usize = 20;
/// Deliveries of each message.
const COPIES: u64 = 2;
/// Concurrent deliveries without an ack.
const AT_ONCE: usize = 128;

/// One direction of the network: delivers each message of a stream to the other server twice, in random order.
struct Road {
    stream: &'static str,
    from: String,
    to: String,
    delivered: AtomicU64,
}

impl Road {
    fn new(stream: &'static str, from: &Nats, to: &Nats) -> Self {
        Self { stream, from: from.url(), to: to.url(), delivered: AtomicU64::new(0) }
    }

    /// Delivers a random half of the messages in transit, repeatedly. So messages overtake many others.
    async fn carry(&self) -> Result<()> {
        let source = jetstream::new(testkit::connect(&self.from).await?).get_stream(self.stream).await?;
        let target = jetstream::new(testkit::connect(&self.to).await?);
        let mut messages = source.create_consumer(consumer::pull::OrderedConfig::default()).await?.messages().await?;
        let mut under_way = Vec::new();
        loop {
            let until = Instant::now() + Duration::from_millis(20);
            while let Ok(message) = timeout_at(until, messages.next()).await {
                let message = message.context("the stream ended")??;
                under_way.extend((0..COPIES).map(|_| (message.subject.clone(), message.payload.clone())));
            }
            under_way.shuffle(&mut rand::rng());
            let deliveries = stream::iter(under_way.split_off(under_way.len() / 2));
            deliveries
                .map(async |(subject, payload)| anyhow::Ok(target.publish(subject, payload).await?.await?))
                .buffered(AT_ONCE)
                .try_for_each(async |_| {
                    self.delivered.fetch_add(1, Relaxed);
                    Ok(())
                })
                .await?;
        }
    }

    fn delivered(&self) -> u64 {
        self.delivered.load(Relaxed)
    }

    /// Checks that every message of the stream was delivered, and that none is in transit.
    async fn is_idle(&self) -> Result<()> {
        let source = jetstream::new(testkit::connect(&self.from).await?).get_stream(self.stream).await?;
        let expected = COPIES * source.cached_info().state.last_sequence;
        ensure!(self.delivered() == expected, "{}: {} of {expected} delivered", self.stream, self.delivered());
        Ok(())
    }
}

/// Two servers, and the network between them.
struct Network {
    /// The events of tickets, to orders.
    tickets: Road,
    /// The events of orders, to tickets.
    orders: Road,
    /// The server of orders.
    far: Records,
}

impl Network {
    async fn run(&self) -> Result<()> {
        tokio::try_join!(self.tickets.carry(), self.orders.carry()).map(drop)
    }

    fn delivered(&self) -> u64 {
        self.tickets.delivered() + self.orders.delivered()
    }

    /// Checks that the network is at rest: all events are applied, their effects are published, and all are delivered.
    async fn is_quiet(&self, system: &System) -> Result<()> {
        let before = self.delivered();
        system.is_caught_up("ORDERS", "tickets").await?;
        self.far.is_caught_up("TICKETS", "orders").await?;
        system.relayed_and_applied().await?;
        self.tickets.is_idle().await?;
        self.orders.is_idle().await?;
        // A message that moved during the checks was delivered to a reader.
        ensure!(self.delivered() == before, "messages were delivered meanwhile");
        Ok(())
    }

    /// Waits until the network is at rest. Every delivery restarts the deadline, because the network of this test may be slow
    /// on a busy machine.
    async fn quiet(&self, system: &System) -> Result<()> {
        loop {
            let before = self.delivered();
            let quiet = async || self.is_quiet(system).await;
            match eventually_within(Duration::from_mins(1), "the system to settle", quiet).await {
                Err(_) if self.delivered() != before => {}
                outcome => return outcome,
            }
        }
    }
}

/// Orders and cancels, each time as another user at another replica, while the seller edits.
async fn fifty_rounds(system: &System, number: usize, ticket: &str) -> Result<()> {
    for round in 0..ROUNDS {
        let buyer = system.buyer(round + number, &format!("user {round}"));
        let order = id(&buyer.post("/api/orders", json!({"ticketId": ticket})).await?.expect(201)?)?;
        let edit = json!({"title": "Concert", "price": round + 1});
        let edited = system.seller(round).put(&format!("/api/tickets/{ticket}"), edit).await?;
        ensure!([200, 400].contains(&edited.status), "{}: {}", edited.status, edited.body);
        // Every second ticket is reserved at the end.
        if round + 1 < ROUNDS || number.is_multiple_of(2) {
            buyer.delete(&format!("/api/orders/{order}")).await?.expect(204)?;
        }
    }
    Ok(())
}

#[tokio::test]
async fn duplicated_and_shuffled_events_leave_each_ticket_to_its_live_order() -> Result<()> {
    // Each service has its own server, and the test is the network between them.
    let mut system = System::start(2, 0).await?;
    let far = Nats::start().await?;
    stack::provision(&far.server(), 1).await?;
    system.orders_nats = far.server();
    system.add(0, 2).await?;

    let network = Network {
        tickets: Road::new("TICKETS", &system.nats, &far),
        orders: Road::new("ORDERS", &far, &system.nats),
        far: Records { nats_url: far.url(), ..system.records.clone() },
    };
    let story = async {
        let tickets = try_join_all((0..TICKETS).map(|_| system.ticket())).await?;
        eventually_within(Duration::from_secs(30), "the tickets to be known", async || {
            ensure!(system.replica_rows().await?.len() == TICKETS);
            anyhow::Ok(())
        })
        .await?;
        try_join_all(tickets.iter().enumerate().map(|(number, ticket)| fifty_rounds(&system, number, ticket))).await?;
        network.quiet(&system).await?;
        // No message is in transit, so the state is final.
        system.copies_agree().await
    };
    let outcome = select(Box::pin(network.run()), Box::pin(story)).await.factor_first().0;
    outcome?;
    let held = system.tickets_rows().await?.iter().filter(|row| row.split('|').count() == 6).count();
    ensure!(held == TICKETS / 2, "{held} tickets are held");
    Ok(())
}
