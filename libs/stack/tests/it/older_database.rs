//! A database that was restored from a backup is older than the events it has published.

use crate::system::System;
use anyhow::{Context, Result, ensure};
use serde_json::json;
use std::time::Duration;
use testkit::{eventually, eventually_within};
use tokio::process::Command;

/// Runs a shell command in the container of Postgres.
async fn in_postgres(system: &System, command: &str) -> Result<()> {
    let output = Command::new("docker").args(["exec", system.postgres.id(), "sh", "-c", command]).output().await?;
    ensure!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

async fn is_reported(system: &System, within: Duration) -> Result<()> {
    eventually_within(within, "the error", async || {
        let log = system.tickets[0].logs();
        let error = log.lines().find(|line| line.contains("the database lost history"));
        let error = error.with_context(|| format!("nothing of it in:\n{log}"))?;
        ensure!(error.contains("ERROR") && error.contains("TICKETS"), "{error}");
        anyhow::Ok(())
    })
    .await
}

async fn replica_is_sold_at(system: &System, price: &str) -> Result<()> {
    eventually(&format!("the replica at {price}"), async || {
        let rows = system.replica_rows().await?;
        ensure!(rows.len() == 1 && rows[0].contains(&format!("|{price}|")), "{rows:?}");
        anyhow::Ok(())
    })
    .await
}

#[tokio::test]
async fn restored_older_database_is_reported_and_publishes_nothing() -> Result<()> {
    let system = System::start(1, 1).await?;
    let seller = system.seller(0);
    let path = format!("/api/tickets/{}", system.ticket().await?); // at 20
    replica_is_sold_at(&system, "20.0000").await?;
    system.settled().await?;
    in_postgres(&system, "pg_dump -U postgres --clean --if-exists tickets > /tmp/backup.sql").await?;
    seller.put(&path, json!({"title": "Concert", "price": 30})).await?.expect(200)?;
    replica_is_sold_at(&system, "30.0000").await?;
    let published = system.stream().await?;

    in_postgres(&system, "psql -U postgres --quiet --set ON_ERROR_STOP=1 tickets < /tmp/backup.sql").await?;
    is_reported(&system, Duration::from_secs(50)).await?;

    // This is the second event with version 1.
    let edited =
        eventually("an edit", async || seller.put(&path, json!({"title": "Concert", "price": 40})).await?.expect(200));
    ensure!(edited.await?["version"] == 1);
    tokio::time::sleep(Duration::from_secs(3)).await; // time for a wrong publish
    ensure!(system.stream().await? == published, "something was published");
    replica_is_sold_at(&system, "30.0000").await
}
