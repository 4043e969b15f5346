//! `/healthz`: liveness. `/readyz`: readiness. `/metrics`: metrics, in the text format of Prometheus.
//!
//! None of them takes a concurrency permit or is logged, so they respond under overload.

use axum::extract::State;
use axum::http::{HeaderName, header};
use axum::routing::get;
use axum::{Json, Router};
use event_bus::Bus;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::error::ApiError;
use crate::telemetry;

#[derive(Clone)]
pub(crate) struct Health {
    /// For the readiness of Postgres. NATS is not checked, because no handler needs it.
    pub(crate) bus: Bus,
    /// Once cancelled, the service is not ready: new requests go to other replicas.
    pub(crate) stop: CancellationToken,
}

impl Health {
    pub(crate) fn routes(self) -> Router {
        Router::new()
            .route("/healthz", get(live))
            .route("/readyz", get(ready))
            .route("/metrics", get(metrics))
            .method_not_allowed_fallback(async || ApiError::NotFound)
            .with_state(self)
    }
}

async fn live() -> Json<Value> {
    Json(json!({ "status": "ok" }))
}

/// While the database is being recovered, the message is the progress.
async fn ready(State(health): State<Health>) -> Result<Json<Value>, ApiError> {
    if health.stop.is_cancelled() {
        return Err(ApiError::Unavailable);
    }
    match health.bus.check_ready().await {
        Ok(()) => Ok(live().await),
        Err(error @ event_bus::Error::Recovering(_)) => Err(ApiError::Recovering(error.to_string())),
        Err(_) => Err(ApiError::Unavailable),
    }
}

/// Needs neither Postgres nor NATS: what is stored there is measured in the background.
async fn metrics(State(health): State<Health>) -> ([(HeaderName, &'static str); 1], String) {
    health.bus.observe();
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], telemetry::render())
}
