//! Events of the orders service: stream `ORDERS`.

use crate::{Id, Price, Timestamp};
use event_bus_core::{DecodeError, Event, Publish, decode_json, encode_json};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::borrow::Cow;
use std::str::FromStr;

/// An event of an order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OrderEvent {
    /// `order.created`: version 0; the order holds its ticket.
    Created(OrderSnapshot),
    /// `order.cancelled`: by its user, or because its time is over; the ticket is free again.
    Cancelled(OrderSnapshot),
    /// `order.completed`: paid; the ticket stays held for good.
    Completed(OrderSnapshot),
}

/// An order at one version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OrderSnapshot {
    /// The order.
    pub id: Id,
    /// Counts saved changes, from 0.
    #[serde(deserialize_with = "event_bus_core::deserialize_version")]
    pub version: i64,
    /// The status of the order.
    pub status: OrderStatus,
    /// The user who ordered.
    pub user_id: String,
    /// The time until which it must be paid.
    pub expires_at: Timestamp,
    /// The ticket that was ordered.
    pub ticket: OrderedTicket,
}

/// The ticket as it was when it was ordered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OrderedTicket {
    /// The ticket.
    pub id: Id,
    /// Its price.
    pub price: Price,
    /// The version of the ticket that was ordered.
    #[serde(deserialize_with = "event_bus_core::deserialize_version")]
    pub version: i64,
    /// Numbers the orders of this ticket: 1, 2, 3 … A fencing token: an event with a lower number changes nothing.
    ///
    /// 0 if an older publisher omits it.
    #[serde(default, deserialize_with = "event_bus_core::deserialize_version")]
    pub reservation: i64,
}

/// An event of the stream `ORDERS` with only the fields that tickets reads.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct OrderChange {
    /// The order.
    pub id: Id,
    /// Counts saved changes, from 0.
    #[serde(deserialize_with = "event_bus_core::deserialize_version")]
    pub version: i64,
    /// The ticket that was ordered.
    pub ticket: ReservedTicket,
    /// Whether the order holds its ticket from this version on. Derived from the subject.
    #[serde(skip)]
    pub holds_ticket: bool,
}

/// A ticket, and the number of the order among its orders.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ReservedTicket {
    /// The ticket.
    pub id: Id,
    /// See [`OrderedTicket::reservation`].
    #[serde(default, deserialize_with = "event_bus_core::deserialize_version")]
    pub reservation: i64,
}

/// The status of an order. All but `Cancelled` hold the ticket; the last two are final.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OrderStatus {
    /// `created`: not yet paid.
    Created,
    /// `awaiting:payment`: a payment is under way.
    AwaitingPayment,
    /// `complete`: paid.
    Complete,
    /// `cancelled`: by its user, or because its time is over.
    Cancelled,
}

/// The text is not the name of a status.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no order has the status {0:?}")]
pub struct UnknownStatus(String);

impl OrderStatus {
    /// Its name in JSON and in the table.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::AwaitingPayment => "awaiting:payment",
            Self::Complete => "complete",
            Self::Cancelled => "cancelled",
        }
    }
}

impl FromStr for OrderStatus {
    type Err = UnknownStatus;

    fn from_str(text: &str) -> Result<Self, UnknownStatus> {
        let all = [Self::Created, Self::AwaitingPayment, Self::Complete, Self::Cancelled];
        all.into_iter().find(|status| status.as_str() == text).ok_or_else(|| UnknownStatus(text.to_owned()))
    }
}

impl Serialize for OrderStatus {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for OrderStatus {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Cow::<str>::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl OrderEvent {
    /// The order at the version this event announces.
    pub fn snapshot(&self) -> &OrderSnapshot {
        match self {
            Self::Created(snapshot) | Self::Cancelled(snapshot) | Self::Completed(snapshot) => snapshot,
        }
    }
}

impl Event for OrderEvent {
    const STREAM: &'static str = "ORDERS";

    fn aggregate_id(&self) -> String {
        self.snapshot().id.to_string()
    }

    fn version(&self) -> i64 {
        self.snapshot().version
    }

    fn decode(subject: &str, body: &[u8]) -> Result<Self, DecodeError> {
        match subject {
            "order.created" => decode_json(body).map(Self::Created),
            "order.cancelled" => decode_json(body).map(Self::Cancelled),
            "order.completed" => decode_json(body).map(Self::Completed),
            unknown => Err(DecodeError::UnknownSubject(unknown.to_owned())),
        }
    }
}

impl Publish for OrderEvent {
    fn subject(&self) -> &'static str {
        match self {
            Self::Created(_) => "order.created",
            Self::Cancelled(_) => "order.cancelled",
            Self::Completed(_) => "order.completed",
        }
    }

    fn encode(&self) -> String {
        encode_json(self.snapshot())
    }
}

impl Event for OrderChange {
    const STREAM: &'static str = OrderEvent::STREAM;

    fn aggregate_id(&self) -> String {
        self.id.to_string()
    }

    fn version(&self) -> i64 {
        self.version
    }

    fn decode(subject: &str, body: &[u8]) -> Result<Self, DecodeError> {
        let holds_ticket = match subject {
            "order.created" | "order.completed" => true,
            "order.cancelled" => false,
            unknown => return Err(DecodeError::UnknownSubject(unknown.to_owned())),
        };
        Ok(Self { holds_ticket, ..decode_json(body)? })
    }
}
