//! One connection of HTTP/1.1, with as little work per request as possible.

use anyhow::{Context, Result};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, COOKIE, HOST, HeaderValue};
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::TcpStream;

/// Services close idle connections; a request must not meet that moment.
const IDLE: Duration = Duration::from_secs(3);

const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// A service to send requests to, as one user.
#[derive(Clone, Debug)]
pub struct Target {
    address: SocketAddr,
    host: HeaderValue,
    authorization: HeaderValue,
    /// For services that know no `Authorization`.
    cookie: Option<HeaderValue>,
}

/// A request that is ready to be sent.
#[derive(Clone, Debug)]
pub struct Call {
    /// The method.
    pub method: Method,
    /// Path and query.
    pub uri: Uri,
    /// JSON, or empty.
    pub body: Bytes,
    /// The status that a healthy service responds with.
    pub expected: StatusCode,
    /// Whether the request changes a ticket: the response has its id and its new version, for measuring lag.
    pub changes_ticket: bool,
}

/// An open connection.
pub struct Connection {
    target: Arc<Target>,
    sender: SendRequest<Full<Bytes>>,
    /// Reads and writes the socket. Polled by the task that sends, so that a connection is one task.
    driver: Pin<Box<http1::Connection<TokioIo<TcpStream>, Full<Bytes>>>>,
    used: Instant,
}

impl Target {
    /// The service at `host:port`, with this token.
    pub async fn new(authority: &str, token: &str) -> Result<Self> {
        let address = tokio::net::lookup_host(authority).await.with_context(|| format!("cannot find {authority}"))?;
        let address = address.into_iter().next().with_context(|| format!("{authority} has no address"))?;
        let authorization = HeaderValue::from_str(&format!("Bearer {token}"))?;
        Ok(Self { address, host: HeaderValue::from_str(authority)?, authorization, cookie: None })
    }

    /// Sends the token as the session cookies of the course too.
    pub fn with_cookie(self, cookie: &str) -> Result<Self> {
        let cookie = HeaderValue::from_str(&format!("session={cookie}; express:sess={cookie}"))?;
        Ok(Self { cookie: Some(cookie), ..self })
    }

    fn request(&self, call: Call) -> Request<Full<Bytes>> {
        let has_body = !call.body.is_empty();
        let mut request = Request::new(Full::new(call.body));
        *request.method_mut() = call.method;
        *request.uri_mut() = call.uri;
        let headers = request.headers_mut();
        headers.insert(HOST, self.host.clone());
        headers.insert(AUTHORIZATION, self.authorization.clone());
        if has_body {
            headers.insert(CONTENT_TYPE, JSON);
        }
        if let Some(cookie) = &self.cookie {
            headers.insert(COOKIE, cookie.clone());
        }
        request
    }
}

impl Connection {
    /// Connects.
    pub async fn open(target: &Arc<Target>) -> Result<Self> {
        let socket = TcpStream::connect(target.address).await.context("cannot connect")?;
        socket.set_nodelay(true)?;
        let (sender, driver) = http1::handshake(TokioIo::new(socket)).await?;
        Ok(Self { target: target.clone(), sender, driver: Box::pin(driver), used: Instant::now() })
    }

    /// Whether it can be used: the service has not closed it, and will not do so because it was idle.
    pub fn is_usable(&self) -> bool {
        !self.sender.is_closed() && self.used.elapsed() < IDLE
    }

    /// Sends a request and reads the whole response. The body is kept only if `keep`.
    ///
    /// After an error the connection cannot be used any more.
    pub async fn send(&mut self, call: Call, keep: bool) -> Result<(StatusCode, Bytes)> {
        let request = self.target.request(call);
        self.used = Instant::now();
        let Self { sender, driver, .. } = self;
        let mut exchange = pin!(async {
            sender.ready().await?;
            let response = sender.send_request(request).await?;
            let status = response.status();
            Ok((status, read(response, keep).await?))
        });
        tokio::select! {
            // The response may be complete at the moment when the connection ends.
            biased;
            outcome = &mut exchange => outcome,
            ended = driver => {
                ended?;
                exchange.await
            }
        }
    }
}

async fn read(response: Response<Incoming>, keep: bool) -> Result<Bytes> {
    let mut body = response.into_body();
    if keep {
        return Ok(body.collect().await?.to_bytes());
    }
    while let Some(frame) = body.frame().await {
        frame?;
    }
    Ok(Bytes::new())
}
