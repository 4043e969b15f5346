//! The events that the services share, and their values: ids, prices and timestamps.
//!
//! Data only: this crate does no input or output, and depends on neither Postgres nor NATS nor HTTP. A change of a format on
//! the wire is a diff of a file in `golden/`; older files still decode.
//!
//! `event-bus-core` defines what an event is. Read [`ticket`], [`order`] and [`neighbours`], one enum per stream; then
//! [`endpoint`], the requests between the services; then the values [`Id`], [`Price`] and [`Timestamp`].
#![warn(missing_docs)]

pub mod endpoint;
mod id;
pub mod neighbours;
pub mod order;
mod price;
pub mod ticket;
mod timestamp;

pub use id::{Id, MalformedId};
pub use neighbours::{ExpirationEvent, PaymentEvent};
pub use order::{OrderChange, OrderEvent};
pub use price::{InvalidPrice, Price};
pub use ticket::TicketEvent;
pub use timestamp::Timestamp;
