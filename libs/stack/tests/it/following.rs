//! What tickets make of order events that come twice, late, or in the wrong order. There is no orders service here: the
//! test publishes what one might have.

use crate::system::{System, id};
use anyhow::{Result, ensure};
use serde_json::{Value, json};
use testkit::eventually;

/// Version 0 of an order is its creation, version 1 its end.
#[derive(Clone, Copy)]
enum News {
    Made(u8),
    Cancelled(u8),
    Paid(u8),
}
use News::{Cancelled, Made, Paid};

fn order(number: u8) -> String {
    format!("{number:024x}")
}

impl News {
    /// The order of this number is its ticket's reservation of this number, unless the publisher knows of none.
    fn event(self, ticket: &str, reservations: bool) -> (&'static str, Value) {
        let (subject, status, number, version) = match self {
            Made(number) => ("order.created", "created", number, 0),
            Cancelled(number) => ("order.cancelled", "cancelled", number, 1),
            Paid(number) => ("order.completed", "complete", number, 1),
        };
        let mut event = json!({
            "id": order(number), "version": version, "status": status, "userId": "buyer",
            "expiresAt": "2026-01-31T12:15:00.000Z", "ticket": {"id": ticket, "price": 20, "version": 0},
        });
        if reservations {
            event["ticket"]["reservation"] = number.into();
        }
        (subject, event)
    }
}

/// Publishes `news` to a ticket of its own; it must end with this holder and version.
async fn ends(system: &System, news: &[News], reservations: bool, holder: Option<u8>, version: i64) -> Result<()> {
    let ticket = system.ticket().await?;
    for news in news {
        let (subject, event) = news.event(&ticket, reservations);
        system.publish(subject, event).await?;
    }
    system.caught_up("ORDERS", "tickets").await?;
    let seen = system.see(&ticket).await?;
    let expected = holder.map(order);
    ensure!(seen["orderId"].as_str() == expected.as_deref(), "expected {expected:?}, got {seen}");
    ensure!(seen["version"] == version, "expected version {version}, got {seen}");
    Ok(())
}

#[tokio::test]
async fn a_ticket_ends_held_by_its_live_order_or_free_whatever_comes_when() -> Result<()> {
    let system = System::start(1, 0).await?;
    eventually("the stream", async || {
        system.jetstream().await?.get_stream("ORDERS").await.map_err(anyhow::Error::from)
    })
    .await?;
    for (news, holder, version) in [
        (&[Made(1)][..], Some(1), 1),
        (&[Made(1), Made(1), Made(1)], Some(1), 1),
        (&[Made(1), Cancelled(1)], None, 2),
        // The cancel is delivered before its creation.
        (&[Cancelled(1), Made(1)], None, 0),
        // The creation is delivered again after the cancel.
        (&[Made(1), Cancelled(1), Made(1)], None, 2),
        (&[Made(1), Cancelled(1), Made(1), Cancelled(1)], None, 2),
        // The cancel of an old order is delivered after a new one was made.
        (&[Made(1), Cancelled(1), Made(2), Cancelled(1)], Some(2), 3),
        // The new one is delivered before the old one's cancel.
        (&[Made(1), Made(2), Cancelled(1)], Some(2), 2),
        (&[Made(2), Made(1), Cancelled(1)], Some(2), 1),
        (&[Made(2), Cancelled(2), Made(1), Cancelled(1)], None, 2),
        // Paid is held for good.
        (&[Made(1), Paid(1), Made(1)], Some(1), 1),
        (&[Paid(1), Made(1)], Some(1), 1),
        (&[Cancelled(1), Made(3), Paid(3), Cancelled(2), Made(2)], Some(3), 1),
    ] {
        ends(&system, news, true, holder, version).await?;
    }
    Ok(())
}

#[tokio::test]
async fn an_older_publisher_without_reservations_reserves_and_releases_a_ticket_with_a_single_order() -> Result<()> {
    let system = System::start(1, 0).await?;
    eventually("the stream", async || {
        system.jetstream().await?.get_stream("ORDERS").await.map_err(anyhow::Error::from)
    })
    .await?;
    ends(&system, &[Made(1)], false, Some(1), 1).await?;
    ends(&system, &[Made(1), Cancelled(1), Made(1)], false, None, 2).await?;
    ends(&system, &[Cancelled(1), Made(1)], false, None, 0).await?;
    ends(&system, &[Made(1), Paid(1)], false, Some(1), 1).await
}

#[tokio::test]
async fn each_change_of_the_holder_is_announced_and_nothing_else_is() -> Result<()> {
    let system = System::start(1, 0).await?;
    let ticket = system.ticket().await?;
    eventually("the stream", async || {
        system.jetstream().await?.get_stream("ORDERS").await.map_err(anyhow::Error::from)
    })
    .await?;
    for news in [Made(1), Made(1), Cancelled(1), Made(1), Made(2), Paid(2), Made(2), Cancelled(1)] {
        let (subject, event) = news.event(&ticket, true);
        system.publish(subject, event).await?;
    }
    system.caught_up("ORDERS", "tickets").await?;
    let announced = eventually("the ticket's events", async || {
        let stream = system.stream().await?;
        ensure!(stream.len() == 4, "{} events", stream.len());
        anyhow::Ok(stream)
    })
    .await?;
    let holders: Vec<_> = announced.iter().map(|stored| stored.body.get("orderId").cloned()).collect();
    ensure!(holders == [None, Some(json!(order(1))), None, Some(json!(order(2)))], "{holders:?}");
    for (version, stored) in (0..).zip(&announced) {
        ensure!(stored.version == version && id(&stored.body)? == ticket, "{stored:?}");
    }
    Ok(())
}
