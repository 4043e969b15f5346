//! The reply subjects that tickets accepts.

use crate::system::System;
use anyhow::{Result, ensure};
use futures::StreamExt;
use std::time::Duration;
use tokio::time::timeout;

/// A reply is published with the rights of tickets, which include its own stream.
#[tokio::test]
async fn a_request_with_a_reply_subject_that_is_no_inbox_gets_no_reply() -> Result<()> {
    let system = System::start(1, 0).await?;
    let options = async_nats::ConnectOptions::new().custom_inbox_prefix("_INBOX_orders");
    let options = options.user_and_password("orders".to_owned(), "orders".to_owned());
    let orders = options.connect(system.nats.server()).await?;
    let inbox = orders.new_inbox();
    let mut answers = orders.subscribe(inbox.clone()).await?;
    for reply in ["ticket.created", "ticket.updated", "$JS.ACK.ORDERS.tickets.1.1.1.1.0", &inbox] {
        orders.publish_with_reply("tickets.show", reply.to_owned(), r#""ffffffffffffffffffffffff""#.into()).await?;
    }
    // The last request gets a reply, and the others came before it.
    ensure!(timeout(Duration::from_secs(10), answers.next()).await?.is_some());
    ensure!(system.stream().await?.is_empty() && !system.nats.logs().await?.contains("Permissions Violation"));
    let mut admin = system.jetstream().await?.get_stream("TICKETS").await?;
    ensure!(admin.info().await?.state.last_sequence == 0, "an answer was stored as an event");
    Ok(())
}
