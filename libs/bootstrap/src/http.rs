//! HTTP for every service: the layers around its routes, health checks, and a server with a graceful shutdown.
//!
//! A service passes a plain [`axum::Router`]; the extractors of axum (`Path`, `Query`, …) work unchanged:
//! - Any response from 400 on without a JSON body, for example a rejection of axum, gets the error body.
//! - Unknown routes and unknown methods are 404. One trailing slash is tolerated, as by Express.
//! - Every handler runs on its own task: a client that hangs up cancels nothing, so a transaction is never dropped
//!   halfway. Only a handler that exceeds the request timeout is aborted; the response is a 503.
//! - A panic is a 500 and is logged. It ends nothing else.
//! - A request beyond `max_requests` concurrent handlers is a 503 at once.
//! - Slow clients hold a bounded number of connections, bytes of request bodies, and pages of lists. At a limit, the client
//!   that has been idle longest is disconnected.
//! - `x-request-id` is kept or generated. It is in every log line of the request and in the response.
//! - Every request is measured, also one that is refused: see `measure`.
//!
//! hyper itself responds to what it cannot parse as HTTP (400, 414, 431), without a body.

mod bodies;
mod connections;
mod health;
mod measure;
mod middleware;
mod pages;
mod patient;
mod server;

pub(crate) use bodies::{Bodies, Charge, Receiving};
pub(crate) use connections::Connection;
pub(crate) use health::Health;
pub(crate) use middleware::{Limits, Middleware};
pub(crate) use server::{listen, serve};
