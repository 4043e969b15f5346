//! The layers around the handlers: those of tower and axum, and a few of our own.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::anyhow;
use axum::Router;
use axum::body::HttpBody as _;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode, Uri, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse as _, Response};
use event_bus::trace;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::task::TaskTracker;
use tower::ServiceBuilder;
use tower::layer::layer_fn;
use tower_http::LatencyUnit::Micros;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::classify::ServerErrorsFailureClass as Failure;
use tower_http::request_id::PropagateRequestIdLayer;
use tower_http::timeout::TimeoutLayer;
use tower_http::trace::{DefaultOnResponse, TraceLayer};
use tracing::{Instrument as _, Span, error_span, field, warn};

use super::Health;
use super::bodies::{Bodies, Charge};
use super::connections::{Connection, Connections};
use super::measure::{Measure, Requests, remember_route};
use super::pages::Pages;
use crate::body;
use crate::config::Config;
use crate::error::{ApiError, error_body};
use crate::telemetry::Throttle;

const REQUEST_ID: &str = "x-request-id";

/// The routes with all layers around them. Every request gets a response.
pub(crate) struct Middleware {
    pub(crate) service: Router,
    pub(crate) limits: Arc<Limits>,
}

/// The limits that all requests share.
pub(crate) struct Limits {
    /// Running handlers, also of clients that have hung up, and lists that are being written.
    pub(crate) running: TaskTracker,
    pub(crate) connections: Arc<Connections>,
    pub(crate) bodies: Arc<Bodies>,
    pub(crate) pages: Arc<Pages>,
    /// The concurrency permits, one for each handler.
    permits: Arc<Semaphore>,
    rejected: AtomicU64,
}

/// A concurrency permit. The handler holds it until it ends, also after its client has hung up.
type Permit = Arc<OwnedSemaphorePermit>;

impl Middleware {
    pub(crate) fn new(routes: Router, health: Health, config: &Config) -> Self {
        let limits = Arc::new(Limits {
            running: TaskTracker::new(),
            connections: Connections::new(config.max_connections.get()),
            bodies: Bodies::new(config.max_body_bytes),
            pages: Pages::new(),
            permits: Arc::new(Semaphore::new(config.max_requests.get().min(Semaphore::MAX_PERMITS))),
            rejected: AtomicU64::new(0),
        });
        let (stop, requests) = (health.stop.clone(), Requests::new());
        // A request goes through them from top to bottom, its response from bottom to top.
        let layers = ServiceBuilder::new()
            .layer(layer_fn(move |inner| Measure::new(inner, requests.clone())))
            .map_response(move |mut response: Response| {
                if stop.is_cancelled() {
                    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
                }
                response
            })
            .map_request(with_sane_request_id)
            .layer(PropagateRequestIdLayer::x_request_id())
            .layer(from_fn_with_state(limits.clone(), admit))
            .map_request(without_trailing_slash)
            .layer(
                TraceLayer::new_for_http()
                    .make_span_with(request_span)
                    .on_request(())
                    .on_response(DefaultOnResponse::new().latency_unit(Micros))
                    .on_failure(log_failure)
                    .on_eos(()),
            )
            .map_response(with_error_body);
        // Inside of the router, which knows the template of the path.
        let inner = ServiceBuilder::new()
            .layer(from_fn_with_state(limits.clone(), run_on_own_task))
            // On the task of the handler: one that never ends must not keep its permit and its connection.
            .layer(TimeoutLayer::with_status_code(StatusCode::SERVICE_UNAVAILABLE, config.request_timeout))
            .layer(CatchPanicLayer::custom(|panic: Box<dyn Any + Send>| {
                ApiError::Internal(anyhow!("the handler panicked: {}", event_bus::panic_message(&*panic)))
                    .into_response()
            }));
        let routes = layers.service(routes.layer(inner));
        Self { service: health.routes().fallback_service(routes), limits }
    }

    /// Waits until every handler has ended and every list is written.
    pub(crate) async fn drained(&self) {
        self.limits.running.close();
        self.limits.running.wait().await;
    }
}

/// Keeps the request id of the client if it is safe to log, and generates one otherwise.
fn with_sane_request_id(mut request: Request) -> Request {
    let sane = |id: &HeaderValue| (1..=128).contains(&id.len()) && id.as_bytes().iter().all(u8::is_ascii_graphic);
    if !request.headers().get(REQUEST_ID).is_some_and(sane) {
        let id = HeaderValue::try_from(format!("{:032x}", rand::random::<u128>()));
        request.headers_mut().insert(REQUEST_ID, id.expect("hexadecimal digits are a header value"));
    }
    request
}

/// Receives the body, and then takes a concurrency permit: a client that sends slowly must not block others.
///
/// One layer for both: each `from_fn` clones all layers inside of it for each request.
async fn admit(State(limits): State<Arc<Limits>>, mut request: Request, next: Next) -> Response {
    if !request.body().is_end_stream() {
        request = match receive_body(&limits, request).await {
            Ok(request) => request,
            Err(error) => return error.into_response(),
        };
    }
    let Ok(permit) = limits.permits.clone().try_acquire_owned() else { return limits.reject() };
    request.extensions_mut().insert(Permit::new(permit));
    request.extensions_mut().insert(limits);
    next.run(request).await
}

async fn receive_body(limits: &Limits, request: Request) -> Result<Request, ApiError> {
    let connection = request.extensions().get::<Arc<Connection>>().cloned();
    let (mut head, body) = request.into_parts();
    if let Some(connection) = &connection {
        connection.receiving();
    }
    let received = body::receive(&limits.bodies, &head.headers, body).await;
    if let Some(connection) = &connection {
        connection.received();
    }
    let (bytes, charge) = received?;
    head.extensions.insert(Arc::new(charge));
    Ok(Request::from_parts(head, bytes.into()))
}

impl Limits {
    /// Logged at 1, 2, 4, 8 …: to log each of them would add to the overload.
    fn reject(&self) -> Response {
        let rejected = self.rejected.fetch_add(1, Ordering::Relaxed) + 1;
        if rejected.is_power_of_two() {
            warn!(rejected, "more concurrent requests than MAX_REQUESTS: answered 503");
        }
        ApiError::Unavailable.into_response()
    }
}

/// Removes one slash at the end of a path, as Express does; tower-http's `NormalizePath` removes any number.
fn without_trailing_slash(mut request: Request) -> Request {
    let uri = request.uri();
    if let Some(path) = uri.path().strip_suffix('/').filter(|path| !path.is_empty())
        && let Ok(trimmed) = uri.query().map_or_else(|| Uri::try_from(path), |query| format!("{path}?{query}").parse())
    {
        *request.uri_mut() = trimmed;
    }
    request
}

fn request_span(request: &Request) -> Span {
    let id = request.headers().get(REQUEST_ID).and_then(|id| id.to_str().ok());
    error_span!("request", id, method = %request.method(), path = request.uri().path(), trace_id = field::Empty)
}

/// Logs responses that the handler did not log itself. During an outage there are hundreds of 503.
fn log_failure(failure: Failure, latency: Duration, _: &Span) {
    static LOG: Throttle = Throttle::new();
    match failure {
        Failure::StatusCode(StatusCode::SERVICE_UNAVAILABLE) => {
            if let Some(unlogged) = LOG.pass() {
                warn!(?latency, unlogged, "answered 503; others are logged once a minute");
            }
        }
        failure => warn!(?latency, "{failure}"),
    }
}

/// Runs the handler on its own task, so that a client that hangs up cancels nothing.
///
/// The task has the trace context of the request, which the events that it appends carry on.
async fn run_on_own_task(State(limits): State<Arc<Limits>>, mut request: Request, next: Next) -> Response {
    remember_route(&request);
    let permit = request.extensions_mut().remove::<Permit>();
    let body = request.extensions_mut().remove::<Arc<Charge>>();
    let traceparent = request.headers().get("traceparent").and_then(|value| value.to_str().ok()).map(str::to_owned);
    let handler = trace::scope(traceparent, async move {
        if let Some(trace_id) = trace::current().as_deref().and_then(|valid| valid.get(3..35)) {
            Span::current().record("trace_id", trace_id);
        }
        let answer = next.run(request).await;
        drop((permit, body));
        answer
    });
    // Panics are caught, so an error means that the task was cancelled because the runtime shuts down.
    let answer = limits.running.spawn(handler.in_current_span()).await;
    answer.unwrap_or_else(|_| ApiError::Unavailable.into_response())
}

/// Adds the error body to responses without one.
///
/// Rejections of axum's extractors are plain text, and layers respond without a body.
fn with_error_body(response: Response) -> Response {
    let is_json = response.headers().get(header::CONTENT_TYPE).is_some_and(|value| value == "application/json");
    match response.status() {
        status if is_json || status.as_u16() < 400 => response,
        StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED => ApiError::NotFound.into_response(),
        StatusCode::PAYLOAD_TOO_LARGE => ApiError::TooLarge.into_response(),
        StatusCode::SERVICE_UNAVAILABLE => ApiError::Unavailable.into_response(),
        status if status.is_server_error() => ApiError::Internal(anyhow!("a layer answered {status}")).into_response(),
        status => error_body(status, "Something went wrong"),
    }
}
