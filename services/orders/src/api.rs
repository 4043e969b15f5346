//! The HTTP API of orders. A handler parses and checks the request, applies the rules, stores, and responds.

use crate::meters::meters;
use crate::order::{CancelError, Order, Reserved};
use crate::store::{FindOffers, InsertOrders, NewOrder};
use crate::{replica, store};
use axum::extract::rejection::PathRejection;
use axum::extract::{FromRef, Path, State};
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::get;
use axum::{Json, Router};
use bootstrap::{ApiError, Caller, Field, FieldError, JsonBody, Keys, List};
use contracts::Id;
use contracts::endpoint::SHOW_TICKET;
use event_bus::{Batcher, Bus};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::timeout;

/// The state of every handler.
#[derive(Clone, FromRef)]
pub struct App {
    pub bus: Bus,
    pub keys: Keys,
    pub offers: Batcher<FindOffers>,
    pub inserts: Batcher<InsertOrders>,
}

/// The routes under `/api/orders`.
pub fn routes(app: App) -> Router {
    Router::new()
        .route("/api/orders", get(list_orders).post(create_order))
        .route("/api/orders/{id}", get(show_order).delete(cancel_order))
        .with_state(app)
}

async fn list_orders(
    State(bus): State<Bus>,
    caller: Caller,
    list: Result<List, ApiError>,
) -> Result<Response, ApiError> {
    let user: Arc<str> = caller.user()?.id.as_str().into();
    list?
        .answer(move |part| {
            let (bus, user) = (bus.clone(), user.clone());
            async move { Ok(store::list(&mut *bus.connection().await?, &user, part).await?) }
        })
        .await
}

async fn show_order(
    State(bus): State<Bus>,
    caller: Caller,
    id: Result<Path<Id>, PathRejection>,
) -> Result<Json<Order>, ApiError> {
    let user = caller.user()?;
    let Path(id) = id?;
    let mut db = bus.connection().await?;
    let order = store::find(&mut db, id).await?.ok_or(ApiError::NotFound)?;
    if order.user_id != user.id {
        return Err(ApiError::NotAuthorized);
    }
    Ok(Json(order))
}

/// Orders that are being made at once: each holds the title of its ticket, which may have 100 kB.
static BEING_MADE: Semaphore = Semaphore::const_new(256);
/// How long a request waits to be one of them, as for a connection.
const PATIENCE: Duration = Duration::from_secs(2);

async fn create_order(
    State(bus): State<Bus>,
    State(offers): State<Batcher<FindOffers>>,
    State(inserts): State<Batcher<InsertOrders>>,
    caller: Caller,
    body: JsonBody,
) -> Result<(StatusCode, Json<Order>), ApiError> {
    let user = caller.user()?;
    let ticket_id = ticket_id(body)?;
    let order = reserve(&bus, &offers, &inserts, &user.id, ticket_id).await;
    meters().reserved(&order);
    Ok((StatusCode::CREATED, Json(order?)))
}

async fn reserve(
    bus: &Bus,
    offers: &Batcher<FindOffers>,
    inserts: &Batcher<InsertOrders>,
    user_id: &str,
    ticket_id: Id,
) -> Result<Order, ApiError> {
    let permit = timeout(PATIENCE, BEING_MADE.acquire()).await;
    let Ok(Ok(_permit)) = permit else { return Err(ApiError::Unavailable) };
    let mut known = false;
    // A request that loses the race for a reservation tries again with what the winner wrote. Each round has a winner.
    loop {
        match offers.run(ticket_id).await? {
            Some(offer) => {
                let order = Order::new(user_id, offer)?;
                if inserts.run(NewOrder::new(&order)).await? {
                    return Ok(order);
                }
            }
            None if known => return Err(ApiError::NotFound),
            None => {
                learn(bus, ticket_id).await?;
                known = true;
            }
        }
    }
}

async fn cancel_order(
    State(bus): State<Bus>,
    caller: Caller,
    id: Result<Path<Id>, PathRejection>,
) -> Result<StatusCode, ApiError> {
    let user = caller.user()?;
    let Path(id) = id?;
    let mut db = bus.statement().await?;
    loop {
        let mut order = store::find(&mut db, id).await?.ok_or(ApiError::NotFound)?;
        let Some(cancelled) = order.cancel(&user.id)? else { break };
        if store::save(&mut db, &[cancelled]).await? == 1 {
            break;
        }
    }
    Ok(StatusCode::NO_CONTENT)
}

/// Requests a ticket that is not in the replica from tickets.
///
/// The event of a new ticket may not have arrived yet. Only tickets knows that a ticket does not exist: without a reply
/// the response is 503, not 404.
async fn learn(bus: &Bus, ticket_id: Id) -> Result<(), ApiError> {
    let ticket = bus.request(&SHOW_TICKET, &ticket_id).await.map_err(|error| {
        tracing::debug!(%ticket_id, error = format!("{error:#}"), "cannot request a ticket from tickets");
        ApiError::Unavailable
    })?;
    let ticket = ticket.ok_or(ApiError::NotFound)?;
    let mut db = bus.connection().await?;
    replica::update(&mut db, std::iter::once(&ticket)).await?;
    Ok(())
}

/// Reads the id of the ticket from a body. An object or an array is a bad request.
///
/// Takes the body by value: it needs a multiple of its bytes in memory, so the handler must not hold it while it waits.
#[expect(clippy::needless_pass_by_value, reason = "it is dropped here")]
fn ticket_id(body: JsonBody) -> Result<Id, ApiError> {
    let (empty, id) = match body.field("ticketId") {
        Field::Missing | Field::Null => (true, None),
        Field::Text(text) => (text.is_empty(), text.parse().ok()),
        Field::Number(_) | Field::Bool(_) | Field::Unreadable => (false, None),
        Field::Other => return Err(ApiError::BadRequest),
    };
    id.ok_or_else(|| {
        let broken = empty.then_some("Invalid value").into_iter().chain(["TicketId must be provided"]);
        ApiError::Invalid(broken.map(|message| FieldError { message, field: "ticketId" }).collect())
    })
}

impl From<Reserved> for ApiError {
    fn from(_: Reserved) -> Self {
        Self::Refused("Ticket is already reserved")
    }
}

impl From<CancelError> for ApiError {
    fn from(error: CancelError) -> Self {
        match error {
            CancelError::NotTheOwner => Self::NotAuthorized,
            CancelError::Complete => Self::Refused("Cannot cancel a complete order"),
        }
    }
}
