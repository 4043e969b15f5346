//! Events of the tickets service: stream `TICKETS`.

use crate::{Id, Price};
use event_bus_core::{DecodeError, Event, Publish, decode_json, encode_json};
use serde::{Deserialize, Serialize};

/// An event of a ticket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TicketEvent {
    /// `ticket.created`: version 0.
    Created(TicketSnapshot),
    /// `ticket.updated`: edited by its owner, or reserved or released by an order.
    Updated(TicketSnapshot),
}

/// A ticket at one version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TicketSnapshot {
    /// The ticket.
    pub id: Id,
    /// Counts saved changes, from 0.
    #[serde(deserialize_with = "event_bus_core::deserialize_version")]
    pub version: i64,
    /// The title that its owner gave it.
    pub title: String,
    /// Its price.
    pub price: Price,
    /// Its owner. Readers do not need it: empty if the publisher omits it.
    #[serde(default)]
    pub user_id: String,
    /// The order that holds it; absent while it is free.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub order_id: Option<Id>,
}

impl TicketEvent {
    /// The ticket at the version this event announces.
    pub fn snapshot(&self) -> &TicketSnapshot {
        match self {
            Self::Created(snapshot) | Self::Updated(snapshot) => snapshot,
        }
    }
}

impl Event for TicketEvent {
    const STREAM: &'static str = "TICKETS";

    fn aggregate_id(&self) -> String {
        self.snapshot().id.to_string()
    }

    fn version(&self) -> i64 {
        self.snapshot().version
    }

    fn decode(subject: &str, body: &[u8]) -> Result<Self, DecodeError> {
        match subject {
            "ticket.created" => decode_json(body).map(Self::Created),
            "ticket.updated" => decode_json(body).map(Self::Updated),
            unknown => Err(DecodeError::UnknownSubject(unknown.to_owned())),
        }
    }
}

impl Publish for TicketEvent {
    fn subject(&self) -> &'static str {
        match self {
            Self::Created(_) => "ticket.created",
            Self::Updated(_) => "ticket.updated",
        }
    }

    fn encode(&self) -> String {
        encode_json(self.snapshot())
    }
}
