//! The accept loop. Our own, because `axum::serve` has no time limit for request headers.

use std::convert::Infallible;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;
use tracing::{debug, error};

use super::Middleware;
use super::connections::{Busy, Connection, Entry};
use super::measure::count_malformed;
use super::patient::Patient;

/// The time limit for the head of a request, and for an idle connection.
const HEADER_TIME: Duration = Duration::from_secs(10);

/// Bytes that a connection reads or writes at once. It is also the largest head of a request, the same as that of Node.
const BUFFER: usize = 16 * 1024;

/// Connections that wait to be accepted.
const BACKLOG: u32 = 1024;

/// The pause after a failed `accept`, for example without a free file descriptor.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// The time in which connections and requests are still accepted after the stop began: they may be on their way.
///
/// Each response has `Connection: close`. Idle connections are not closed at once, because a request may just arrive on one.
const STILL_ACCEPTING: Duration = Duration::from_millis(500);

/// The time for lists that are being written after that. Shorter than the time for requests.
const FINISH: Duration = Duration::from_secs(10);

/// The time for one page of a list meanwhile.
///
/// The kernel accepts more bytes only after most of its buffer was read: at 20 kB/s that is every 5 s.
const STALLED: Duration = Duration::from_secs(6);

/// The time for the last responses.
const LAST_RESPONSES: Duration = Duration::from_secs(1);

/// Bytes of a response that the kernel buffers for a client that does not read.
///
/// The default is megabytes, which count against the memory limit of a container.
const SEND_BUFFER: u32 = 128 * 1024;

/// Listens on `address`.
pub(crate) fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    // Connections inherit it.
    socket.set_send_buffer_size(SEND_BUFFER)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Serves until `stop`, and [`STILL_ACCEPTING`] longer; then drains.
///
/// Draining: it accepts no more connections, closes idle ones, and returns after the last response and the last handler.
/// Dropping the future closes all connections at once.
pub(crate) async fn serve(listener: TcpListener, middleware: Arc<Middleware>, stop: CancellationToken) {
    let mut connections = JoinSet::new();
    let closing = CancellationToken::new();
    let mut farewell = pin!(async {
        stop.cancelled().await;
        tokio::time::sleep(STILL_ACCEPTING).await;
        closing.cancel();
    });
    loop {
        tokio::select! {
            biased;
            () = farewell.as_mut() => break,
            Some(ended) = connections.join_next() => report_panic(ended),
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    let entry = middleware.limits.connections.open();
                    connections.spawn(serve_connection(stream, entry, middleware.service.clone(), closing.clone()));
                }
                Err(error) if concerns_one_client(&error) => debug!(%error, "a client left before it was accepted"),
                Err(error) => {
                    // Probably no file descriptor is free: closing another connection frees one.
                    middleware.limits.connections.close_one();
                    error!(%error, "cannot accept connections");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    // From here on the kernel refuses connections, and a load balancer tries another replica.
    drop(listener);
    // Lists are completed, except those that take too long or whose client does not read.
    let begun = Instant::now();
    while timeout(LAST_RESPONSES, middleware.drained()).await.is_err() {
        while middleware.limits.pages.give_up_one(STALLED) {}
        if begun.elapsed() > FINISH {
            middleware.limits.connections.close_all();
        }
    }
    // The last responses are sent. Clients that do not read, or have not finished their request, are disconnected.
    let answered = async {
        while let Some(ended) = connections.join_next().await {
            report_panic(ended);
        }
    };
    if timeout(LAST_RESPONSES, answered).await.is_err() {
        debug!(connections = connections.len(), "clients that would not end are cut off");
    }
}

async fn serve_connection(stream: TcpStream, entry: Entry, service: Router, closing: CancellationToken) {
    // Responses are small: waiting to fill a packet would only delay them. A failure means that the client has hung up.
    let _ = stream.set_nodelay(true);
    let begun = async {
        // A connection needs no buffers before the client has sent something.
        let first = timeout(HEADER_TIME, stream.peek(&mut [0])).await;
        first.is_ok_and(|first| first.is_ok_and(|bytes| bytes > 0))
    };
    tokio::select! {
        biased;
        () = entry.connection.closed() => {}
        begun = begun => if begun {
            // Boxed, so that a connection without a request needs less memory.
            Box::pin(serve_requests(stream, &entry.connection, service, closing.clone())).await;
        },
        () = closing.cancelled() => {}
    }
}

async fn serve_requests(stream: TcpStream, connection: &Arc<Connection>, service: Router, closing: CancellationToken) {
    let answer = service_fn(|request| {
        let busy = connection.begin();
        // Boxed, so that an idle connection does not need the memory for a request.
        Box::pin(answer(request, busy, connection.clone(), service.clone()))
    });
    let mut http = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_TIME)
            .max_buf_size(BUFFER)
            .serve_connection(TokioIo::new(Patient::new(stream)), answer)
    );
    let ended = tokio::select! {
        biased;
        () = connection.closed() => return,
        ended = http.as_mut() => ended,
        () = closing.cancelled() => {
            http.as_mut().graceful_shutdown();
            tokio::select! {
                () = connection.closed() => return,
                ended = http => ended,
            }
        }
    };
    if let Err(error) = ended {
        if error.is_parse() {
            count_malformed();
        }
        debug!(%error, "connection ended early");
    }
}

async fn answer(
    request: Request<Incoming>,
    busy: Option<Busy>,
    connection: Arc<Connection>,
    service: Router,
) -> Result<Response<Answer>, Infallible> {
    // Without a request, the connection is closed.
    let Some(busy) = busy else { return std::future::pending().await };
    let mut request = request.map(Body::new);
    request.extensions_mut().insert(connection);
    let response = service.oneshot(request).await?;
    Ok(response.map(|body| Answer { body, _busy: busy }))
}

/// The body of a response. Its connection is busy until it ends.
struct Answer {
    body: Body,
    _busy: Busy,
}

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

fn concerns_one_client(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::ConnectionAborted
            | ErrorKind::ConnectionRefused
            | ErrorKind::ConnectionReset
            | ErrorKind::Interrupted
    )
}

fn report_panic(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        error!(%error, "a connection's task panicked");
    }
}
