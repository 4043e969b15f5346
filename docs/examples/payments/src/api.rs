//! The HTTP API of payments.

use crate::charge::{Charge, Request};
use axum::extract::{FromRef, Path, State, rejection::PathRejection};
use axum::{Json, Router, http::StatusCode, routing};
use bootstrap::{ApiError, Caller, Field, FieldError, JsonBody, Keys};
use contracts::Id;
use event_bus::{Bus, Transaction};
use serde_json::{Value, json};
use std::time::Duration;

#[derive(Clone, FromRef)]
pub struct App {
    pub bus: Bus,
    pub keys: Keys,
}

pub fn routes(app: App) -> Router {
    let payments = Router::new().route("/api/payments", routing::post(create_payment));
    payments.route("/api/payments/{id}", routing::get(show_payment)).with_state(app)
}

/// A 201 means that the task to charge the card is committed. The payment is `pending` until the provider has decided.
async fn create_payment(
    State(bus): State<Bus>,
    caller: Caller,
    body: JsonBody,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let user = caller.user()?;
    let (order_id, token) = order_and_token(&body)?;
    let mut tx = bus.begin().await?;
    let scheduled = schedule(&mut tx, &user.id, order_id, token).await;
    let id = tx.end(scheduled).await?;
    Ok((StatusCode::CREATED, Json(json!({"id": id, "orderId": order_id, "status": "pending"}))))
}

/// The payment, and the task to charge it.
async fn schedule(tx: &mut Transaction, user: &str, order_id: Id, token: String) -> Result<Id, ApiError> {
    let order = sqlx::query!("select user_id, status, price from order_replica where id = $1", order_id.to_string());
    let order = order.fetch_optional(&mut **tx).await?.ok_or(ApiError::NotFound)?;
    if order.user_id != user {
        return Err(ApiError::NotAuthorized);
    }
    match order.status.as_str() {
        "cancelled" => return Err(ApiError::Refused("Cannot pay for a cancelled order")),
        "complete" => return Err(ApiError::Refused("Order is already paid")),
        _ => {}
    }
    let payment = Id::generate();
    let number = sqlx::query_scalar!(
        "insert into payments (id, order_id, user_id, number)
         select $1, $2, $3, count(*) from payments where order_id = $2
         on conflict do nothing returning number",
        payment.to_string(),
        order_id.to_string(),
        user,
    );
    let number = number.fetch_optional(&mut **tx).await?.ok_or(ApiError::Refused("Order is already being paid"))?;
    let request =
        Request { payment, order: order_id, price: order.price.try_into().map_err(anyhow::Error::new)?, token };
    // A declined payment has charged nothing, so the next one of the order has a key of its own.
    tx.schedule::<Charge>(&format!("{order_id}-{number}"), &request, Duration::ZERO).await?;
    Ok(payment)
}

async fn show_payment(
    State(bus): State<Bus>,
    caller: Caller,
    id: Result<Path<Id>, PathRejection>,
) -> Result<Json<Value>, ApiError> {
    let (user, Path(id)) = (caller.user()?, id?);
    let payment = sqlx::query!("select order_id, user_id, status from payments where id = $1", id.to_string());
    let row = payment.fetch_optional(&mut *bus.connection().await?).await?.ok_or(ApiError::NotFound)?;
    if row.user_id != user.id {
        return Err(ApiError::NotAuthorized);
    }
    Ok(Json(json!({"id": id, "orderId": row.order_id, "status": row.status})))
}

fn order_and_token(body: &JsonBody) -> Result<(Id, String), ApiError> {
    let text = |name| match body.field(name) {
        Field::Text(text) if !text.is_empty() && !text.contains('\0') => Some(text),
        _ => None,
    };
    let missing = |field, message| ApiError::Invalid(vec![FieldError { field, message }]);
    let token = text("token").ok_or(missing("token", "Token must be provided"))?;
    let order_id = text("orderId").and_then(|id| id.parse().ok());
    Ok((order_id.ok_or(missing("orderId", "OrderId must be provided"))?, token))
}
