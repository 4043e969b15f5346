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

/// Well-formed, and nobody's.
pub const UNKNOWN: &str = "ffffffffffffffffffffffff";

/// An orders service of one's own, on a database of its own.
pub struct Orders {
    service: HttpService<Running>,
}

pub async fn start() -> Orders {
    start_with(&[]).await
}

/// A service with more options than it needs.
pub async fn start_with(options: &[&str]) -> Orders {
    Orders { service: HttpService::start("orders", options, launch).await }
}

/// A service that reaches its database at this URL.
pub async fn start_on(postgres: Arc<Postgres>, database_url: String) -> Orders {
    Orders { service: HttpService::start_on(postgres, database_url, "orders", &[], launch).await }
}

async fn launch(arguments: Vec<String>) -> anyhow::Result<(Running, SocketAddr)> {
    let running = orders::start(orders::Config::parse_from(arguments)).await?;
    let address = running.address;
    Ok((running, address))
}

impl Orders {
    /// Has the service open all the connections it may have: a race on the first few is none.
    ///
    /// Hardly more than one at a time. To open them all at once takes longer than a request waits for its connection
    /// when this machine is busy, since each begins with thousands of hashes.
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

    /// The id of a ticket that has just arrived in the replica: `Concert` for 20.5, at version 3.
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

    /// Ann's new order of that ticket.
    pub async fn order(&self, ticket: &str) -> Value {
        order(&self.ann, ticket).await.expect(201).unwrap()
    }

    /// Ann's new order of a new ticket.
    pub async fn any_order(&self) -> Value {
        self.order(&self.ticket().await).await
    }

    /// Ann's orders, as they are now, of that number of new tickets.
    pub async fn any_orders<const N: usize>(&self) -> [Value; N] {
        let mut orders = Vec::new();
        for ticket in self.tickets::<N>().await {
            orders.push(self.order(&ticket).await);
        }
        orders.try_into().unwrap()
    }

    /// What Ann sees of her order now.
    pub async fn show(&self, order: &Value) -> Value {
        self.ann.get(&path(order)).await.unwrap().expect(200).unwrap()
    }

    /// All columns of an order, those included that nobody is shown.
    pub async fn everything(&self, order: &Value) -> String {
        let (row,): (String,) = self.row(&format!("select o::text from orders o where id = '{}'", id(order))).await;
        row
    }

    /// An order's row is changed as no request can.
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

/// A user tries to order a ticket.
pub async fn order(user: &Client, ticket: &str) -> Answer {
    user.post("/api/orders", json!({"ticketId": ticket})).await.unwrap()
}

/// The event that announces `order` as its user sees it.
pub fn event(subject: &str, order: &Value, reservation: i64) -> (String, i64, Value) {
    let mut body = order.clone();
    body["ticket"].as_object_mut().unwrap().remove("title");
    body["ticket"]["reservation"] = json!(reservation);
    (subject.to_owned(), order["version"].as_i64().unwrap(), body)
}

/// `order`, as it is after its last change.
pub fn cancelled(order: &Value) -> Value {
    let mut order = order.clone();
    order["status"] = json!("cancelled");
    order["version"] = json!(order["version"].as_i64().unwrap() + 1);
    order
}

pub fn path(order: &Value) -> String {
    format!("/api/orders/{}", id(order))
}
