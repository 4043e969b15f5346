//! Runs each block of README.md and docs/operations.md, or parses it if it needs what is not here.
//!
//! Needs kubectl, psql, openssl and curl.

#![allow(clippy::disallowed_methods, reason = "tests look into tables, and publish what no relay would")]

#[path = "../it/authority.rs"]
mod authority;
mod blocks;
#[path = "../manifests/overlay.rs"]
#[allow(dead_code, reason = "the tests of manifests look at more of it")]
mod overlay;
mod postgres;
mod production;
#[path = "../it/records.rs"]
#[allow(dead_code, reason = "other tests look at more of them")]
mod records;
#[path = "../it/settled.rs"]
#[allow(dead_code, reason = "other tests check more")]
mod settled;
#[path = "../it/system.rs"]
#[allow(dead_code, reason = "other tests do more to it")]
mod system;
mod text;

use crate::blocks::{block, blocks, outcome};
use crate::system::System;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use stack::services::{NATS_MONITORING_PORT, NATS_PORT, ORDERS, TICKETS};
use std::process::Stdio;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;

/// A part of each block that a test of this target runs.
const RUN: [&str; 6] = [
    "ALICE=… BOB=…",
    "ALICE=ey",
    "# 1. roles and databases",
    "exec 3<>/dev/tcp",
    "pg_dump --format=custom",
    "pg_restore --clean",
];

/// Programs that a test cannot run: a block with a line that starts with one of them is only parsed.
const ABSENT: [(&str, &str); 7] = [
    ("cargo", "it runs this test"),
    ("docker compose", "its own test, `compose`, runs it"),
    ("infra/docker/build", "it takes minutes; `compose` runs it"),
    ("infra/k8s/try", "it needs a cluster"),
    ("kind", "it pulls images"),
    ("skaffold", "it needs a cluster"),
    ("as monitor", "the command `nats` is in no package repository that tests may use"),
];

/// The beginnings of blocks that are no commands. `text` checks those that repeat output or code.
const TEXT: [&str; 4] =
    ["services/tickets      api →", "flowchart LR", "Ready. Ctrl-C ends it.", "pub async fn start("];

#[tokio::test]
async fn every_block_parses_and_is_run_unless_its_program_is_absent() -> Result<()> {
    for block in blocks()?.iter().filter(|block| !TEXT.iter().any(|text| block.starts_with(text))) {
        outcome(Command::new("bash").arg("-n").arg("-c").arg(block)).await.with_context(|| block.clone())?;
        let is_run = RUN.iter().any(|part| block.contains(part));
        let needs = ABSENT.iter().any(|(program, _)| block.lines().any(|line| line.starts_with(program)));
        ensure!(is_run || needs, "no test runs this block, and no program that it needs is absent:\n{block}");
    }
    Ok(())
}

/// The block with the addresses of this system.
fn at(system: &System, block: &str) -> String {
    let monitoring = system.nats.monitoring_url();
    let ports = [
        (TICKETS.port, system.tickets[0].port().to_string()),
        (ORDERS.port, system.orders[0].port().to_string()),
        (NATS_PORT, system.nats.server().replace("127.0.0.1:", "")),
        (NATS_MONITORING_PORT, monitoring.replace("http://127.0.0.1:", "")),
    ];
    ports.iter().fold(block.to_owned(), |text, (from, to)| {
        text.replace(&format!("127.0.0.1:{from}"), &format!("127.0.0.1:{to}"))
            .replace(&format!("127.0.0.1/{from}"), &format!("127.0.0.1/{to}"))
    })
}

#[tokio::test]
async fn blocks_for_a_running_system_do_what_the_text_says() -> Result<()> {
    let system = System::start(1, 1).await?;
    system.tickets(1).await?; // waits until the services have started
    the_session(&system).await?;
    the_ticket_with_a_token(&system).await?;
    the_stream_over_plain_tcp(&system).await?;
    system.settled().await
}

async fn the_session(system: &System) -> Result<()> {
    let block = at(system, &block(RUN[0])?);
    let tokens = format!("ALICE={}\nBOB={}", testkit::token("alice"), testkit::token("bob"));
    let printed = stack::session(&system.tickets[0].address(), &system.orders[0].address());
    let commands = |session: &str| {
        session.lines().skip_while(|line| !line.starts_with("call()")).map(str::to_owned).collect::<Vec<_>>()
    };
    ensure!(commands(&block) == commands(&printed), "`cargo up` prints another session:\n{printed}");
    let output = outcome(Command::new("bash").args(["-ec", &block.replace(RUN[0], &tokens)])).await?;
    let last: Value = serde_json::from_str(output.lines().last().unwrap_or_default()).context(output.clone())?;
    ensure!(last[0]["status"] == "cancelled", "{output}");
    Ok(())
}

/// The block with the token of alice.
async fn the_ticket_with_a_token(system: &System) -> Result<()> {
    let output = outcome(Command::new("bash").args(["-ec", &at(system, &block(RUN[1])?)])).await?;
    let ticket: Value = serde_json::from_str(&output).with_context(|| output.clone())?;
    ensure!(ticket["userId"] == "alice" && ticket["version"] == 0, "{ticket}");
    Ok(())
}

/// With the programs of the image of Postgres: those of this machine may be older than the server.
async fn in_postgres(system: &System, block: &str) -> Result<String> {
    let mut docker = Command::new("docker");
    docker.args(["exec", "--workdir", "/tmp", "--env", "PGUSER=postgres", system.postgres.id(), "bash", "-ec", block]);
    outcome(&mut docker).await
}

#[tokio::test]
async fn a_backup_is_restored_as_the_text_says() -> Result<()> {
    let mut system = System::start(1, 1).await?;
    let ticket = system.ticket().await?;
    in_postgres(&system, &block(RUN[4])?).await?;
    let edited = serde_json::json!({"title": "Opera", "price": 30});
    system.seller(0).put(&format!("/api/tickets/{ticket}"), edited).await?.expect(200)?;
    system.settled().await?;
    system.tickets.remove(0).stop(std::time::Duration::from_secs(30)).await?;
    in_postgres(&system, &block(RUN[5])?).await?;
    system.add(1, 0).await?;
    testkit::eventually("the recovery", async || {
        let logs = system.tickets[0].logs();
        ensure!(logs.contains("the database is recovered from the stream"), "{logs}");
        anyhow::Ok(())
    })
    .await?;
    ensure!(system.see(&ticket).await?["title"] == "Opera");
    system.settled().await
}

/// Bash and curl alone. The subscription does not end by itself, so the last line runs separately.
async fn the_stream_over_plain_tcp(system: &System) -> Result<()> {
    let block = at(system, &block(RUN[3])?);
    let (subscription, rest) = block.split_once("curl").context("the block ends with curl")?;
    let mut bash =
        Command::new("bash").args(["-ec", subscription]).stdout(Stdio::piped()).kill_on_drop(true).spawn()?;
    let mut lines = BufReader::new(bash.stdout.take().context("stdout is a pipe")?).lines();
    // The server acknowledges CONNECT and both subscriptions.
    let mut acknowledged = 0;
    while acknowledged < 3 {
        let line = lines.next_line().await?.context("the subscription ended")?;
        ensure!(!line.starts_with("-ERR"), "{line}");
        acknowledged += usize::from(line.starts_with("+OK"));
    }
    let ticket = system.ticket().await?;
    while !lines.next_line().await?.context("the subscription ended")?.contains(&ticket) {}

    let output = outcome(Command::new("bash").args(["-ec", &format!("curl{rest}")])).await?;
    let streams: Value = serde_json::from_str(&output).with_context(|| output.clone())?;
    ensure!(streams["streams"] == 4 && streams["consumers"] == 4, "{output}");
    Ok(())
}
