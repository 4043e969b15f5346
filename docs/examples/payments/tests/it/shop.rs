//! Tickets, orders, payments and the provider, with the rights that each of them has in production.

use crate::provider::Provider;
use anyhow::{Context, Result, ensure};
use bootstrap::Running;
use clap::Parser;
use futures::FutureExt;
use futures::future::LocalBoxFuture;
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};
use stack::services::{ORDERS, Service, TICKETS};
use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;
use testkit::{Client, Nats, Postgres, Process, Signal, eventually_within};
use tokio::process::Command;

const BINARY: &str = env!("CARGO_BIN_EXE_payments");
const TOPOLOGY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/jetstream");
/// The lease of a task is this long, and 12 s.
const PROVIDER_TIMEOUT: &str = "1s";
const PATIENCE: Duration = Duration::from_mins(1);

pub struct Shop {
    pub payments: Process,
    port: u16,
    environment: Vec<(&'static str, String)>,
    pub provider: Provider,
    tickets: Client,
    orders: Client,
    /// Tickets and orders. They end when these are dropped.
    _pair: [Running; 2],
    pub nats: Nats,
    pub postgres: Postgres,
}

impl Shop {
    /// Boxed, because clients in the making are large, and this is part of every test's future.
    pub fn open() -> LocalBoxFuture<'static, Result<Self>> {
        Self::start().boxed_local()
    }

    async fn start() -> Result<Self> {
        let (postgres, nats) = tokio::try_join!(Postgres::start(), Nats::start())?;
        stack::prepare(&postgres, &nats).await?;
        let tickets = tickets::start(config(&TICKETS, &postgres, &nats)?).await?;
        let orders = orders::start(config(&ORDERS, &postgres, &nats)?).await?;
        prepare(&postgres, &nats).await?;
        let provider = Provider::start().await;
        let environment = vec![
            ("DATABASE_URL", postgres.url("payments", "payments")),
            ("NATS_URL", nats.url_of("payments")),
            ("JWT_KEY", testkit::JWT_KEY.to_owned()),
            ("PROVISION", "false".to_owned()),
            ("PROVIDER_URL", provider.url.clone()),
            ("PROVIDER_KEY", "secret".to_owned()),
            ("PROVIDER_TIMEOUT", PROVIDER_TIMEOUT.to_owned()),
        ];
        let port = testkit::free_port();
        let mut payments = Process::spawn_at(Path::new(BINARY), "payments", port, environment.clone(), |_| {})?;
        payments.wait_ready().await?;
        let client = |running: &Running| Client::new(&format!("http://{}", running.address)).signed_in("ann");
        let (tickets_client, orders_client) = (client(&tickets), client(&orders));
        let pair = [tickets, orders];
        let (tickets, orders) = (tickets_client, orders_client);
        Ok(Self { payments, port, environment, provider, tickets, orders, _pair: pair, nats, postgres })
    }

    /// `ann` at payments.
    pub fn client(&self) -> Client {
        self.payments.client().signed_in("ann")
    }

    /// A new order of ann's, known to payments.
    pub async fn order(&self) -> Result<String> {
        let ticket =
            self.tickets.post("/api/tickets", json!({"title": "Concert", "price": 20.5})).await?.expect(201)?;
        let order = self.orders.post("/api/orders", json!({"ticketId": ticket["id"]})).await?.expect(201)?;
        let id = testkit::id(&order).to_owned();
        let known = format!("select 1 from order_replica where id = '{id}'");
        eventually_within(PATIENCE, "payments to know the order", async || {
            ensure!(self.numbers(&known).await? == [1], "it does not");
            Ok(())
        })
        .await?;
        Ok(id)
    }

    pub async fn cancel(&self, order: &str) -> Result<()> {
        self.orders.delete(&format!("/api/orders/{order}")).await?.expect(204).map(drop)
    }

    /// A payment that was accepted: its id.
    pub async fn pay(&self, order: &str, card: &str) -> Result<String> {
        let answer =
            self.client().post("/api/payments", json!({"orderId": order, "token": card})).await?.expect(201)?;
        ensure!(answer["orderId"] == order && answer["status"] == "pending", "{answer}");
        Ok(testkit::id(&answer).to_owned())
    }

    /// The message of the refusal.
    pub async fn refused(&self, status: u16, body: Value) -> Result<Value> {
        let answer = self.client().post("/api/payments", body).await?.expect(status)?;
        Ok(answer["errors"][0]["message"].clone())
    }

    /// The status of a payment.
    pub async fn status(&self, payment: &str) -> Result<Value> {
        Ok(self.client().get(&format!("/api/payments/{payment}")).await?.expect(200)?["status"].clone())
    }

    pub async fn wait_for_status(&self, payment: &str, status: &str) -> Result<()> {
        let what = format!("{payment} to be {status}");
        let waiting = eventually_within(PATIENCE, &what, async || {
            let now = self.status(payment).await?;
            ensure!(now == status, "it is {now}");
            Ok(())
        });
        waiting.await.map(drop)
    }

    /// Waits until the provider has been asked to charge the order so often.
    pub async fn requested(&self, order: &str, times: usize) -> Result<()> {
        let requested = async || self.provider.requests(order) >= times;
        eventually_within(PATIENCE, "the provider to be asked", requested).await.map(drop)
    }

    pub async fn kill(&mut self) -> Result<()> {
        self.payments.signal(Signal::Kill).await?;
        self.payments.exited().await.map(drop)
    }

    pub async fn kill_and_restart(&mut self) -> Result<()> {
        self.kill().await?;
        self.restart().await
    }

    pub async fn restart(&mut self) -> Result<()> {
        let environment = self.environment.clone();
        self.payments = Process::spawn_at(Path::new(BINARY), "payments", self.port, environment, |_| {})?;
        self.payments.wait_ready().await
    }

    /// A connection to the database of payments, as the superuser.
    pub async fn db(&self) -> Result<PgConnection> {
        Ok(PgConnection::connect(&self.postgres.url("postgres", "payments")).await?)
    }

    pub async fn numbers(&self, sql: &str) -> Result<Vec<i32>> {
        Ok(sqlx::query_scalar(sqlx::AssertSqlSafe(sql.to_owned())).fetch_all(&mut self.db().await?).await?)
    }

    /// Waits until each of these orders was charged once, announced once and completed, and nothing else is left.
    pub async fn settled(&self, orders: &[String]) -> Result<()> {
        eventually_within(PATIENCE, "everything to be paid", async || {
            let left = self.numbers("select count(*)::int from bus.tasks").await?;
            ensure!(left == [0], "{left:?} tasks are left: {:?}", self.errors().await?);
            ensure!(self.numbers("select count(*)::int from bus.outbox").await? == [0], "events wait");
            for order in orders {
                let status = self.orders.get(&format!("/api/orders/{order}")).await?.expect(200)?["status"].clone();
                ensure!(status == "complete", "order {order} is {status}");
            }
            Ok(())
        })
        .await?;
        let (announced, books) = (self.announced().await?, self.provider.books());
        for order in orders {
            let charges: Vec<_> = books.charges.values().filter(|(charged, _, _)| charged == order).collect();
            ensure!(charges.len() == 1, "order {order} was charged {} times", charges.len());
            let (_, id, amount) = charges[0];
            ensure!(*amount == 20.5, "{amount} was charged for order {order}");
            let announced = announced.get(order).cloned().unwrap_or_default();
            ensure!(announced == [id.clone()], "charge {id} of order {order} was announced as {announced:?}");
        }
        let (charges, events) = (books.charges.len(), announced.values().flatten().count());
        ensure!(charges == events, "{charges} charges, {events} events");
        Ok(())
    }

    async fn errors(&self) -> Result<Vec<Option<String>>> {
        Ok(sqlx::query_scalar("select error from bus.tasks").fetch_all(&mut self.db().await?).await?)
    }

    /// The charges that the events of the stream announce, by order.
    pub async fn announced(&self) -> Result<HashMap<String, Vec<String>>> {
        let stream = async_nats::jetstream::new(self.nats.connect().await?).get_stream("PAYMENTS").await?;
        let mut orders = HashMap::<String, Vec<String>>::new();
        for seq in 1..=stream.cached_info().state.last_sequence {
            let body: Value = serde_json::from_slice(&stream.get_raw_message(seq).await?.payload)?;
            let text = |field: &str| body[field].as_str().map(str::to_owned).context("the event has this field");
            orders.entry(text("orderId")?).or_default().push(text("stripeId")?);
        }
        Ok(orders)
    }
}

/// The configuration of a service of the pair.
fn config<C: Parser>(service: &Service, postgres: &Postgres, nats: &Nats) -> Result<C> {
    let (database_url, nats_url) =
        (postgres.url(service.database_user, service.database), nats.url_of(service.nats_user));
    let environment = service.environment(database_url, nats_url).into_iter();
    let options = environment.map(|(name, value)| format!("--{}={value}", name.to_lowercase().replace('_', "-")));
    let arguments = ["service".to_owned(), "--http-addr=127.0.0.1:0".to_owned()].into_iter().chain(options);
    Ok(C::try_parse_from(arguments)?)
}

/// What `docs/a-service-of-your-own.md` does before the service starts.
async fn prepare(postgres: &Postgres, nats: &Nats) -> Result<()> {
    let mut db = PgConnection::connect(&postgres.url("postgres", "postgres")).await?;
    let roles: String = include_str!("../../roles.sql").lines().filter(|line| !line.starts_with("--")).collect();
    for statement in roles.split_terminator(';') {
        sqlx::raw_sql(sqlx::AssertSqlSafe(statement.to_owned()))
            .execute(&mut db)
            .await
            .context(statement.to_owned())?;
    }
    let database_url = postgres.url("payments_owner", "payments");
    command("migrate", &[("DATABASE_URL", &database_url), ("DATABASE_ROLE", "payments")]).await?;
    command("provision", &[("NATS_URL", &nats.url_of("provisioner")), ("TOPOLOGY", TOPOLOGY)]).await
}

async fn command(name: &str, environment: &[(&str, &str)]) -> Result<()> {
    let done = Command::new(BINARY).arg(name).envs(environment.iter().copied()).output().await?;
    ensure!(done.status.success(), "{name}: {}", String::from_utf8_lossy(&done.stdout));
    Ok(())
}
