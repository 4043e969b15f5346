//! The one HTTP error: every cause of a failure, with the status and the message of its response.

use axum::Json;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use event_bus::is_outage;
use serde::Serialize;
use tracing::{error, warn};

use crate::telemetry::Throttle;

/// The reason for a response that is not 2xx. The display text is the message for the client.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// 401: not signed in, or not the owner.
    #[error("Not authorized")]
    NotAuthorized,
    /// 404: unknown id, route or method.
    #[error("Not Found")]
    NotFound,
    /// 400: malformed JSON, malformed id, a value of the wrong type.
    #[error("Something went wrong")]
    BadRequest,
    /// 400: a rule of the domain forbids it; the message says which.
    #[error("{0}")]
    Refused(&'static str),
    /// 400: fields that break validation rules, one entry per broken rule, in rule order.
    #[error("Invalid fields")]
    Invalid(Vec<FieldError>),
    /// 408: the body did not arrive in time.
    #[error("The request body took too long to arrive")]
    TooSlow,
    /// 413: the body exceeds [`crate::body::LIMIT`].
    #[error("The request body is larger than 100 kB")]
    TooLarge,
    /// 503 with `Retry-After`: Postgres unreachable, overload, timeout, stopping. Whether a write was committed is unknown.
    #[error("The service is temporarily unavailable, please try again")]
    Unavailable,
    /// 503 with `Retry-After`, only for the readiness check: the database is being recovered; the message says how far.
    #[error("{0}")]
    Recovering(String),
    /// 500: a bug. The cause is logged when the response is made, and is never shown to the client.
    #[error("Something went wrong")]
    Internal(anyhow::Error),
}

/// One broken validation rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct FieldError {
    /// The message for the client.
    pub message: &'static str,
    /// The field of the body.
    pub field: &'static str,
}

impl ApiError {
    /// The status of its response.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::NotAuthorized => StatusCode::UNAUTHORIZED,
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::BadRequest | Self::Refused(_) | Self::Invalid(_) => StatusCode::BAD_REQUEST,
            Self::TooSlow => StatusCode::REQUEST_TIMEOUT,
            Self::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Unavailable | Self::Recovering(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        if let Self::Internal(cause) = &self {
            error!(error = format!("{cause:#}"), "request failed");
        }
        let status = self.status();
        let mut response = match &self {
            Self::Invalid(fields) => (status, Json(Errors { errors: fields.as_slice() })).into_response(),
            _ => error_body(status, &self.to_string()),
        };
        if status == StatusCode::SERVICE_UNAVAILABLE {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        if matches!(self, Self::TooSlow | Self::TooLarge) {
            // The rest of the body may still arrive, and must not be read as the next request.
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

/// A response with one error entry.
pub(crate) fn error_body(status: StatusCode, message: &str) -> Response {
    (status, Json(Errors { errors: &[Message { message }] })).into_response()
}

#[derive(Serialize)]
struct Errors<'a, E> {
    errors: &'a [E],
}

#[derive(Serialize)]
struct Message<'a> {
    message: &'a str,
}

/// A malformed id in a path is a bad request.
impl From<PathRejection> for ApiError {
    fn from(_: PathRejection) -> Self {
        Self::BadRequest
    }
}

/// A malformed query is a bad request.
impl From<QueryRejection> for ApiError {
    fn from(_: QueryRejection) -> Self {
        Self::BadRequest
    }
}

impl From<event_bus::Error> for ApiError {
    fn from(cause: event_bus::Error) -> Self {
        anyhow::Error::from(cause).into()
    }
}

impl From<sqlx::Error> for ApiError {
    fn from(cause: sqlx::Error) -> Self {
        anyhow::Error::from(cause).into()
    }
}

/// An outage of Postgres is recognized under any context.
impl From<anyhow::Error> for ApiError {
    fn from(cause: anyhow::Error) -> Self {
        if is_outage(&cause) { unavailable(&cause) } else { Self::Internal(cause) }
    }
}

/// Logs an outage when it begins and once a minute while it continues, not for every request.
fn unavailable(cause: &anyhow::Error) -> ApiError {
    static LOG: Throttle = Throttle::new();
    if let Some(unlogged) = LOG.pass() {
        warn!(error = format!("{cause:#}"), unlogged, "Postgres is unavailable");
    }
    ApiError::Unavailable
}
