//! `/healthz`: the process lives. `/readyz`: it can serve. Neither takes a place among the requests nor is it logged,
//! so both answer under overload.

use axum::Json;
use axum::http::{Method, Uri};
use axum::response::{IntoResponse as _, Response};
use event_bus::Bus;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::error::ApiError;

pub(crate) struct Health {
    /// Asked for Postgres only: no handler needs NATS.
    pub(crate) bus: Bus,
    /// Once cancelled, we are not ready: new requests are better sent elsewhere.
    pub(crate) stop: CancellationToken,
}

impl Health {
    /// The answer, if the request is a question about health.
    pub(crate) async fn answer(&self, method: &Method, uri: &Uri) -> Option<Response> {
        if method != Method::GET && method != Method::HEAD {
            return None;
        }
        match uri.path() {
            "/healthz" => Some(ok()),
            "/readyz" if !self.stop.is_cancelled() && self.bus.is_ready().await => Some(ok()),
            "/readyz" => Some(ApiError::Unavailable.into_response()),
            _ => None,
        }
    }
}

fn ok() -> Response {
    Json(json!({ "status": "ok" })).into_response()
}
