//! The service under test.

use clap::Parser;
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use std::sync::Arc;
use testkit::{Client, JWT_KEY, Postgres, eventually, free_port};

/// A tickets service of one's own, on a database of its own.
pub struct Tickets {
    pub database_url: String,
    pub base: String,
    /// Not signed in.
    pub anonymous: Client,
    pub ann: Client,
    pub bob: Client,
    pub running: bootstrap::Running,
    _postgres: Arc<Postgres>,
}

pub async fn start() -> Tickets {
    let postgres = Postgres::shared().await.unwrap();
    let database_url = postgres.database("tickets").await.unwrap();
    start_on(postgres, database_url).await
}

/// A service that reaches its database at this URL.
pub async fn start_on(postgres: Arc<Postgres>, database_url: String) -> Tickets {
    start_with(postgres, database_url, &[]).await
}

/// The same, with more options than it needs.
pub async fn start_with(postgres: Arc<Postgres>, database_url: String, options: &[&str]) -> Tickets {
    let nobody = format!("nats://127.0.0.1:{}", free_port());
    let fixed = [
        "tickets",
        "--database-url",
        &database_url,
        "--nats-url",
        &nobody,
        "--jwt-key",
        JWT_KEY,
        "--http-addr",
        "127.0.0.1:0",
    ];
    let config = tickets::Config::parse_from(fixed.iter().chain(options));
    let running = tickets::start(config).await.unwrap();
    let base = format!("http://{}", running.address);
    let anonymous = Client::new(&base);
    eventually("tickets to be ready", async || anonymous.get("/readyz").await?.expect(200)).await.unwrap();
    let (ann, bob) = (anonymous.signed_in("ann"), anonymous.signed_in("bob"));
    Tickets { database_url, base, anonymous, ann, bob, running, _postgres: postgres }
}

impl Tickets {
    /// Ann's new ticket.
    pub async fn ticket(&self) -> Value {
        self.ann.post("/api/tickets", json!({"title": "Concert", "price": 20})).await.unwrap().expect(201).unwrap()
    }

    /// Runs a statement behind the service's back.
    pub async fn sql(&self, sql: &str) {
        let mut db = PgConnection::connect(&self.database_url).await.unwrap();
        sqlx::query(AssertSqlSafe(sql.to_owned())).execute(&mut db).await.unwrap();
    }

    /// What a statement behind the service's back returns, a text for each row.
    pub async fn texts(&self, sql: &str) -> Vec<String> {
        let mut db = PgConnection::connect(&self.database_url).await.unwrap();
        sqlx::query_scalar(AssertSqlSafe(sql.to_owned())).fetch_all(&mut db).await.unwrap()
    }

    /// This many new tickets of Ann's, with titles of this many bytes, behind the service's back. Returns their ids.
    pub async fn insert(&self, count: usize, bytes: usize) -> Vec<String> {
        let sql = format!(
            "insert into tickets (id, title, price, user_id, version)
             select substr(md5(random()::text), 1, 24), repeat('x', {bytes}), 20, 'ann', 0
             from generate_series(1, {count}) as n order by n returning id"
        );
        self.texts(&sql).await
    }

    /// A new ticket with this id, as the release before inserts it. Returns the id.
    pub async fn insert_as(&self, id: &str) -> Vec<String> {
        let sql = "insert into tickets (id, title, price, user_id, version) values";
        self.texts(&format!("{sql} ('{id}', 'Concert', 20, 'ann', 0) returning id")).await
    }

    /// A ticket's row is changed as if `order` had reserved it.
    pub async fn reserve(&self, ticket: &Value, order: &str) {
        self.sql(&format!("update tickets set order_id = '{order}' where id = '{}'", id(ticket))).await;
    }

    /// Subject, version and body of every event that was appended, in order.
    pub async fn events(&self) -> Vec<(String, i64, Value)> {
        let mut db = PgConnection::connect(&self.database_url).await.unwrap();
        let sql = "select subject, version, payload from bus.outbox order by id";
        let rows: Vec<(String, i64, String)> = sqlx::query_as(sql).fetch_all(&mut db).await.unwrap();
        rows.into_iter()
            .map(|(subject, version, body)| (subject, version, serde_json::from_str(&body).unwrap()))
            .collect()
    }
}

pub fn id(ticket: &Value) -> &str {
    ticket["id"].as_str().unwrap()
}

pub fn path(ticket: &Value) -> String {
    format!("/api/tickets/{}", id(ticket))
}

/// The error body with one message.
pub fn error(message: &str) -> Value {
    json!({"errors": [{"message": message}]})
}

/// One entry of the error body of a validation.
pub fn invalid(message: &str, field: &str) -> Value {
    json!({"message": message, "field": field})
}
