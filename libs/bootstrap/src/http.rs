//! HTTP as every service speaks it: the door all requests come through, health, and the server that is stopped gently.
//!
//! A service hands over a plain [`axum::Router`]; axum's own extractors (`Path`, `Query`, …) may be used as they are:
//! - Any answer from 400 on that has no JSON body – a rejection of axum's, for example – is given the error body.
//! - Unknown routes and unknown methods are 404. One trailing slash is tolerated, as by Express.
//! - Every handler runs on its own task: a client that hangs up cancels nothing, so a transaction is never dropped
//!   half-way. Only a handler that takes longer than the request timeout is ended; its client is answered 503.
//! - A panic is answered 500 and logged, and ends nothing else.
//! - More than `max_requests` handlers at once: 503 at once, without waiting.
//! - What slow clients can hold is bounded: the connections, the bytes of request bodies, the pages of lists. The client
//!   that has done nothing for longest makes room for others.
//! - `x-request-id` is taken over or made up, is in every log line of the request, and returned.
//!
//! What hyper cannot parse as HTTP at all (400, 414, 431) it answers itself, with no body.

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
