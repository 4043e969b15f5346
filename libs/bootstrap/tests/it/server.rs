//! A service with the routes of a test, and clients for it.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::routing::get as on_get;
use bootstrap::{Config, Running, Service};
use clap::Parser as _;
use event_bus::{Bus, Schema};
use reqwest::{Response, StatusCode};
use serde_json::Value;
use sqlx::migrate::Migrator;
use testkit::error;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::Notify;

#[derive(clap::Parser)]
struct Cli {
    #[command(flatten)]
    service: Config,
}

pub fn config(options: &[&str]) -> Config {
    let key = if options.iter().any(|option| option.starts_with("--jwt")) { [].as_slice() } else { &["--jwt-key=key"] };
    let fixed = ["test", "--database-url=postgres://127.0.0.1:1/none", "--http-addr=127.0.0.1:0"];
    Cli::parse_from(fixed.iter().chain(key).chain(options)).service
}

/// A bus without servers: Postgres and NATS are unreachable.
pub async fn no_bus() -> Bus {
    Bus::open(config(&["--nats-url=127.0.0.1:1"]).bus("test"), Schema::new("test", Migrator::DEFAULT, ""))
        .await
        .unwrap()
}

pub async fn start(routes: Router) -> Running {
    start_with(&[], routes).await
}

pub async fn start_with(options: &[&str], routes: Router) -> Running {
    Service::new(&config(options)).run(routes, no_bus().await).await.unwrap()
}

pub async fn get(running: &Running, path: &str) -> Response {
    reqwest::get(format!("http://{}{path}", running.address)).await.unwrap()
}

/// Asserts the status of an error response, and its body of one entry with this message.
pub async fn assert_error(response: Response, status: StatusCode, message: &str) {
    assert_eq!(response.status(), status);
    assert_eq!(response.headers()["content-type"], "application/json");
    assert_eq!(response.headers().contains_key("retry-after"), status == StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(response.json::<Value>().await.unwrap(), error(message));
}

/// A request without a body, on a connection that stays open.
pub const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n";

/// The route of [`REQUEST`], whose handler never ends. The notification reports each request.
pub fn endless_route() -> (Arc<Notify>, Router) {
    let begun = Arc::new(Notify::new());
    let handler = {
        let begun = begun.clone();
        move || async move {
            begun.notify_one();
            std::future::pending::<()>().await;
        }
    };
    (begun, Router::new().route("/", on_get(handler)))
}

/// Sends bytes as they are, and reads until the server closes.
pub async fn exchange(address: SocketAddr, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request).await.unwrap();
    read_all(stream).await
}

pub async fn read_all(mut stream: TcpStream) -> String {
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    String::from_utf8(answer).unwrap()
}

/// Reads one response without a body from a connection that stays open.
pub async fn read_head(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    String::from_utf8(head).unwrap()
}
