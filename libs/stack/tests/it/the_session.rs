//! The session that `cargo up` prints.

use crate::system::System;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tokio::process::Command;

#[tokio::test]
async fn every_command_of_the_printed_session_has_the_described_result() -> Result<()> {
    let system = System::start(1, 1).await?;
    system.tickets(1).await?; // waits until the services have started
    let session = stack::session(&system.tickets[0].address(), &system.orders[0].address());
    let output = Command::new("bash").args(["-ec", &session]).output().await.context("cannot run bash")?;
    let (printed, complaints) = (String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?);
    ensure!(output.status.success() && complaints.is_empty(), "{printed}\n{complaints}");
    let lines: Vec<&str> = printed.lines().collect();
    let [ticket, changed, order, reserved, "", free, orders] = lines[..] else { anyhow::bail!("{printed}") };
    let json = |line: &str| serde_json::from_str::<Value>(line).with_context(|| printed.clone());
    ensure!(json(changed)?["price"] == 25.5 && json(changed)?["id"] == ticket, "{printed}");
    ensure!(json(reserved)?["orderId"] == order, "{printed}");
    ensure!(json(free)?.get("orderId").is_none() && json(free)?["id"] == ticket, "{printed}");
    ensure!(json(orders)?[0]["status"] == "cancelled" && json(orders)?[0]["id"] == order, "{printed}");
    system.settled().await
}
