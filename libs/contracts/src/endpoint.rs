//! Requests between the services, over NATS request/reply.

use crate::Id;
use crate::ticket::TicketSnapshot;
use event_bus_core::Endpoint;

/// Requests the current state of a ticket: at least as new as its events so far.
pub const SHOW_TICKET: Endpoint<Id, TicketSnapshot> =
    Endpoint::new("tickets", "show", "The ticket of an id, as it is now");
