//! The rules of tickets. This module does no input or output.

use contracts::ticket::TicketSnapshot;
use contracts::{Id, OrderChange, Price, TicketEvent};

/// A ticket as the table stores it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ticket {
    pub id: Id,
    pub title: String,
    pub price: Price,
    /// The user who offers it.
    pub user_id: String,
    /// Counts saved changes, from 0.
    pub version: i64,
    /// The order that holds it.
    pub order_id: Option<Id>,
    /// The token of the newest event of its orders that was applied.
    pub fencing_token: FencingToken,
}

/// A fencing token: the reservation number of an order, and the version of that order.
///
/// Only an event with a greater token changes the ticket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct FencingToken {
    pub reservation: i64,
    pub order_version: i64,
}

impl FencingToken {
    /// Less than the token of any event.
    pub const NONE: Self = Self { reservation: 0, order_version: -1 };

    /// The token of an event.
    fn of(order: &OrderChange) -> Self {
        Self { reservation: order.ticket.reservation, order_version: order.version }
    }
}

/// Title and price, as the owner sets them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Draft {
    pub title: String,
    pub price: Price,
}

/// Why a ticket cannot be edited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EditError {
    #[error("Cannot edit a reserved ticket")]
    Reserved,
    #[error("only its owner may edit a ticket")]
    NotTheOwner,
}

impl Ticket {
    /// A new ticket of `user_id`.
    pub fn new(user_id: &str, draft: Draft) -> Self {
        let Draft { title, price } = draft;
        let (id, user_id) = (Id::generate(), user_id.to_owned());
        Self { id, title, price, user_id, version: 0, order_id: None, fencing_token: FencingToken::NONE }
    }

    /// Replaces title and price.
    ///
    /// The reservation is checked before the owner, because every user may see it.
    pub fn edit(&mut self, user_id: &str, draft: Draft) -> Result<(), EditError> {
        if self.order_id.is_some() {
            return Err(EditError::Reserved);
        }
        if self.user_id != user_id {
            return Err(EditError::NotTheOwner);
        }
        self.title = draft.title;
        self.price = draft.price;
        self.version += 1;
        Ok(())
    }

    /// Applies an event of one of its orders. Returns true if the holder changed; the version is then incremented.
    ///
    /// A live order holds the ticket; a cancelled order releases it. An event of an older order changes nothing: a
    /// newer order exists only because the older one was cancelled. The newest event changes the ticket if its holder was
    /// overwritten since, as in a database that is recovered.
    pub fn follow(&mut self, order: &OrderChange) -> bool {
        let token = FencingToken::of(order);
        if token < self.fencing_token {
            return false;
        }
        self.fencing_token = token;
        let holder = order.holds_ticket.then_some(order.id);
        if holder == self.order_id {
            return false;
        }
        self.order_id = holder;
        self.version += 1;
        true
    }

    /// Whether this event of an order, or one that makes it obsolete, was followed before.
    pub fn has_applied(&self, order: &OrderChange) -> bool {
        FencingToken::of(order) <= self.fencing_token
    }

    /// The event that announces this version, and no other one: `ticket.created` for the first version.
    pub fn announcement(&self) -> TicketEvent {
        let snapshot = self.snapshot();
        if self.version == 0 { TicketEvent::Created(snapshot) } else { TicketEvent::Updated(snapshot) }
    }

    /// The public state, which responses and events contain.
    pub fn snapshot(&self) -> TicketSnapshot {
        self.clone().into()
    }
}

impl From<Ticket> for TicketSnapshot {
    fn from(ticket: Ticket) -> Self {
        let Ticket { id, title, price, user_id, version, order_id, fencing_token: _ } = ticket;
        Self { id, version, title, price, user_id, order_id }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;
    use event_bus::Event;
    use serde_json::json;

    fn draft(title: &str, price: &str) -> Draft {
        Draft { title: title.to_owned(), price: price.parse().unwrap() }
    }

    #[test]
    fn an_edit_replaces_title_and_price_and_increments_the_version() {
        let mut ticket = Ticket::new("ann", draft("Concert", "20"));
        ticket.edit("ann", draft("Opera", "30.5")).unwrap();
        assert_eq!((ticket.title.as_str(), ticket.price.to_string().as_str()), ("Opera", "30.5"));
        assert_eq!((ticket.user_id.as_str(), ticket.version), ("ann", 1));
    }

    #[test]
    fn an_edit_without_changes_increments_the_version() {
        let mut ticket = Ticket::new("ann", draft("Concert", "20"));
        ticket.edit("ann", draft("Concert", "20")).unwrap();
        assert_eq!(ticket.version, 1);
    }

    #[test]
    fn a_refused_edit_changes_nothing() {
        let mut ticket = Ticket::new("ann", draft("Concert", "20"));
        let before = ticket.clone();
        assert_eq!(ticket.edit("bob", draft("Mine", "1")), Err(EditError::NotTheOwner));
        assert_eq!(ticket, before);

        ticket.order_id = Some(Id::generate());
        let reserved = ticket.clone();
        assert_eq!(ticket.edit("ann", draft("Opera", "1")), Err(EditError::Reserved));
        assert_eq!(ticket.edit("bob", draft("Opera", "1")), Err(EditError::Reserved));
        assert_eq!(ticket, reserved);
    }

    fn order(subject: &str, id: Id, reservation: i64, version: i64) -> OrderChange {
        let ticket = json!({"id": Id::generate(), "reservation": reservation});
        let order = json!({"id": id, "version": version, "ticket": ticket});
        OrderChange::decode(subject, order.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn the_newest_event_restores_a_holder_that_was_overwritten() {
        let id = Id::generate();
        let (made, given_up) = (order("order.created", id, 1, 0), order("order.cancelled", id, 1, 1));
        let mut ticket = Ticket::new("ann", draft("Concert", "20"));
        ticket.follow(&given_up);
        (ticket.order_id, ticket.version) = (Some(id), 40);
        assert!(!ticket.follow(&made) && ticket.follow(&given_up) && !ticket.follow(&given_up));
        assert_eq!((ticket.order_id, ticket.version), (None, 41));
    }

    #[test]
    fn each_change_of_holder_increments_the_version_in_any_event_order() {
        let (first, second) = (Id::generate(), Id::generate());
        let (made, given_up) = (order("order.created", first, 1, 0), order("order.cancelled", first, 1, 1));
        let (made_again, paid) = (order("order.created", second, 2, 0), order("order.completed", second, 2, 1));
        for (news, holder, version) in [
            (vec![&made], Some(first), 1),
            (vec![&made, &made], Some(first), 1),
            (vec![&made, &given_up], None, 2),
            (vec![&given_up, &made], None, 0),
            (vec![&made, &given_up, &made], None, 2),
            (vec![&made, &given_up, &made_again], Some(second), 3),
            (vec![&made, &made_again, &given_up], Some(second), 2),
            (vec![&made_again, &made, &given_up], Some(second), 1),
            (vec![&made_again, &paid, &made_again, &given_up], Some(second), 1),
            (vec![&paid, &made_again], Some(second), 1),
        ] {
            let mut ticket = Ticket::new("ann", draft("Concert", "20"));
            let changes = news.iter().filter(|order| ticket.follow(order)).count();
            assert_eq!((ticket.order_id, ticket.version), (holder, version), "{news:?}");
            assert_eq!(i64::try_from(changes).unwrap(), version, "{news:?}");
        }
    }
}
