//! The language the services share: ids, prices, points in time and events.
//!
//! Data only: nothing here does input or output, and nothing knows Postgres, NATS or HTTP. A change of anything that
//! goes over the wire shows as a diff of a file in `golden/`; older files still decode.
//!
//! What an event is says `event-bus-core`. Read [`ticket`], [`order`] and [`neighbours`], one enum per stream, then
//! [`endpoint`], the requests between the services, and the values all of it is made of: [`Id`], [`Price`],
//! [`Timestamp`].
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
