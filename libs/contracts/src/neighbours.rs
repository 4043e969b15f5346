//! Events of external services: streams `PAYMENTS` and `EXPIRATION`.
//!
//! They announce something that happens once, so their version is always 0.

use crate::Id;
use event_bus_core::{DecodeError, Event, Publish, decode_json, encode_json};
use serde::{Deserialize, Serialize};

/// An event of the payments service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PaymentEvent {
    /// `payment.created`: an order was paid.
    Created(Payment),
}

/// A payment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Payment {
    /// The payment.
    pub id: Id,
    /// The order it pays.
    pub order_id: Id,
    /// Its id at the payment provider; empty if the publisher omits it.
    #[serde(default)]
    pub stripe_id: String,
}

impl PaymentEvent {
    /// The payment that this event announces.
    pub fn payment(&self) -> &Payment {
        let Self::Created(payment) = self;
        payment
    }
}

impl Event for PaymentEvent {
    const STREAM: &'static str = "PAYMENTS";

    fn aggregate_id(&self) -> String {
        self.payment().id.to_string()
    }

    fn version(&self) -> i64 {
        0
    }

    fn decode(subject: &str, body: &[u8]) -> Result<Self, DecodeError> {
        match subject {
            "payment.created" => decode_json(body).map(Self::Created),
            unknown => Err(DecodeError::UnknownSubject(unknown.to_owned())),
        }
    }
}

impl Publish for PaymentEvent {
    fn subject(&self) -> &'static str {
        "payment.created"
    }

    fn encode(&self) -> String {
        encode_json(self.payment())
    }
}

/// An event of an external timer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExpirationEvent {
    /// `expiration.complete`: the time to pay an order is over.
    Complete(Expiration),
}

/// The end of an order's time.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Expiration {
    /// The order whose time is over.
    pub order_id: Id,
}

impl ExpirationEvent {
    /// The order whose time is over.
    pub fn order_id(&self) -> Id {
        let Self::Complete(expiration) = self;
        expiration.order_id
    }
}

impl Event for ExpirationEvent {
    const STREAM: &'static str = "EXPIRATION";

    fn aggregate_id(&self) -> String {
        self.order_id().to_string()
    }

    fn version(&self) -> i64 {
        0
    }

    fn decode(subject: &str, body: &[u8]) -> Result<Self, DecodeError> {
        match subject {
            "expiration.complete" => decode_json(body).map(Self::Complete),
            unknown => Err(DecodeError::UnknownSubject(unknown.to_owned())),
        }
    }
}
