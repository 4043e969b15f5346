//! Postgres restarts under load, for both services at once.

use crate::records::count;
use crate::system::System;
use anyhow::{Result, bail, ensure};
use serde_json::json;
use std::time::Duration;
use testkit::{Answer, eventually};
use tokio::time::Instant;

/// Creates tickets until `until`. Returns the confirmed ids; every other response must be a complete 503.
pub async fn create_until(system: &System, writer: usize, until: Instant) -> Result<(Vec<String>, usize)> {
    let (mut confirmed, mut refused) = (Vec::new(), 0);
    while Instant::now() < until {
        let Answer { status, headers, body } =
            system.seller(writer).post("/api/tickets", json!({"title": "Concert", "price": 5})).await?;
        match status {
            201 => confirmed.push(body["id"].as_str().unwrap_or_default().to_owned()),
            503 => {
                ensure!(headers.contains_key("retry-after"), "no Retry-After");
                ensure!(body["errors"][0]["message"].is_string(), "no error body: {body}");
                refused += 1;
            }
            _ => bail!("{status}: {body}"),
        }
    }
    Ok((confirmed, refused))
}

/// Waits until all services are ready and the system is at rest. Every confirmed ticket is stored then.
pub async fn recovers(system: &System, outcomes: &[(Vec<String>, usize)]) -> Result<()> {
    for service in system.tickets.iter().chain(&system.orders) {
        eventually("the service to recover", async || service.client().get("/readyz").await?.expect(200)).await?;
    }
    system.settled().await?;
    let stored = system.tickets_rows().await?;
    for id in outcomes.iter().flat_map(|(confirmed, _)| confirmed) {
        ensure!(stored.iter().any(|row| row.starts_with(id)), "ticket {id} was confirmed with 201 and is lost");
    }
    Ok(())
}

#[tokio::test]
async fn postgres_restarting_under_load_costs_503s_and_nothing_else() -> Result<()> {
    let system = System::start(2, 2).await?;
    let until = Instant::now() + Duration::from_secs(12);
    let restarts = async {
        for hard in [false, true] {
            tokio::time::sleep(Duration::from_secs(2)).await; // load before, between and after
            if hard {
                system.postgres.kill().await?;
                tokio::time::sleep(Duration::from_secs(1)).await;
                system.postgres.start_again().await?;
            } else {
                system.postgres.restart().await?;
            }
        }
        Ok(())
    };
    let writers = futures::future::try_join_all((0..16).map(|writer| create_until(&system, writer, until)));
    let (outcomes, ()) = futures::try_join!(writers, restarts)?;
    ensure!(outcomes.iter().any(|(_, refused)| *refused > 0), "no request failed: the restarts had no effect");

    recovers(&system, &outcomes).await?;
    eventually("no transaction to be left open", async || {
        let open = "select count(*) from pg_stat_activity where state like 'idle in transaction%'";
        ensure!(count(&system.tickets_db, open).await? == 0);
        anyhow::Ok(())
    })
    .await
}
