//! Both services with replicas, their servers, and their records. Its invariants: see `settled`.

pub use crate::records::id;
use crate::records::{PLACES, Records};
use anyhow::{Result, ensure};
use futures::{StreamExt, TryStreamExt, stream};
use serde_json::{Value, json};
use stack::services::{ORDERS, Service, TICKETS};
use std::ops::Deref;
use std::path::Path;
use testkit::{Client, Nats, Postgres, Process, free_port, nats_url};

pub struct System {
    pub postgres: Postgres,
    pub nats: Nats,
    /// Used through the system: `system.stream()`.
    pub records: Records,
    pub tickets: Vec<Process>,
    pub orders: Vec<Process>,
    /// The servers of NATS for tickets (`host:port`, comma-separated).
    pub tickets_nats: String,
    /// The servers of NATS for orders.
    pub orders_nats: String,
    /// The NATS user of the services, instead of their own.
    pub nats_user: Option<&'static str>,
    pub order_ttl: &'static str,
}

impl System {
    /// Starts this many replicas of each service, and waits until they are ready.
    pub async fn start(tickets: usize, orders: usize) -> Result<Self> {
        Self::start_with(tickets, orders, "15m").await
    }

    /// Does the same, with orders that expire after `order_ttl`.
    pub async fn start_with(tickets: usize, orders: usize, order_ttl: &'static str) -> Result<Self> {
        let mut system = Self { order_ttl, ..Self::prepared().await? };
        system.add(tickets, orders).await?;
        Ok(system)
    }

    /// Starts the servers with databases and streams, without services.
    pub async fn prepared() -> Result<Self> {
        let (postgres, nats) = tokio::try_join!(Postgres::start(), Nats::start())?;
        stack::prepare(&postgres, &nats).await?;
        let servers = nats.server();
        Ok(Self::new(postgres, nats, &servers))
    }

    /// A system without services, with NATS at `servers` (`host:port`, comma-separated).
    pub fn new(postgres: Postgres, nats: Nats, servers: &str) -> Self {
        let records = Records {
            nats_url: nats_url("admin", servers),
            tickets_db: postgres.url("postgres", TICKETS.database),
            orders_db: postgres.url("postgres", ORDERS.database),
        };
        Self {
            postgres,
            nats,
            records,
            tickets: Vec::new(),
            orders: Vec::new(),
            tickets_nats: servers.to_owned(),
            orders_nats: servers.to_owned(),
            nats_user: None,
            order_ttl: "15m",
        }
    }

    /// Adds this many replicas of each service, and waits until they are ready.
    pub async fn add(&mut self, tickets: usize, orders: usize) -> Result<()> {
        for _ in 0..tickets {
            self.tickets.push(self.spawn_tickets()?);
        }
        for _ in 0..orders {
            self.orders.push(self.spawn_orders()?);
        }
        for service in self.tickets.iter_mut().chain(&mut self.orders) {
            service.wait_ready().await?;
        }
        // Readiness does not include NATS.
        for (stream, service) in PLACES {
            testkit::eventually("streams and consumers", async || self.place(stream, service).await).await?;
        }
        Ok(())
    }

    /// Starts another replica of tickets.
    pub fn spawn_tickets(&self) -> Result<Process> {
        self.spawn_at(&TICKETS, free_port())
    }

    /// Starts another replica of orders.
    pub fn spawn_orders(&self) -> Result<Process> {
        self.spawn_at(&ORDERS, free_port())
    }

    /// Starts the replica that listened on `port` again.
    pub fn respawn(&self, port: u16) -> Result<Process> {
        let is_tickets = self.tickets.iter().any(|process| process.port() == port);
        self.spawn_at(if is_tickets { &TICKETS } else { &ORDERS }, port)
    }

    /// Starts a service as every deployment does, with only the rights it needs.
    fn spawn_at(&self, service: &Service, port: u16) -> Result<Process> {
        let servers = if service.name == TICKETS.name { &self.tickets_nats } else { &self.orders_nats };
        let database_url = self.postgres.url(service.database_user, service.database);
        let mut env = service.environment(database_url, nats_url(self.nats_user.unwrap_or(service.nats_user), servers));
        env.extend([
            ("PROVISION", self.nats_user.is_some().to_string()),
            ("ORDER_TTL", self.order_ttl.to_owned()),
            // Many services run on this machine, and each connection takes time at the start.
            ("DATABASE_CONNECTIONS", "6".to_owned()),
            ("RUST_LOG", "info,event_bus=debug".to_owned()),
        ]);
        Process::spawn_at(Path::new(env!("CARGO_BIN_EXE_stack")), service.name, port, env, |_| {})
    }

    /// A client of the seller, at one of the replicas of tickets.
    pub fn seller(&self, replica: usize) -> Client {
        self.tickets[replica % self.tickets.len()].client().signed_in("seller")
    }

    /// A client of a user, at one of the replicas of orders.
    pub fn buyer(&self, replica: usize, user: &str) -> Client {
        self.orders[replica % self.orders.len()].client().signed_in(user)
    }

    /// Creates a ticket of the seller.
    pub async fn ticket(&self) -> Result<String> {
        id(&self.seller(0).post("/api/tickets", json!({"title": "Concert", "price": 20})).await?.expect(201)?)
    }

    /// Creates this many tickets, and waits until they are in the replica. Their order is arbitrary.
    pub async fn tickets(&self, count: usize) -> Result<Vec<String>> {
        let tickets = stream::iter(0..count).map(|_| self.ticket()).buffer_unordered(8).try_collect().await?;
        testkit::eventually("orders to know all tickets", async || {
            ensure!(self.replica_rows().await?.len() == self.tickets_rows().await?.len());
            anyhow::Ok(())
        })
        .await?;
        Ok(tickets)
    }

    /// Orders this ticket as this user, at one of the replicas of orders.
    pub async fn order(&self, replica: usize, user: &str, ticket: &str) -> Result<String> {
        id(&self.buyer(replica, user).post("/api/orders", json!({"ticketId": ticket})).await?.expect(201)?)
    }

    /// The ticket as every user sees it.
    pub async fn see(&self, ticket: &str) -> Result<Value> {
        self.seller(0).get(&format!("/api/tickets/{ticket}")).await?.expect(200)
    }
}

impl Deref for System {
    type Target = Records;

    fn deref(&self) -> &Records {
        &self.records
    }
}
