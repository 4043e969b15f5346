//! The options of NATS: encrypted connections, and an encrypted store.

use crate::authority::Authority;
use anyhow::{Context, Result, ensure};
use serde_json::json;
use stack::services::{ORDERS, Service, TICKETS};
use std::path::Path;
use testkit::{Nats, NatsSetup, Postgres, Process, eventually};
use tokio::process::Command;

/// Starts a server with a certificate of this authority.
async fn server_of(authority: &Authority) -> Result<Nats> {
    let certificates = Some((authority.certificate.clone(), authority.key.clone(), authority.file.clone()));
    Nats::start_with(NatsSetup { configuration: Some("tls.conf"), certificates, ..NatsSetup::default() }).await
}

/// A task of the binary of the services.
fn task(name: &str, service: &str, nats_url: &str, authority: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_stack"));
    command.args([service, name]).envs([("NATS_URL", nats_url), ("PATIENCE", "5s")]).env("NATS_CA", authority);
    command
}

#[tokio::test]
async fn services_and_provisioning_use_only_encrypted_connections() -> Result<()> {
    let (authority, stranger) = (Authority::new()?, Authority::new()?);
    let (postgres, nats) = tokio::try_join!(Postgres::start(), server_of(&authority))?;
    stack::migrate(&postgres).await?;
    let provisioner = nats.url_of("provisioner");
    for (wrong, why) in [(Path::new(""), "without encryption"), (&stranger.file, "with another authority")] {
        let output = task("provision", "tickets", &provisioner, wrong).output().await?;
        ensure!(output.status.code() == Some(1), "provisioned {why}: {output:?}");
    }
    let output = task("provision", "tickets", &provisioner, &authority.file).output().await?;
    ensure!(output.status.success(), "{output:?}");

    let spawn = |service: &Service| {
        let database_url = postgres.url(service.database_user, service.database);
        let mut env = service.environment(database_url, nats.url_of(service.nats_user));
        env.push(("NATS_CA", authority.file.display().to_string()));
        Process::spawn(Path::new(env!("CARGO_BIN_EXE_stack")), service.name, env)
    };
    let (mut tickets, mut orders) = (spawn(&TICKETS)?, spawn(&ORDERS)?);
    tokio::try_join!(tickets.wait_ready(), orders.wait_ready())?;
    let body = json!({"title": "Concert", "price": 20});
    let ticket = tickets.client().signed_in("ann").post("/api/tickets", body).await?.expect(201)?;
    let order = json!({"ticketId": ticket["id"]});
    eventually("the order", async || {
        orders.client().signed_in("bob").post("/api/orders", order.clone()).await?.expect(201)
    })
    .await?;
    let path = format!("/api/tickets/{}", ticket["id"].as_str().context("no id")?);
    eventually("the ticket to be held", async || {
        ensure!(tickets.client().get(&path).await?.expect(200)?["orderId"].is_string());
        anyhow::Ok(())
    })
    .await
}

/// Whether the words are in any file of the store.
async fn stored_as_text(nats: &Nats, words: &str) -> Result<bool> {
    let client = nats.connect().await?;
    stack::provision(&nats.server(), 1).await?;
    let jetstream = async_nats::jetstream::new(client);
    jetstream.publish("payment.created", format!("{{\"{words}\": 1}}").into()).await?.await?;
    let output = Command::new("docker").args(["cp", &format!("{}:/data", nats.id()), "-"]).output().await?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(output.stdout.windows(words.len()).any(|window| window == words.as_bytes()))
}

#[tokio::test]
async fn an_encrypted_store_is_unreadable_and_survives_a_restart() -> Result<()> {
    let words = "words that nobody else shall read";
    ensure!(stored_as_text(&Nats::start().await?, words).await?, "the test looks in the wrong place");

    let setup = NatsSetup { store_key: "a key".to_owned(), ..NatsSetup::default() };
    let nats = Nats::start_with(setup).await?;
    ensure!(!stored_as_text(&nats, words).await?, "it is stored as it is");
    nats.restart().await?;
    let stream = async_nats::jetstream::new(nats.connect().await?).get_stream("PAYMENTS").await?;
    let message = stream.get_raw_message(1).await?;
    ensure!(String::from_utf8_lossy(&message.payload).contains(words), "{message:?}");
    Ok(())
}
