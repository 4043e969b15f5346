//! The accept loop. Our own, because `axum::serve` has no time limit for request headers.

use std::io::{self, ErrorKind};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error};

use super::Dispatch;

/// Time for the head of a request, and so for the silence between two requests on one connection.
const HEADER_TIME: Duration = Duration::from_secs(10);

/// Time until `accept` is tried again when it failed for want of something, such as file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// How long connections and requests that are on their way when we are told to stop are still taken. Each is told that
/// its connection ends; to close idle connections at once would tear some under a request.
const FAREWELL: Duration = Duration::from_millis(500);

/// How long the last answers may take on their way out.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Serves until `stop`, and [`FAREWELL`] longer; then accepts no more, closes idle connections, and returns when the last
/// request is answered and the last handler has ended. Dropping the future closes all connections at once.
pub(crate) async fn serve(listener: TcpListener, dispatch: Arc<Dispatch>, stop: CancellationToken) {
    let mut connections = JoinSet::new();
    let closing = CancellationToken::new();
    let mut farewell = pin!(async {
        stop.cancelled().await;
        tokio::time::sleep(FAREWELL).await;
        closing.cancel();
    });
    loop {
        tokio::select! {
            biased;
            () = farewell.as_mut() => break,
            Some(ended) = connections.join_next() => report_panic(ended),
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(serve_connection(stream, dispatch.service.clone(), closing.clone()));
                }
                Err(error) if concerns_one_client(&error) => debug!(%error, "a client left before it was accepted"),
                Err(error) => {
                    error!(%error, "cannot accept connections");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    // From here on the kernel refuses connections, and whoever balances the load tries another replica.
    drop(listener);
    dispatch.drained().await;
    // The last answers go out. A client that does not take its answer, or never finished its request, is owed nothing.
    let answered = async {
        while let Some(ended) = connections.join_next().await {
            report_panic(ended);
        }
    };
    if tokio::time::timeout(LAST_WORDS, answered).await.is_err() {
        debug!(connections = connections.len(), "clients that would not end are cut off");
    }
}

async fn serve_connection(stream: TcpStream, service: Router, closing: CancellationToken) {
    // Answers are small: waiting to fill a packet would only delay them. A failure means that the client is gone.
    let _ = stream.set_nodelay(true);
    let mut connection = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_TIME)
            .serve_connection(TokioIo::new(stream), TowerToHyperService::new(service))
    );
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = closing.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        debug!(%error, "connection ended early");
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
