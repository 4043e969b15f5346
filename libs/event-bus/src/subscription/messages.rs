//! Messages that were delivered: their events, and their acknowledgement.

use super::Received;
use crate::panics::panic_message;
use crate::retry::jitter;
use async_nats::jetstream::{AckKind, Message};
use event_bus_core::Event;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;
use tokio::time::timeout;

/// How long sending an ack may take. An ack must not block the subscription while the connection is down.
pub(super) const ACK: Duration = Duration::from_secs(1);
/// The delay after the first delivery of an event that waits for a lock. It doubles with each delivery, up to
/// [`LOCKED_LONG`], and is jittered.
const LOCKED: Duration = Duration::from_millis(500);
const LOCKED_LONG: Duration = Duration::from_secs(4);

/// Messages and the events in them, in the same order.
pub(super) struct Deliveries<E> {
    pub(super) messages: Vec<Message>,
    pub(super) events: Vec<Received<E>>,
}

impl<E> Default for Deliveries<E> {
    fn default() -> Self {
        Self { messages: Vec::new(), events: Vec::new() }
    }
}

impl<E> Deliveries<E> {
    pub(super) fn push(&mut self, message: Message, event: Received<E>) {
        self.messages.push(message);
        self.events.push(event);
    }
}

/// The event in a message, or why there is none.
pub(super) fn decode<E: Event>(subject: &str, payload: &[u8]) -> Result<E, String> {
    match catch_unwind(AssertUnwindSafe(|| E::decode(subject, payload))) {
        Ok(Ok(event)) => Ok(event),
        Ok(Err(error)) => Err(error.to_string()),
        Err(panic) => Err(format!("decoding panicked: {}", panic_message(&*panic))),
    }
}

pub(super) async fn acknowledge(messages: &[Message]) {
    for message in messages {
        send(message, AckKind::Ack).await;
    }
}

/// Returns a message to the server, which redelivers it after a delay that grows with each delivery.
pub(super) async fn postpone(message: &Message) {
    let deliveries = message.info().map_or(1, |info| u32::try_from(info.delivered).unwrap_or(1));
    let delay = LOCKED.saturating_mul(1 << deliveries.saturating_sub(1).min(8)).min(LOCKED_LONG);
    send(message, AckKind::Nak(Some(jitter(delay)))).await;
}

/// Sends an ack, nak or term without a confirmation: a lost ack costs one harmless redelivery.
pub(super) async fn send(message: &Message, kind: AckKind) {
    let _ = timeout(ACK, message.ack_with(kind)).await;
}
