//! Readers tolerate missing fields that they do not need. Otherwise the error names the field.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use contracts::{ExpirationEvent, OrderChange, OrderEvent, PaymentEvent, TicketEvent};
use event_bus_core::Event;
use serde_json::Value;
use std::fmt::Debug;

/// Every field of a golden file, by its path.
fn paths(file: &str) -> (Value, Vec<String>) {
    let path = format!("{}/golden/{file}.json", env!("CARGO_MANIFEST_DIR"));
    let body: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let mut paths: Vec<String> = body.as_object().unwrap().keys().cloned().collect();
    let ticket = body.get("ticket").and_then(Value::as_object);
    paths.extend(ticket.into_iter().flat_map(|ticket| ticket.keys().map(|field| format!("ticket.{field}"))));
    (body, paths)
}

fn without(body: &Value, path: &str) -> Value {
    let mut body = body.clone();
    let (object, field) = match path.split_once('.') {
        Some((object, field)) => (&mut body[object], field),
        None => (&mut body, path),
    };
    object.as_object_mut().unwrap().remove(field).unwrap();
    body
}

/// Reads the golden `file` without each of its fields: `needed` must be there, all others not.
fn reads<E: Event + Debug>(subject: &str, file: &str, needed: &[&str]) {
    let (body, paths) = paths(file);
    for path in &paths {
        let outcome = E::decode(subject, without(&body, path).to_string().as_bytes());
        if needed.contains(&path.as_str()) {
            let (error, field) = (outcome.unwrap_err().to_string(), path.rsplit('.').next().unwrap());
            assert!(error.contains(&format!("missing field `{field}`")), "{subject} without {path}: {error}");
        } else {
            assert!(outcome.is_ok(), "{subject} without {path}: {outcome:?}");
        }
    }
    assert!(needed.iter().all(|path| paths.iter().any(|known| known == path)), "{file} lacks one of {needed:?}");
    let unused = paths.iter().filter(|path| !needed.contains(&path.as_str()));
    let least = unused.fold(body.clone(), |body, path| without(&body, path));
    E::decode(subject, least.to_string().as_bytes()).unwrap();
}

#[test]
fn readers_need_only_the_fields_that_they_use() {
    let ticket = ["id", "version", "title", "price"];
    reads::<TicketEvent>("ticket.created", "ticket.created", &ticket);
    reads::<TicketEvent>("ticket.updated", "ticket.updated", &ticket);
    reads::<TicketEvent>("ticket.updated", "ticket.updated.reserved", &ticket);
    for subject in ["order.created", "order.cancelled", "order.completed"] {
        reads::<OrderChange>(subject, subject, &["id", "version", "ticket", "ticket.id"]);
    }
    reads::<PaymentEvent>("payment.created", "payment.created", &["id", "orderId"]);
    reads::<ExpirationEvent>("expiration.complete", "expiration.complete", &["orderId"]);
}

#[test]
fn a_reader_ignores_what_is_in_fields_that_it_does_not_use() {
    let body = br#"{"id":"5f2b18a3e41d0c0012abcd01","version":0,"status":7,"userId":null,"expiresAt":"soon","__v":0,
                    "ticket":{"id":"5f2b18a3e41d0c0012abcdef","price":"20","version":"1"}}"#;
    for (subject, holds_ticket) in [("order.created", true), ("order.cancelled", false), ("order.completed", true)] {
        let order = OrderChange::decode(subject, body).unwrap();
        assert_eq!((order.version, order.ticket.reservation, order.holds_ticket), (0, 0, holds_ticket), "{subject}");
        assert_eq!(order.event_id(), "5f2b18a3e41d0c0012abcd01-0");
    }
    let error = OrderChange::decode("order.expired", body).unwrap_err();
    assert_eq!(error.to_string(), r#"no event has the subject "order.expired""#);
}

#[test]
fn the_whole_snapshot_of_an_order_needs_every_field() {
    for subject in ["order.created", "order.cancelled", "order.completed"] {
        let (body, paths) = paths(subject);
        for path in paths.iter().filter(|path| *path != "ticket.reservation") {
            let outcome = OrderEvent::decode(subject, without(&body, path).to_string().as_bytes());
            assert!(outcome.is_err(), "{subject} without {path}: {outcome:?}");
        }
    }
}
