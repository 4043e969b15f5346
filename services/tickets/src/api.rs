//! The HTTP API of tickets. A handler parses and checks the request, applies the rules, stores, and responds.

use crate::store::{self, FindTickets, InsertTickets, ListTickets, SaveTickets, Version};
use crate::ticket::{Draft, EditError, Ticket};
use axum::extract::rejection::PathRejection;
use axum::extract::{FromRef, Path, State};
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::get;
use axum::{Json, Router};
use bootstrap::{ApiError, Caller, Field, FieldError, JsonBody, Keys, List};
use contracts::ticket::TicketSnapshot;
use contracts::{Id, Price};
use event_bus::{Batcher, Connection};

/// The state of every handler.
#[derive(Clone, FromRef)]
pub struct App {
    pub keys: Keys,
    pub finds: Batcher<FindTickets>,
    pub lists: Batcher<ListTickets>,
    pub inserts: Batcher<InsertTickets>,
    pub saves: Batcher<SaveTickets>,
}

/// The routes under `/api/tickets`.
pub fn routes(app: App) -> Router {
    Router::new()
        .route("/api/tickets", get(list_tickets).post(create_ticket))
        .route("/api/tickets/{id}", get(show_ticket).put(edit_ticket))
        .with_state(app)
}

async fn list_tickets(State(lists): State<Batcher<ListTickets>>, list: List) -> Result<Response, ApiError> {
    list.answer(move |part| {
        let lists = lists.clone();
        async move { Ok(lists.run(part).await?) }
    })
    .await
}

async fn show_ticket(
    State(finds): State<Batcher<FindTickets>>,
    Path(id): Path<Id>,
) -> Result<Json<TicketSnapshot>, ApiError> {
    let ticket = finds.run(id).await?.ok_or(ApiError::NotFound)?;
    Ok(Json(ticket.into()))
}

async fn create_ticket(
    State(inserts): State<Batcher<InsertTickets>>,
    caller: Caller,
    body: JsonBody,
) -> Result<(StatusCode, Json<TicketSnapshot>), ApiError> {
    let user = caller.user()?;
    let draft = draft(body, "Price must be greater than 0")?;
    let ticket = Ticket::new(&user.id, draft);
    inserts.run(Version::new(ticket.clone())).await?;
    Ok((StatusCode::CREATED, Json(ticket.into())))
}

async fn edit_ticket(
    State(finds): State<Batcher<FindTickets>>,
    State(saves): State<Batcher<SaveTickets>>,
    caller: Caller,
    id: Result<Path<Id>, PathRejection>,
    body: JsonBody,
) -> Result<Json<TicketSnapshot>, ApiError> {
    let user = caller.user()?;
    let draft = draft(body, "Price must be provided and must be greater than 0")?;
    let Path(id) = id?;
    // A request that loses the race for a version tries again with what the winner wrote. Each round has a winner.
    loop {
        let mut ticket = finds.run(id).await?.ok_or(ApiError::NotFound)?;
        ticket.edit(&user.id, draft.clone())?;
        if saves.run(Version::new(ticket.clone())).await? {
            return Ok(Json(ticket.into()));
        }
    }
}

/// Replies to another service with the current state of a ticket, reserved or not.
pub async fn reply(mut db: Connection, id: Id) -> anyhow::Result<Option<TicketSnapshot>> {
    Ok(store::find(&mut db, &[id]).await?.remove(&id).map(Into::into))
}

/// Reads title and price from a body, and checks them in this order.
///
/// A broken rule comes first. If no rule is broken, a value of the wrong type, or one that cannot be stored, is a bad
/// request.
///
/// Takes the body by value: it needs a multiple of its bytes in memory, so the handler must not hold it while it waits.
#[expect(clippy::needless_pass_by_value, reason = "it is dropped here")]
fn draft(body: JsonBody, price_message: &'static str) -> Result<Draft, ApiError> {
    let title = match body.field("title") {
        Field::Text(text) => Some(text),
        Field::Number(text) => Some(text.to_owned()),
        Field::Bool(flag) => Some(flag.to_string()),
        Field::Missing | Field::Null => Some(String::new()),
        Field::Other | Field::Unreadable => None,
    };
    let price: Option<Price> = match body.field("price") {
        Field::Number(text) => text.parse().ok(),
        Field::Text(text) => text.parse().ok(),
        _ => None,
    };
    let mut broken = Vec::new();
    if title.as_deref() == Some("") {
        broken.push(FieldError { message: "Title is required", field: "title" });
    }
    if price.is_none() {
        broken.push(FieldError { message: price_message, field: "price" });
    }
    match (title, price) {
        (Some(title), Some(price)) if broken.is_empty() && !title.contains('\0') => Ok(Draft { title, price }),
        _ if broken.is_empty() => Err(ApiError::BadRequest),
        _ => Err(ApiError::Invalid(broken)),
    }
}

impl From<EditError> for ApiError {
    fn from(error: EditError) -> Self {
        match error {
            EditError::Reserved => Self::Refused("Cannot edit a reserved ticket"),
            EditError::NotTheOwner => Self::NotAuthorized,
        }
    }
}
