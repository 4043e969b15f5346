//! The rights in Postgres, by `infra/postgres/roles.sql` and the `grants.sql` of the services, tested on the server.

use anyhow::{Context, Result, ensure};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
use std::path::Path;
use testkit::{JWT_KEY, Postgres, Process, eventually, free_port};

/// The state "insufficient privilege".
const REFUSAL: &str = "42501";

const REFUSED: [(&str, &str); 31] = [
    // definitions
    ("tickets", "create table mine ()"),
    ("tickets", "create table bus.mine ()"),
    ("tickets", "create temporary table mine ()"),
    ("tickets", "create schema mine"),
    ("tickets", "create function mine() returns int language sql as 'select 1'"),
    ("tickets", "alter table tickets add column mine text"),
    ("tickets", "alter table tickets disable trigger all"),
    ("tickets", "drop table tickets"),
    ("tickets", "drop index tickets_unreserved"),
    ("tickets", "drop schema bus cascade"),
    ("tickets", "create role mine"),
    ("tickets", "create database mine"),
    ("tickets", "set role tickets_owner"),
    ("tickets", "copy tickets to '/tmp/tickets'"),
    ("tickets", "copy tickets to program 'id'"),
    // data
    ("tickets", "truncate tickets"),
    ("tickets", "truncate bus.outbox"),
    ("tickets", "delete from tickets"),
    ("tickets", "delete from bus.relay"),
    ("tickets", "delete from bus.dead_letters"),
    ("tickets", "update bus.outbox set payload = ''"),
    ("tickets", "update bus.relay set stream = 'ORDERS'"),
    ("tickets", "update _sqlx_migrations set checksum = ''"),
    ("tickets", "insert into bus._migrations select * from bus._migrations"),
    ("orders", "truncate orders"),
    ("orders", "delete from orders"),
    ("orders", "delete from payments"),
    ("orders", "update payments set stripe_id = 'mine'"),
    ("orders", "drop index one_live_order_per_ticket"),
    ("orders", "alter table orders drop constraint orders_status_check"),
    ("orders", "create table mine ()"),
];

async fn migrated() -> Result<Postgres> {
    let postgres = Postgres::start().await?;
    stack::migrate(&postgres).await?;
    Ok(postgres)
}

/// Starts tickets with its own role.
fn spawn_tickets(postgres: &Postgres) -> Result<Process> {
    let env = [
        ("DATABASE_URL", postgres.url("tickets", "tickets")),
        ("NATS_URL", format!("127.0.0.1:{}", free_port())),
        ("JWT_KEY", JWT_KEY.to_owned()),
    ];
    Process::spawn(Path::new(env!("CARGO_BIN_EXE_stack")), "tickets", env)
}

/// The SQLSTATE of an error.
fn state(error: &sqlx::Error) -> Option<String> {
    Some(error.as_database_error()?.code()?.into_owned())
}

#[tokio::test]
async fn a_service_has_only_the_rights_it_needs() -> Result<()> {
    let postgres = migrated().await?;
    let mut surprises = Vec::new();
    for (role, sql) in REFUSED {
        let mut db = PgConnection::connect(&postgres.url(role, role)).await?;
        let outcome = db.execute(AssertSqlSafe(sql)).await;
        if outcome.as_ref().err().and_then(state).as_deref() != Some(REFUSAL) {
            surprises.push(format!("{role}: {sql}: {outcome:?}"));
        }
    }
    // It has access to its tables; without it, the refusals above would prove nothing.
    for (role, sql) in [("tickets", "select from tickets, bus.outbox"), ("orders", "select from orders, payments")] {
        let mut db = PgConnection::connect(&postgres.url(role, role)).await?;
        db.execute(sql).await.context(sql)?;
    }
    ensure!(surprises.is_empty(), "{surprises:#?}");
    Ok(())
}

#[tokio::test]
async fn a_role_cannot_connect_to_the_database_of_another_service() -> Result<()> {
    let postgres = migrated().await?;
    for (role, database) in
        [("tickets", "orders"), ("tickets_owner", "orders"), ("orders", "tickets"), ("orders_owner", "tickets")]
    {
        let refused = PgConnection::connect(&postgres.url(role, database)).await.err();
        let refused = refused.with_context(|| format!("{role} gets into {database}"))?;
        ensure!(state(&refused).as_deref() == Some(REFUSAL), "{role}, {database}: {refused}");
    }
    Ok(())
}

#[tokio::test]
async fn sessions_of_a_service_have_time_limits() -> Result<()> {
    let postgres = Postgres::start().await?;
    for role in ["tickets", "orders"] {
        let mut db = PgConnection::connect(&postgres.url(role, role)).await?;
        for (setting, expected) in
            [("statement_timeout", "8s"), ("lock_timeout", "5s"), ("idle_in_transaction_session_timeout", "10s")]
        {
            let shown: String = sqlx::query_scalar(AssertSqlSafe(format!("show {setting}"))).fetch_one(&mut db).await?;
            ensure!(shown == expected, "{role}: {setting} is {shown}");
        }
    }
    Ok(())
}

/// The service has no right to migrate, and waits for the owner.
#[tokio::test]
async fn a_service_started_before_its_migration_reports_it_and_waits() -> Result<()> {
    let postgres = Postgres::start().await?;
    let mut tickets = spawn_tickets(&postgres)?;
    eventually("the advice", async || tickets.logs().contains("run the service's command `migrate` as its owner"))
        .await?;
    tickets.client().get("/healthz").await?.expect(200)?;
    tickets.client().get("/readyz").await?.expect(503)?;
    stack::migrate(&postgres).await?;
    tickets.wait_ready().await
}

/// During a migration the tables may exist before the grants.
#[tokio::test]
async fn a_service_is_not_ready_during_a_migration() -> Result<()> {
    let postgres = migrated().await?;
    let mut owner = PgConnection::connect(&postgres.url("tickets_owner", "tickets")).await?;
    owner.execute("select pg_advisory_lock(hashtext('migrate'))").await?;
    let mut tickets = spawn_tickets(&postgres)?;
    eventually("the reason", async || tickets.logs().contains("another process is migrating the database")).await?;
    tickets.client().get("/readyz").await?.expect(503)?;
    drop(owner);
    tickets.wait_ready().await
}

/// A release may need fewer rights than the previous one.
#[tokio::test]
async fn a_migration_revokes_rights_that_are_no_longer_granted() -> Result<()> {
    let postgres = migrated().await?;
    let mut owner = PgConnection::connect(&postgres.url("tickets_owner", "tickets")).await?;
    owner.execute("grant delete on tickets to tickets; grant update (id) on tickets to tickets").await?;
    stack::migrate(&postgres).await?;
    let mut db = PgConnection::connect(&postgres.url("tickets", "tickets")).await?;
    for sql in ["delete from tickets", "update bus.relay set stream = 'ORDERS'"] {
        ensure!(db.execute(sql).await.err().as_ref().and_then(state).as_deref() == Some(REFUSAL), "{sql}");
    }
    db.execute("select from tickets").await?;
    Ok(())
}

/// As if the image of another service were started as orders.
#[tokio::test]
async fn a_database_of_another_service_is_neither_migrated_nor_used() -> Result<()> {
    let postgres = migrated().await?;
    let url = postgres.url("tickets_owner", "tickets");
    let reason = "the database holds the tables of the service tickets, and this is orders";
    let migrate = tokio::process::Command::new(env!("CARGO_BIN_EXE_stack"))
        .args(["orders", "migrate", "--patience", "1s", "--database-url", &url])
        .output()
        .await?;
    let printed = String::from_utf8_lossy(&migrate.stdout);
    ensure!(!migrate.status.success() && printed.contains(reason), "{printed}");

    let env = [("DATABASE_URL", url.as_str()), ("NATS_URL", "127.0.0.1:1"), ("JWT_KEY", JWT_KEY)];
    let orders = Process::spawn_at(Path::new(env!("CARGO_BIN_EXE_stack")), "orders", free_port(), env, |_| {})?;
    eventually("the reason", async || orders.logs().contains(reason)).await?;
    orders.client().get("/readyz").await?.expect(503)?;
    let mut db = PgConnection::connect(&url).await?;
    let tables = "select count(*) from pg_tables where tablename in ('orders', 'ticket_replica', 'payments')";
    let theirs: i64 = sqlx::query_scalar(tables).fetch_one(&mut db).await?;
    ensure!(theirs == 0, "orders has made {theirs} of its tables");
    Ok(())
}
