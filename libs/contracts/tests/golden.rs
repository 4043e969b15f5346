//! The files in `golden/` are the contract: they are equal to the bytes on the wire.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use contracts::{ExpirationEvent, OrderChange, OrderEvent, PaymentEvent, TicketEvent};
use event_bus_core::{DecodeError, Event, Publish};

fn golden(name: &str) -> String {
    let path = format!("{}/golden/{name}.json", env!("CARGO_MANIFEST_DIR"));
    std::fs::read_to_string(path).unwrap().trim_end().to_owned()
}

fn survives<E: Publish>(subject: &str, file: &str) -> E {
    let json = golden(file);
    let event = E::decode(subject, json.as_bytes()).unwrap();
    assert_eq!(event.subject(), subject);
    assert_eq!(event.encode(), json);
    event
}

#[test]
fn every_event_is_written_as_its_golden_file() {
    let created: TicketEvent = survives("ticket.created", "ticket.created");
    assert_eq!(created.event_id(), "5f2b18a3e41d0c0012abcdef-0");
    survives::<TicketEvent>("ticket.updated", "ticket.updated");
    survives::<TicketEvent>("ticket.updated", "ticket.updated.reserved");
    survives::<OrderEvent>("order.created", "order.created");
    survives::<OrderEvent>("order.cancelled", "order.cancelled");
    survives::<OrderEvent>("order.completed", "order.completed");
    survives::<PaymentEvent>("payment.created", "payment.created");
}

#[test]
fn every_event_of_a_neighbour_is_read_from_its_golden_file() {
    let body = golden("payment.created");
    let PaymentEvent::Created(payment) = PaymentEvent::decode("payment.created", body.as_bytes()).unwrap();
    let (id, order_id) = (payment.id.to_string(), payment.order_id.to_string());
    assert_eq!([id.as_str(), &order_id], ["5f2b18a3e41d0c0012abcd03", "5f2b18a3e41d0c0012abcd01"]);
    assert_eq!(payment.stripe_id, "ch_1");
    let body = golden("expiration.complete");
    let ExpirationEvent::Complete(expiration) =
        ExpirationEvent::decode("expiration.complete", body.as_bytes()).unwrap();
    assert_eq!(expiration.order_id.to_string(), "5f2b18a3e41d0c0012abcd01");
}

#[test]
fn unknown_fields_are_ignored() {
    let json = golden("ticket.created").replace('{', r#"{"seat":{"row":1},"__v":3,"#);
    let event = TicketEvent::decode("ticket.created", json.as_bytes()).unwrap();
    assert_eq!(event.encode(), golden("ticket.created"));
}

#[test]
fn an_older_publisher_may_leave_out_the_reservation() {
    let json = golden("order.created").replace(r#","reservation":1"#, "");
    let event = OrderEvent::decode("order.created", json.as_bytes()).unwrap();
    assert_eq!(event.snapshot().ticket.reservation, 0);
}

#[test]
fn what_is_not_an_event_is_told_why() {
    let json = golden("ticket.created");
    for garbage in [
        "",
        "not json",
        "[]",
        "null",
        r#"{"id":1}"#,
        &json.replace(r#""version":0"#, r#""version":"0""#),
        &json.replace(r#""version":0"#, r#""version":0.5"#),
        &json.replace(r#""version":0"#, r#""version":-1"#),
        &json.replace("20.5", "-20.5"),
        &json.replace("20.5", r#""20.5""#),
        &json.replace("5f2b18a3e41d0c0012abcdef", "5f2b"),
    ] {
        let error = TicketEvent::decode("ticket.created", garbage.as_bytes()).unwrap_err();
        assert!(matches!(error, DecodeError::Body(_)), "{garbage}: {error}");
    }
    let error = TicketEvent::decode("ticket.deleted", json.as_bytes()).unwrap_err();
    assert_eq!(error.to_string(), r#"no event has the subject "ticket.deleted""#);
}

#[test]
fn what_is_not_an_order_event_is_told_why() {
    let json = golden("order.created");
    for (was, is) in [
        (r#""version":0"#, r#""version":-1"#),
        (r#""version":1"#, r#""version":-1"#),
        (r#""reservation":1"#, r#""reservation":-1"#),
        (r#""reservation":1"#, r#""reservation":null"#),
        (r#""reservation":1"#, r#""reservation":9223372036854775808"#),
        (r#""status":"created""#, r#""status":"expired""#),
        (r#""status":"created""#, r#""status":"Created""#),
        (r#""status":"created""#, r#""status":null"#),
        (r#""status":"created","#, ""),
        (r#""expiresAt":"2026"#, r#""expiresAt":"soon"#),
    ] {
        let garbage = json.replace(was, is);
        assert_ne!(garbage, json, "{was} is not in the file");
        for subject in ["order.created", "order.cancelled", "order.completed"] {
            let error = OrderEvent::decode(subject, garbage.as_bytes()).unwrap_err();
            assert!(matches!(error, DecodeError::Body(_)), "{garbage}: {error}");
            // What tickets do not use cannot be malformed.
            let used = was.contains("reservation") || was.contains(r#""version":0"#);
            assert_eq!(OrderChange::decode(subject, garbage.as_bytes()).is_err(), used, "{garbage}");
        }
    }
    let unknown = json.replace(r#""status":"created""#, r#""status":"expired""#);
    let error = OrderEvent::decode("order.created", unknown.as_bytes()).unwrap_err();
    assert!(error.to_string().contains(r#"no order has the status "expired""#), "{error}");
    let error = OrderEvent::decode("order.expired", json.as_bytes()).unwrap_err();
    assert_eq!(error.to_string(), r#"no event has the subject "order.expired""#);
}
