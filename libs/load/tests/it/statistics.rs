//! The statistics of Postgres about the statements of the services.

use anyhow::{Result, ensure};
use load::records::{Records, USER, number};
use load::routes::id;
use load::system::System;
use serde_json::json;
use sqlx::{Connection, Executor, PgConnection};
use stack::services::{ORDERS, Service, TICKETS};
use std::ops::Range;
use std::path::Path;
use testkit::Client;

/// A system with tickets, and the statistics of its Postgres.
pub struct Measured {
    pub system: System,
    pub records: Records,
    statistics: PgConnection,
}

/// What the statements of requests did since the last reset.
#[derive(Debug)]
pub struct Statements {
    pub calls: i64,
    /// Pages that were read, from memory or not.
    pub buffers: i64,
    /// The calls of each text.
    texts: Vec<(i64, String)>,
}

/// A kind of request about the ticket with a number.
#[derive(Clone, Copy, Debug)]
pub enum Request {
    Post,
    Put,
    Get,
    List,
    Order,
}

impl Request {
    fn service(self) -> &'static Service {
        if matches!(self, Self::Order) { &ORDERS } else { &TICKETS }
    }

    async fn send(self, client: &Client, number: u64) -> Result<()> {
        let body = json!({"title": "Concert", "price": 20.5});
        let path = format!("/api/tickets/{}", id(number));
        let (answer, expected) = match self {
            Self::Post => (client.post("/api/tickets", body).await?, 201),
            Self::Put => (client.put(&path, body).await?, 200),
            Self::Get => (client.get(&path).await?, 200),
            Self::List => (client.get("/api/tickets?limit=50").await?, 200),
            Self::Order => (client.post("/api/orders", json!({"ticketId": id(number)})).await?, 201),
        };
        answer.expect(expected).map(drop)
    }
}

impl Measured {
    /// Starts a system with this many tickets.
    pub async fn start(tickets: u64) -> Result<Self> {
        let system = System::start(Path::new(env!("CARGO_BIN_EXE_load"))).await?;
        let (tickets_url, orders_url) = (system.superuser_url(&TICKETS), system.superuser_url(&ORDERS));
        let mut records = Records::open(&tickets_url, &orders_url, &system.nats.monitoring_url()).await?;
        records.fill(tickets).await?;
        records.vacuum().await?;
        let mut statistics = PgConnection::connect(&system.url("postgres", "postgres")).await?;
        statistics.execute("create extension pg_stat_statements").await?;
        Ok(Self { system, records, statistics })
    }

    /// Sends requests one after another, and returns the statements of `service` for them.
    ///
    /// The statements of relays and subscriptions are left out: how many they need depends on how events meet in batches.
    pub async fn statements(&mut self, request: Request, numbers: Range<u64>) -> Result<Statements> {
        let service = request.service();
        let replicas = if service.name == TICKETS.name { &self.system.tickets } else { &self.system.orders };
        let client = replicas[0].client().signed_in(USER);
        // It opens the connection and prepares the statements.
        request.send(&client, numbers.end).await?;
        self.records.drained().await?;
        self.statistics.execute("select pg_stat_statements_reset()").await?;
        for number in numbers {
            request.send(&client, number).await?;
        }
        self.records.drained().await?;
        self.of_requests(service).await
    }

    async fn of_requests(&mut self, service: &Service) -> Result<Statements> {
        let sql = "select query, calls, shared_blks_hit + shared_blks_read
                   from pg_stat_statements
                   join pg_database on pg_database.oid = dbid join pg_roles on pg_roles.oid = userid
                   where datname = $1 and rolname = $2";
        let rows = sqlx::query_as(sql).bind(service.database).bind(service.database_user);
        let rows: Vec<(String, i64, i64)> = rows.fetch_all(&mut self.statistics).await?;
        let rows: Vec<_> = rows.into_iter().filter(|(text, ..)| is_of_a_request(text)).collect();
        Ok(Statements {
            calls: rows.iter().map(|(_, calls, _)| calls).sum(),
            buffers: rows.iter().map(|(.., buffers)| buffers).sum(),
            texts: rows.into_iter().map(|(text, calls, _)| (calls, text)).collect(),
        })
    }

    /// The events that both services have published so far.
    pub async fn published(&mut self) -> Result<i64> {
        let sql =
            "select sum(last)::bigint from (select max(last_seq) as last from bus.position group by stream) as streams";
        Ok(number(&mut self.records.tickets, sql).await? + number(&mut self.records.orders, sql).await?)
    }
}

/// Whether a statement is neither one of the background nor the begin or the end of one of its transactions.
fn is_of_a_request(text: &str) -> bool {
    const TRANSACTION: [&str; 5] = ["begin", "commit", "rollback", "set local ", "select current_setting"];
    // Those of the relay and of subscriptions; then those of orders that look for expired orders.
    const BACKGROUND: [&str; 17] = [
        "bus.take_events",
        "bus.move_on",
        "from pg_locks",
        "bus.outbox",
        "bus.supersede",
        "bus.dead_letters",
        "bus.read_positions",
        "bus.relay",
        "bus.republish",
        "bus.recovery",
        "bus.require_recovered",
        "bus.fills",
        "bus.checkpoint",
        "insert into ticket_replica",
        "order by id for update",
        "for update skip locked",
        "least(min(expires_at)",
    ];
    let text = text.to_lowercase();
    !TRANSACTION.iter().any(|start| text.starts_with(start)) && !BACKGROUND.iter().any(|part| text.contains(part))
}

impl Statements {
    /// Fails unless there were `expected` statements for each of `requests`.
    pub fn are(&self, requests: u64, expected: u64) -> Result<()> {
        let calls = u64::try_from(self.calls)?;
        ensure!(calls == requests * expected, "{calls} statements for {requests} requests: {:#?}", self.texts);
        Ok(())
    }
}
