//! Metrics of requests, named as OpenTelemetry names them.
//!
//! All labels have few values: a method that OpenTelemetry does not list is `_OTHER`, and a route is a template such as
//! `/api/tickets/{id}`. The route is `none` if no template matches, and for a request that is refused before it is routed.
//! A request whose client hangs up before the response has the status 499.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::task::{Context, Poll};

use axum::extract::{MatchedPath, Request};
use axum::http::Method;
use axum::response::Response;
use futures::future::BoxFuture;
use metrics::{
    Gauge, Histogram, Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram,
};
use tokio::time::Instant;
use tower::Service;

const DURATION: &str = "http_server_request_duration_seconds";
const ACTIVE: &str = "http_server_active_requests";
const MALFORMED: &str = "http_server_malformed_requests_total";

/// The route of a request that was not routed.
const NONE: &str = "none";
/// The status of a request whose client hung up before the response, as in the logs of nginx.
const HUNG_UP: u16 = 499;

/// The methods that OpenTelemetry lists.
const METHODS: [&str; 9] = ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "CONNECT", "TRACE"];

/// The metrics of requests.
pub(super) struct Requests {
    active: Gauge,
    /// By route, then by method and status: a lookup allocates nothing.
    durations: RwLock<HashMap<Box<str>, Durations>>,
}

type Durations = HashMap<(&'static str, u16), Histogram>;

/// The template that matches the path, once it is known.
#[derive(Clone, Default)]
struct Route(Arc<OnceLock<MatchedPath>>);

/// A request, until its response begins or its client hangs up.
struct Measured {
    requests: Arc<Requests>,
    begun: Instant,
    method: &'static str,
    route: Route,
    status: u16,
}

impl Requests {
    pub(super) fn new() -> Arc<Self> {
        describe_histogram!(DURATION, Unit::Seconds, "Time from the head of a request to the head of its response");
        describe_gauge!(ACTIVE, "Requests that have no response yet");
        describe_counter!(MALFORMED, "Requests that could not be parsed as HTTP");
        counter!(MALFORMED).increment(0);
        Arc::new(Self { active: gauge!(ACTIVE), durations: RwLock::default() })
    }

    fn record(&self, measured: &Measured) {
        let route = measured.route.0.get().map_or(NONE, MatchedPath::as_str);
        let (method, status) = (measured.method, measured.status);
        let seconds = measured.begun.elapsed().as_secs_f64();
        let durations = self.durations.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(duration) = durations.get(route).and_then(|durations| durations.get(&(method, status))) {
            return duration.record(seconds);
        }
        drop(durations);
        let duration = histogram!(
            DURATION,
            "http_request_method" => method,
            "http_route" => route.to_owned(),
            "http_response_status_code" => status.to_string()
        );
        duration.record(seconds);
        let mut durations = self.durations.write().unwrap_or_else(PoisonError::into_inner);
        durations.entry(route.into()).or_default().insert((method, status), duration);
    }
}

impl Measured {
    fn responded(mut self, status: u16) {
        self.status = status;
    }
}

impl Drop for Measured {
    fn drop(&mut self) {
        self.requests.active.decrement(1.0);
        self.requests.record(self);
    }
}

/// Measures requests. Outside of all layers that may refuse one.
///
/// Not `from_fn`, which would clone all layers inside of it for each request.
#[derive(Clone)]
pub(super) struct Measure<S> {
    inner: S,
    requests: Arc<Requests>,
}

impl<S> Measure<S> {
    pub(super) fn new(inner: S, requests: Arc<Requests>) -> Self {
        Self { inner, requests }
    }
}

impl<S> Service<Request> for Measure<S>
where
    S: Service<Request, Response = Response, Future: Send + 'static>,
{
    type Response = Response;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Response, S::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request) -> Self::Future {
        self.requests.active.increment(1.0);
        let (requests, method, route) = (self.requests.clone(), known(request.method()), Route::default());
        let measured = Measured { requests, begun: Instant::now(), method, route: route.clone(), status: HUNG_UP };
        request.extensions_mut().insert(route);
        let response = self.inner.call(request);
        Box::pin(async move {
            let response = response.await?;
            measured.responded(response.status().as_u16());
            Ok(response)
        })
    }
}

/// Remembers the template that matches the path. Inside of the router, which finds it.
pub(super) fn remember_route(request: &Request) {
    let extensions = request.extensions();
    if let (Some(route), Some(path)) = (extensions.get::<Route>(), extensions.get::<MatchedPath>()) {
        // It is set once.
        let _ = route.0.set(path.clone());
    }
}

/// Counts a request that hyper refuses.
pub(super) fn count_malformed() {
    counter!(MALFORMED).increment(1);
}

fn known(method: &Method) -> &'static str {
    METHODS.into_iter().find(|known| *known == method.as_str()).unwrap_or("_OTHER")
}
