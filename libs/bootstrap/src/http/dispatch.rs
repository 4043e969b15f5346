//! What happens to a request before and after its handler.

use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::anyhow;
use axum::Router;
use axum::extract::Request;
use axum::http::uri::{PathAndQuery, Uri};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use event_bus::trace;
use futures::FutureExt as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::task::TaskTracker;
use tower::ServiceExt as _;
use tracing::{Instrument as _, Span, debug, error_span, field, warn};

use super::Health;
use crate::config::Config;
use crate::error::{ApiError, error_body};

const REQUEST_ID: &str = "x-request-id";

/// The service as the server sees it: a request goes in, an answer always comes out.
pub(crate) struct Dispatch {
    routes: Router,
    health: Health,
    /// One permit per running handler, held by the handler: one that outlives its request timeout still takes a place.
    places: Arc<Semaphore>,
    refused: AtomicU64,
    /// Handlers that run, with or without a client that waits for them.
    handlers: TaskTracker,
    request_timeout: Duration,
}

impl Dispatch {
    pub(crate) fn new(routes: Router, health: Health, config: &Config) -> Self {
        Self {
            // These two come last: they apply to the routes that are there.
            routes: routes.fallback(not_found).method_not_allowed_fallback(not_found),
            health,
            places: Arc::new(Semaphore::new(config.max_requests.get().min(Semaphore::MAX_PERMITS))),
            refused: AtomicU64::new(0),
            handlers: TaskTracker::new(),
            request_timeout: config.request_timeout,
        }
    }

    /// Answers one request.
    pub(crate) async fn answer(&self, mut request: Request) -> Response {
        let (method, uri) = (request.method().clone(), request.uri().clone());
        if let Some(answer) = self.health.answer(&method, &uri).await {
            return answer;
        }
        let id = request_id(request.headers());
        let mut response = match self.places.clone().try_acquire_owned() {
            Ok(place) => {
                if let Some(uri) = without_trailing_slash(request.uri()) {
                    *request.uri_mut() = uri;
                }
                self.run_handler(request, place, &id).await
            }
            Err(_) => self.refuse(),
        };
        response.headers_mut().insert(REQUEST_ID, id);
        if self.health.stop.is_cancelled() {
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }

    /// Returns when every handler has ended.
    pub(crate) async fn drained(&self) {
        self.handlers.close();
        self.handlers.wait().await;
    }

    async fn run_handler(&self, request: Request, place: OwnedSemaphorePermit, id: &HeaderValue) -> Response {
        let span = error_span!(
            "request",
            id = id.to_str().unwrap_or_default(),
            method = %request.method(),
            path = request.uri().path(),
            trace_id = field::Empty,
        );
        let handler = self.handlers.spawn(handle(self.routes.clone(), request, place).instrument(span.clone()));
        match tokio::time::timeout(self.request_timeout, handler).await {
            Ok(Ok(response)) => response,
            // Its panics are caught, so the task was cancelled: the runtime is going down.
            Ok(Err(_)) => ApiError::Unavailable.into_response(),
            Err(_) => {
                span.in_scope(|| warn!(after = ?self.request_timeout, "answered 503, the handler goes on"));
                ApiError::Unavailable.into_response()
            }
        }
    }

    /// An overload is logged ever more rarely: logging each refusal would add to it.
    fn refuse(&self) -> Response {
        let refused = self.refused.fetch_add(1, Ordering::Relaxed) + 1;
        if refused.is_power_of_two() {
            warn!(refused, "more requests at once than MAX_REQUESTS, refusing");
        }
        ApiError::Unavailable.into_response()
    }
}

async fn not_found() -> ApiError {
    ApiError::NotFound
}

async fn handle(routes: Router, request: Request, place: OwnedSemaphorePermit) -> Response {
    let started = Instant::now();
    let traceparent = request.headers().get("traceparent").and_then(|value| value.to_str().ok()).map(str::to_owned);
    let work = AssertUnwindSafe(traced(traceparent, routes.oneshot(request)));
    let response = match work.catch_unwind().await {
        Ok(Ok(response)) => with_error_body(response),
        Ok(Err(never)) => match never {},
        Err(panic) => ApiError::Internal(anyhow!("the handler panicked: {}", panic_message(&*panic))).into_response(),
    };
    drop(place);
    let (status, latency_us) = (response.status().as_u16(), started.elapsed().as_micros());
    if response.status().is_server_error() {
        warn!(status, latency_us, "answered");
    } else {
        debug!(status, latency_us, "answered");
    }
    response
}

/// Everything a request causes happens inside this future, so that the events it appends carry its trace context on.
async fn traced<T>(traceparent: Option<String>, work: impl Future<Output = T>) -> T {
    trace::scope(traceparent, async {
        if let Some(trace_id) = trace::current().as_deref().and_then(|valid| valid.get(3..35)) {
            Span::current().record("trace_id", trace_id);
        }
        work.await
    })
    .await
}

/// The words of a panic, as far as it has any.
pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

/// Rejections of axum's extractors are plain text; clients expect the error body.
fn with_error_body(response: Response) -> Response {
    let status = response.status();
    let failed = status.is_client_error() || status.is_server_error();
    if !failed || response.headers().get(header::CONTENT_TYPE).is_some_and(|value| value == "application/json") {
        return response;
    }
    match status {
        StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED => ApiError::NotFound.into_response(),
        StatusCode::PAYLOAD_TOO_LARGE => ApiError::TooLarge.into_response(),
        StatusCode::SERVICE_UNAVAILABLE => ApiError::Unavailable.into_response(),
        _ if status.is_server_error() => ApiError::Internal(anyhow!("a layer answered {status}")).into_response(),
        _ => error_body(status, "Something went wrong"),
    }
}

/// Express tolerates exactly one slash at the end of a path.
fn without_trailing_slash(uri: &Uri) -> Option<Uri> {
    let path = uri.path().strip_suffix('/').filter(|path| !path.is_empty())?;
    let path_and_query = uri.query().map_or_else(|| path.to_owned(), |query| format!("{path}?{query}"));
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = Some(PathAndQuery::try_from(path_and_query).ok()?);
    Uri::from_parts(parts).ok()
}

/// The caller's id if it is fit for a log line, else a new one.
fn request_id(headers: &HeaderMap) -> HeaderValue {
    let sane = |id: &&HeaderValue| (1..=128).contains(&id.len()) && id.as_bytes().iter().all(u8::is_ascii_graphic);
    headers.get(REQUEST_ID).filter(sane).cloned().unwrap_or_else(|| {
        HeaderValue::try_from(format!("{:032x}", rand::random::<u128>()))
            .expect("hexadecimal digits are a header value")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_trailing_slash_is_dropped() {
        let trimmed = |uri: &'static str| without_trailing_slash(&Uri::from_static(uri)).map(|uri| uri.to_string());
        assert_eq!(trimmed("/api/tickets/").as_deref(), Some("/api/tickets"));
        assert_eq!(trimmed("/api/tickets/?limit=1").as_deref(), Some("/api/tickets?limit=1"));
        assert_eq!(trimmed("/api/tickets//").as_deref(), Some("/api/tickets/"));
        assert_eq!(trimmed("http://host/api/").as_deref(), Some("http://host/api"));
        for untouched in ["/", "/api", "/?a=/", "*"] {
            assert_eq!(trimmed(untouched), None, "{untouched}");
        }
    }
}
