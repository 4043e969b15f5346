//! The service under test.

use bootstrap::Running;
use clap::Parser;
use contracts::Id;
use futures::future::join_all;
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::ops::Deref;
use std::sync::Arc;
use testkit::{Answer, Client, HttpService, Postgres, eventually, id};

/// A well-formed id that does not exist.
pub const UNKNOWN: &str = "ffffffffffffffffffffffff";

/// An orders service for one test, with its own database.
pub struct Orders {
    service: HttpService<Running>,
}

pub async fn start() -> Orders {
    start_with(&[]).await
}

/// A service with additional options.
pub async fn start_with(options: &[&str]) -> Orders {
    Orders { service: HttpService::start("orders", options, launch).await }
}

/// A service that connects to its database at this URL.
pub async fn start_on(postgres: Arc<Postgres>, database_url: String) -> Orders {
    Orders { service: HttpService::start_on(postgres, database_url, "orders", &[], launch).await }
}

async fn launch(arguments: Vec<String>) -> anyhow::Result<(Running, SocketAddr)> {
    let running = orders::start(orders::Config::parse_from(arguments)).await?;
    let address = running.address;
    Ok((running, address))
}

impl Orders {
    /// Makes the service open all its connections, so that later requests run concurrently.
    ///
    /// Opens them gradually. On a busy machine, opening all at once takes longer than a request waits for its connection,
    /// because each computes thousands of hashes.
    pub async fn warm_up(&self) {
        for at_once in 1..=32 {
            let answered = eventually("a connection for each request", async || {
                for answer in join_all((0..at_once).map(|_| self.ann.get("/api/orders"))).await {
                    answer?.expect(200)?;
                }
                anyhow::Ok(())
            });
            answered.await.unwrap();
        }
    }

    /// Inserts a ticket into the replica and returns its id: `Concert` for 20.5, at version 3.
    pub async fn ticket(&self) -> String {
        let [id] = self.tickets().await;
        id
    }

    pub async fn tickets<const N: usize>(&self) -> [String; N] {
        let ids = [(); N].map(|()| Id::generate().to_string());
        let rows: Vec<_> = ids.iter().map(|id| format!("('{id}', 'Concert', 20.5, 'carl', 3)")).collect();
        self.sql(&format!(
            "insert into ticket_replica (id, title, price, user_id, version) values {}",
            rows.join(", ")
        ))
        .await;
        ids
    }

    /// Creates an order of ann for that ticket.
    pub async fn order(&self, ticket: &str) -> Value {
        order(&self.ann, ticket).await.expect(201).unwrap()
    }

    /// Creates an order of ann for a new ticket.
    pub async fn any_order(&self) -> Value {
        self.order(&self.ticket().await).await
    }

    /// Creates orders of ann for `N` new tickets.
    pub async fn any_orders<const N: usize>(&self) -> [Value; N] {
        let mut orders = Vec::new();
        for ticket in self.tickets::<N>().await {
            orders.push(self.order(&ticket).await);
        }
        orders.try_into().unwrap()
    }

    /// The order as ann sees it now.
    pub async fn show(&self, order: &Value) -> Value {
        self.ann.get(&path(order)).await.unwrap().expect(200).unwrap()
    }

    /// All columns of an order, including those that no response has.
    pub async fn everything(&self, order: &Value) -> String {
        let (row,): (String,) = self.row(&format!("select o::text from orders o where id = '{}'", id(order))).await;
        row
    }

    /// Changes the row of an order as no request can.
    pub async fn set_status(&self, order: &Value, status: &str) {
        self.sql(&format!("update orders set status = '{status}' where id = '{}'", id(order))).await;
    }
}

impl Deref for Orders {
    type Target = HttpService<Running>;

    fn deref(&self) -> &Self::Target {
        &self.service
    }
}

/// Requests an order of a ticket.
pub async fn order(user: &Client, ticket: &str) -> Answer {
    user.post("/api/orders", json!({"ticketId": ticket})).await.unwrap()
}

/// The event of `order` as its user sees it.
pub fn event(subject: &str, order: &Value, reservation: i64) -> (String, i64, Value) {
    let mut body = order.clone();
    body["ticket"].as_object_mut().unwrap().remove("title");
    body["ticket"]["reservation"] = json!(reservation);
    (subject.to_owned(), order["version"].as_i64().unwrap(), body)
}

/// `order` after it was cancelled.
pub fn cancelled(order: &Value) -> Value {
    let mut order = order.clone();
    order["status"] = json!("cancelled");
    order["version"] = json!(order["version"].as_i64().unwrap() + 1);
    order
}

pub fn path(order: &Value) -> String {
    format!("/api/orders/{}", id(order))
}
