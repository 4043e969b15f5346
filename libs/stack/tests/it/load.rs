//! A mixed load of concurrent users, which records every successful response.

use crate::records::{Records, id};
use anyhow::{Context, Result, ensure};
use async_nats::jetstream;
use futures::future::try_join_all;
use rand::seq::IndexedRandom;
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use testkit::{Answer, Client, eventually_within, nats_url};
use tokio::time::sleep;

const USERS: usize = 8;

/// The 2xx responses, and the payments that the broker confirmed.
#[derive(Clone, Default)]
pub struct Seen {
    /// The bodies of the responses.
    tickets: Vec<Value>,
    orders: Vec<Value>,
    cancelled: Vec<String>,
    /// Each payment has the id of its order.
    paid: Vec<String>,
}

pub struct Load {
    tickets: Vec<Client>,
    orders: Vec<Client>,
    payments: jetstream::Context,
    seen: Mutex<Seen>,
    /// Whether a request that gets a 503, or no response, is repeated.
    is_patient: bool,
    stop: AtomicBool,
}

impl Load {
    /// A load on these replicas and these servers of NATS (`host:port`, comma-separated).
    pub async fn new(tickets: Vec<Client>, orders: Vec<Client>, nats: &str) -> Result<Self> {
        let payments = jetstream::new(testkit::connect(&nats_url("payments", nats)).await?);
        Ok(Self { tickets, orders, payments, seen: Mutex::default(), is_patient: false, stop: AtomicBool::new(false) })
    }

    /// The same load, whose users repeat a request that gets a 503, or no response, at any replica.
    #[must_use]
    pub fn patient(self) -> Self {
        Self { is_patient: true, ..self }
    }

    /// Runs the load until `fault` ends, and at least until enough was seen to be checked.
    pub async fn during(&self, fault: impl Future<Output = Result<()>>) -> Result<()> {
        let names: Vec<_> = (0..USERS).map(|number| format!("user {number}")).collect();
        let users = try_join_all(names.iter().map(|name| self.user(name)));
        let fault = async {
            let outcome = async {
                fault.await?;
                self.so_far().await.map(drop)
            };
            let outcome = outcome.await;
            self.stop.store(true, Ordering::Relaxed);
            outcome
        };
        futures::try_join!(users, fault).map(drop)
    }

    /// One user, with random requests to random replicas until the stop.
    async fn user(&self, name: &str) -> Result<()> {
        while !self.stop.load(Ordering::Relaxed) {
            // Connecting to a dead service fails at once: give it time to restart.
            if self.act(name).await.is_err() {
                sleep(Duration::from_millis(10)).await;
            }
        }
        Ok(())
    }

    async fn act(&self, name: &str) -> Result<()> {
        let mine = |item: &&Value| item["userId"] == name;
        let pick = |items: &[Value], mine: &dyn Fn(&&Value) -> bool| {
            let items: Vec<_> = items.iter().filter(mine).collect();
            items.choose(&mut rand::rng()).map(|item| (**item).clone()).context("there is none yet")
        };
        match rand::random_range(0..10) {
            0..3 => {
                let price = rand::random_range(1..1000);
                let body = json!({"title": name, "price": price});
                let post = async |client: Client| client.post("/api/tickets", body.clone()).await;
                let ticket = self.answer(&self.tickets, name, post).await?.expect(201)?;
                self.saw(|seen| seen.tickets.push(ticket));
            }
            3..5 => {
                let ticket = self.saw(|seen| pick(&seen.tickets, &mine))?;
                let body = json!({"title": name, "price": rand::random_range(1..1000)});
                let path = format!("/api/tickets/{}", id(&ticket)?);
                let put = async |client: Client| client.put(&path, body.clone()).await;
                let ticket = self.answer(&self.tickets, name, put).await?.expect(200)?;
                self.saw(|seen| seen.tickets.push(ticket));
            }
            5..8 => {
                let ticket = self.saw(|seen| pick(&seen.tickets, &|_| true))?;
                let post = async |client: Client| client.post("/api/orders", json!({"ticketId": ticket["id"]})).await;
                let order = self.answer(&self.orders, name, post).await?.expect(201)?;
                self.saw(|seen| seen.orders.push(order));
            }
            8 => {
                let order = id(&self.saw(|seen| pick(&seen.orders, &mine))?)?;
                let path = format!("/api/orders/{order}");
                self.answer(&self.orders, name, async |client: Client| client.delete(&path).await)
                    .await?
                    .expect(204)?;
                self.saw(|seen| seen.cancelled.push(order));
            }
            _ => {
                let order = id(&self.saw(|seen| pick(&seen.orders, &mine))?)?;
                let payment = json!({"id": order, "orderId": order, "stripeId": "pi"});
                self.payments.publish("payment.created", payment.to_string().into()).await?.await?;
                self.saw(|seen| seen.paid.push(order));
            }
        }
        Ok(())
    }

    /// The response of one of `replicas` to a request of this user.
    async fn answer(
        &self,
        replicas: &[Client],
        name: &str,
        request: impl AsyncFn(Client) -> Result<Answer>,
    ) -> Result<Answer> {
        loop {
            let answer = request(replicas.choose(&mut rand::rng()).context("a replica")?.signed_in(name)).await;
            let is_over = answer.as_ref().is_ok_and(|answer| answer.status != 503);
            if is_over || !self.is_patient || self.stop.load(Ordering::Relaxed) {
                return answer;
            }
            sleep(Duration::from_millis(10)).await;
        }
    }

    fn saw<T>(&self, what: impl FnOnce(&mut Seen) -> T) -> T {
        what(&mut self.seen.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What clients have seen so far, as soon as it is enough to be checked.
    pub async fn so_far(&self) -> Result<Seen> {
        eventually_within(Duration::from_secs(30), "enough responses", async || {
            let seen = self.saw(|seen| seen.clone());
            seen.is_enough().map(|()| seen)
        })
        .await
    }

    /// See [`Seen::is_stored`].
    pub async fn nothing_is_missing(self, records: &Records) -> Result<()> {
        self.saw(|seen| seen.clone()).is_stored(records).await
    }

    /// Checks every recorded response against a system at rest, and that there were enough of each kind.
    pub async fn was_told_the_truth(self, records: &Records, at_least: usize) -> Result<()> {
        let Seen { tickets, orders, cancelled, paid } = self.seen.into_inner().unwrap_or_else(PoisonError::into_inner);
        for (what, seen) in [
            ("tickets", tickets.len()),
            ("orders", orders.len()),
            ("cancels", cancelled.len()),
            ("payments", paid.len()),
        ] {
            ensure!(seen >= at_least, "too few {what}: {seen}");
        }
        // Every version in a response equals the event with its number. `settled` has compared the stream with the table.
        let stream = records.stream().await?;
        let announced: HashMap<_, _> =
            stream.iter().map(|stored| ((&*stored.id, stored.version), &stored.body)).collect();
        for ticket in &tickets {
            let key = (ticket["id"].as_str().context("an id")?, ticket["version"].as_i64().context("a version")?);
            ensure!(
                announced.get(&key) == Some(&ticket),
                "a client saw {ticket}, announced is {:?}",
                announced.get(&key)
            );
        }
        let mut db = PgConnection::connect(&records.orders_db).await?;
        let sql = "select orders.id, user_id, ticket_id, status, refund_due
                   from orders left join payments on payments.id = orders.id";
        let rows: Vec<(String, String, String, String, Option<bool>)> = sqlx::query_as(sql).fetch_all(&mut db).await?;
        let rows: HashMap<_, _> =
            rows.into_iter().map(|(id, user, ticket, status, due)| (id, (user, ticket, status, due))).collect();
        for order in &orders {
            let (user, ticket, ..) = rows.get(&id(order)?).with_context(|| format!("{order} is lost"))?;
            ensure!(order["userId"] == json!(user) && order["ticket"]["id"] == json!(ticket), "{order} is another one");
        }
        for order in &cancelled {
            let (.., status, _) = &rows[order];
            ensure!(status == "cancelled", "{order} was cancelled with 204 and is {status}");
        }
        for order in &paid {
            let (.., status, refund_due) = &rows[order];
            let settled =
                matches!((status.as_str(), refund_due), ("complete", Some(false)) | ("cancelled", Some(true)));
            ensure!(settled, "{order} was paid: it is {status}, and the refund due for it: {refund_due:?}");
        }
        Ok(())
    }
}

impl Seen {
    fn is_enough(&self) -> Result<()> {
        let (tickets, orders) = (self.tickets.len(), self.orders.len());
        ensure!(tickets > 20 && orders > 5, "too few: {tickets} tickets, {orders} orders");
        Ok(())
    }

    /// Whether a client has seen this order.
    pub fn has_order(&self, id: &str) -> bool {
        self.orders.iter().any(|order| order["id"] == id)
    }

    /// Checks that every ticket and order that a client saw is stored, at that version or a newer one, and that each ticket was sold
    /// once. Payments are those of another service: they may be lost with their stream.
    pub async fn is_stored(&self, records: &Records) -> Result<()> {
        let Seen { tickets, orders, cancelled, .. } = self;
        let versions = async |db: &str, sql: &'static str| {
            let rows: Vec<(String, i64)> = sqlx::query_as(sql).fetch_all(&mut PgConnection::connect(db).await?).await?;
            anyhow::Ok(rows.into_iter().collect::<HashMap<_, _>>())
        };
        self.is_enough()?;
        let stored = versions(&records.tickets_db, "select id, version from tickets").await?;
        for ticket in tickets {
            ensure!(stored.get(&id(ticket)?).copied() >= ticket["version"].as_i64(), "{ticket} is lost");
        }
        let stored = versions(&records.orders_db, "select id, version from orders").await?;
        for order in orders {
            ensure!(stored.contains_key(&id(order)?), "{order} is lost");
        }
        for order in cancelled {
            ensure!(stored.get(order) == Some(&1), "{order} was cancelled");
        }
        Ok(())
    }
}
