//! What services ask each other, over NATS request/reply.

use crate::Id;
use crate::ticket::TicketSnapshot;
use std::marker::PhantomData;

/// A question `Q` that every replica of a service can answer with an `A`, or with "there is none". Both are JSON.
#[derive(Debug)]
pub struct Endpoint<Q, A> {
    /// The service that answers, one word.
    pub service: &'static str,
    /// What is asked, one word.
    pub name: &'static str,
    /// For people who look at the service with NATS' own tools.
    pub description: &'static str,
    types: PhantomData<fn(Q) -> A>,
}

/// What a ticket is at this moment: newer than, or as new as, what its events have said so far.
pub const SHOW_TICKET: Endpoint<Id, TicketSnapshot> =
    Endpoint::new("tickets", "show", "The ticket of an id, as it is now");

impl<Q, A> Endpoint<Q, A> {
    const fn new(service: &'static str, name: &'static str, description: &'static str) -> Self {
        Self { service, name, description, types: PhantomData }
    }

    /// The NATS subject: `<service>.<name>`.
    pub fn subject(&self) -> String {
        format!("{}.{}", self.service, self.name)
    }
}
