//! What a ticket is and what may happen to it. Rules only: nothing here does input or output.

use contracts::ticket::TicketSnapshot;
use contracts::{Id, Price};

/// A ticket, as it is in the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ticket {
    pub id: Id,
    pub title: String,
    pub price: Price,
    /// Who offers it.
    pub user_id: String,
    /// Counts saved changes, from 0.
    pub version: i64,
    /// The order that holds it.
    pub order_id: Option<Id>,
}

/// What an owner says about a ticket.
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
        Self { id: Id::generate(), title, price, user_id: user_id.to_owned(), version: 0, order_id: None }
    }

    /// Replaces what the owner says. That a ticket is reserved is told to everybody, so it comes first.
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

    /// The public state: what clients and readers of events see.
    pub fn snapshot(&self) -> TicketSnapshot {
        self.clone().into()
    }
}

impl From<Ticket> for TicketSnapshot {
    fn from(ticket: Ticket) -> Self {
        let Ticket { id, title, price, user_id, version, order_id } = ticket;
        Self { id, version, title, price, user_id, order_id }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    fn draft(title: &str, price: &str) -> Draft {
        Draft { title: title.to_owned(), price: price.parse().unwrap() }
    }

    #[test]
    fn an_edit_replaces_title_and_price_and_is_the_next_version() {
        let mut ticket = Ticket::new("ann", draft("Concert", "20"));
        ticket.edit("ann", draft("Opera", "30.5")).unwrap();
        assert_eq!((ticket.title.as_str(), ticket.price.to_string().as_str()), ("Opera", "30.5"));
        assert_eq!((ticket.user_id.as_str(), ticket.version), ("ann", 1));
    }

    #[test]
    fn an_edit_that_changes_nothing_is_a_version_too() {
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
}
