//! Tickets applies events of orders that arrive twice, late, or in the wrong order.
//!
//! The test publishes the events; there is no orders service.

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
    /// The number is also the reservation number, unless the publisher has no `reservations`.
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

/// Publishes `news` about a new ticket, which must end with this holder and version.
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
async fn order_events_in_any_order_leave_a_ticket_to_its_live_order() -> Result<()> {
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
        // The cancel of an old order is delivered after the creation of a new one.
        (&[Made(1), Cancelled(1), Made(2), Cancelled(1)], Some(2), 3),
        // The creation of a new order is delivered before the cancel of the old one.
        (&[Made(1), Made(2), Cancelled(1)], Some(2), 2),
        (&[Made(2), Made(1), Cancelled(1)], Some(2), 1),
        (&[Made(2), Cancelled(2), Made(1), Cancelled(1)], None, 2),
        // A paid order holds its ticket for good.
        (&[Made(1), Paid(1), Made(1)], Some(1), 1),
        (&[Paid(1), Made(1)], Some(1), 1),
        (&[Cancelled(1), Made(3), Paid(3), Cancelled(2), Made(2)], Some(3), 1),
    ] {
        ends(&system, news, true, holder, version).await?;
    }
    Ok(())
}

#[tokio::test]
async fn an_order_without_a_reservation_number_holds_and_releases_its_ticket() -> Result<()> {
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
async fn only_a_change_of_the_holder_publishes_an_event() -> Result<()> {
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
