//! HTTP for every service: the layers around its routes, health checks, and a server with a graceful shutdown.
//!
//! A service hands over a plain [`axum::Router`]; axum's own extractors (`Path`, `Query`, …) may be used as they are:
//! - Any answer from 400 on that has no JSON body – a rejection of axum's, for example – is given the error body.
//! - Unknown routes and unknown methods are 404. One trailing slash is tolerated, as by Express.
//! - Every handler runs on its own task: a client that hangs up cancels nothing, so a transaction is never dropped
//!   half-way. Only a handler that takes longer than the request timeout is ended; its client is answered 503.
//! - A panic is answered 500 and logged, and ends nothing else.
//! - More than `max_requests` handlers at once: 503 at once, without waiting.
//! - Slow clients hold a bounded number of connections, bytes of request bodies, and pages of lists. At a limit, the client
//!   that has been idle longest is disconnected.
//! - `x-request-id` is kept or generated. It is in every log line of the request and in the response.
//!
//! hyper itself responds to what it cannot parse as HTTP (400, 414, 431), without a body.

mod bodies;
mod connections;
mod health;
mod middleware;
mod pages;
mod patient;
mod server;

pub(crate) use bodies::{Bodies, Charge, Receiving};
pub(crate) use connections::Connection;
pub(crate) use health::Health;
pub(crate) use middleware::{Limits, Middleware};
pub(crate) use server::{listen, serve};
