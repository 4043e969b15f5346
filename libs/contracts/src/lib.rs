//! The language the services share: ids, prices, points in time and events.
//!
//! Data only: nothing here does input or output, and nothing knows Postgres, NATS or HTTP. A change of anything that
//! goes over the wire shows as a diff of a file in `golden/`; older files still decode.
//!
//! Read [`event`] first: it says what an event is. Then [`ticket`], [`order`] and [`neighbours`], one enum per stream,
//! [`endpoint`], what services ask each other, and the values all of it is made of: [`Id`], [`Price`], [`Timestamp`].
#![warn(missing_docs)]

pub mod endpoint;
pub mod event;
mod id;
pub mod neighbours;
pub mod order;
mod price;
pub mod ticket;
mod timestamp;

pub use endpoint::Endpoint;
pub use event::{DecodeError, Event, Publish};
pub use id::{Id, MalformedId};
pub use neighbours::{ExpirationEvent, PaymentEvent};
pub use order::{OrderChange, OrderEvent};
pub use price::{InvalidPrice, Price};
pub use ticket::TicketEvent;
pub use timestamp::Timestamp;
