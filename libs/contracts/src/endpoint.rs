//! Requests between the services, over NATS request/reply.

use crate::Id;
use crate::ticket::TicketSnapshot;
use event_bus_core::Endpoint;

/// A ticket as it is at this moment: newer than, or as new as, what its events have said so far.
pub const SHOW_TICKET: Endpoint<Id, TicketSnapshot> =
    Endpoint::new("tickets", "show", "The ticket of an id, as it is now");
