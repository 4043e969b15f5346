//! The service under test.

use bootstrap::Running;
use clap::Parser;
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::ops::Deref;
use std::sync::Arc;
use testkit::{HttpService, Postgres, id};

/// A tickets service for one test, with its own database.
pub struct Tickets {
    pub service: HttpService<Running>,
}

pub async fn start() -> Tickets {
    start_with(&[]).await
}

/// A service with additional options.
pub async fn start_with(options: &[&str]) -> Tickets {
    Tickets { service: HttpService::start("tickets", options, launch).await }
}

/// A service that connects to its database at this URL.
pub async fn start_on(postgres: Arc<Postgres>, database_url: String) -> Tickets {
    Tickets { service: HttpService::start_on(postgres, database_url, "tickets", &[], launch).await }
}

async fn launch(arguments: Vec<String>) -> anyhow::Result<(Running, SocketAddr)> {
    let running = tickets::start(tickets::Config::parse_from(arguments)).await?;
    let address = running.address;
    Ok((running, address))
}

impl Tickets {
    /// Creates a ticket of ann.
    pub async fn ticket(&self) -> Value {
        self.ann.post("/api/tickets", json!({"title": "Concert", "price": 20})).await.unwrap().expect(201).unwrap()
    }

    /// The rows that a query returns, each as text.
    pub async fn texts(&self, sql: &str) -> Vec<String> {
        self.rows(sql).await.into_iter().map(|(text,)| text).collect()
    }

    /// Inserts tickets of ann directly into the table, with titles of `bytes` bytes. Returns their ids.
    pub async fn insert(&self, count: usize, bytes: usize) -> Vec<String> {
        let sql = format!(
            "insert into tickets (id, title, price, user_id, version)
             select substr(md5(random()::text), 1, 24), repeat('x', {bytes}), 20, 'ann', 0
             from generate_series(1, {count}) as n order by n returning id"
        );
        self.texts(&sql).await
    }

    /// Inserts a ticket with this id, as the previous release does. Returns the id.
    pub async fn insert_as(&self, id: &str) -> Vec<String> {
        let sql = "insert into tickets (id, title, price, user_id, version) values";
        self.texts(&format!("{sql} ('{id}', 'Concert', 20, 'ann', 0) returning id")).await
    }

    /// Changes the row of a ticket as if `order` had reserved it.
    pub async fn reserve(&self, ticket: &Value, order: &str) {
        self.sql(&format!("update tickets set order_id = '{order}' where id = '{}'", id(ticket))).await;
    }
}

impl Deref for Tickets {
    type Target = HttpService<Running>;

    fn deref(&self) -> &Self::Target {
        &self.service
    }
}

pub fn path(ticket: &Value) -> String {
    format!("/api/tickets/{}", id(ticket))
}

/// One entry of the error body of a validation.
pub fn invalid(message: &str, field: &str) -> Value {
    json!({"message": message, "field": field})
}
