#![expect(clippy::disallowed_methods, reason = "tests look into tables that no query! is prepared for")]

use crate::client::{Answer, Client};
use crate::eventually::eventually;
use crate::port::free_port;
use crate::postgres::Postgres;
use crate::token::{JWT_KEY, token};
use anyhow::{Result, ensure};
use reqwest::Method;
use serde_json::{Value, json};
use sqlx::postgres::PgRow;
use sqlx::{AssertSqlSafe, Connection, FromRow, PgConnection};
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::net::TcpStream;

/// A service in this process, over real HTTP and on a real Postgres. There is no NATS.
///
/// It is part of a test: its functions panic on failure.
#[derive(Debug)]
pub struct HttpService<R> {
    /// The value that keeps the service running. The service ends when it is dropped.
    pub running: R,
    /// Its HTTP address, such as `127.0.0.1:20001`.
    pub address: String,
    /// The URL of its database for the superuser.
    pub database_url: String,
    /// A client that is not signed in.
    pub anonymous: Client,
    /// A client of the user `ann`.
    pub ann: Client,
    /// A client of the user `bob`.
    pub bob: Client,
    // Held, because the server ends when the last reference is dropped.
    _postgres: Arc<Postgres>,
}

impl<R> HttpService<R> {
    /// Starts the service `name` on a new database of the shared Postgres, and waits until it is ready.
    ///
    /// `start` gets a command line: the name, the arguments that every service needs, and `options`. It returns a value that
    /// keeps the service running, and its address.
    pub async fn start(
        name: &str,
        options: &[&str],
        start: impl AsyncFnOnce(Vec<String>) -> Result<(R, SocketAddr)>,
    ) -> Self {
        let postgres = Postgres::shared().await.expect("Postgres starts");
        let database_url = postgres.database(name).await.expect("the database is created");
        Self::start_on(postgres, database_url, name, options, start).await
    }

    /// Does what [`start`](Self::start) does, with the database at this URL.
    pub async fn start_on(
        postgres: Arc<Postgres>,
        database_url: String,
        name: &str,
        options: &[&str],
        start: impl AsyncFnOnce(Vec<String>) -> Result<(R, SocketAddr)>,
    ) -> Self {
        let no_nats = format!("nats://127.0.0.1:{}", free_port());
        let required = [
            ["--database-url", &database_url],
            ["--nats-url", &no_nats],
            ["--jwt-key", JWT_KEY],
            ["--http-addr", "127.0.0.1:0"],
        ];
        let arguments = [name].into_iter().chain(required.into_iter().flatten()).chain(options.iter().copied());
        let started = start(arguments.map(str::to_owned).collect()).await;
        let (running, address) = started.expect("the service starts");
        let address = address.to_string();
        let anonymous = Client::new(&format!("http://{address}"));
        let ready = async || anonymous.get("/readyz").await?.expect(200);
        eventually(&format!("{name} to be ready"), ready).await.expect("the service becomes ready");
        let (ann, bob) = (anonymous.signed_in("ann"), anonymous.signed_in("bob"));
        Self { running, address, database_url, anonymous, ann, bob, _postgres: postgres }
    }

    /// Executes a statement as the superuser.
    pub async fn sql(&self, sql: &str) {
        sqlx::query(AssertSqlSafe(sql.to_owned())).execute(&mut self.connect().await).await.expect(sql);
    }

    /// The one row that a query returns.
    pub async fn row<T: for<'r> FromRow<'r, PgRow> + Send + Unpin>(&self, sql: &str) -> T {
        sqlx::query_as(AssertSqlSafe(sql.to_owned())).fetch_one(&mut self.connect().await).await.expect(sql)
    }

    /// All rows that a query returns.
    pub async fn rows<T: for<'r> FromRow<'r, PgRow> + Send + Unpin>(&self, sql: &str) -> Vec<T> {
        sqlx::query_as(AssertSqlSafe(sql.to_owned())).fetch_all(&mut self.connect().await).await.expect(sql)
    }

    /// Subject, version and body of every event in the outbox, in order.
    pub async fn events(&self) -> Vec<(String, i64, Value)> {
        let rows =
            self.rows::<(String, i64, String)>("select subject, version, payload from bus.outbox order by id").await;
        let decode = |body: String| serde_json::from_str(&body).expect("the payload is JSON");
        rows.into_iter().map(|(subject, version, body)| (subject, version, decode(body))).collect()
    }

    /// Waits until no connection of the service is in a transaction.
    pub async fn no_open_transactions(&self) {
        let sql = "select count(*) from pg_stat_activity
                   where datname = current_database() and pid <> pg_backend_pid() and state <> 'idle'";
        let idle = eventually("all connections to rest outside of transactions", async || {
            let (busy,): (i64,) = self.row(sql).await;
            ensure!(busy == 0, "{busy} are not idle");
            Ok(())
        });
        idle.await.expect("all connections become idle");
    }

    /// Sends a request of ann, and hangs up before the response. `yields` chooses how far the service is by then.
    pub async fn hang_up(&self, method: &Method, path: &str, body: &str, yields: usize) {
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            token("ann"),
            body.len()
        );
        let stream = TcpStream::connect(&self.address).await.expect("the service listens");
        stream.writable().await.expect("the connection is open");
        let sent = stream.try_write(request.as_bytes()).expect("the buffer of the socket is empty");
        assert_eq!(sent, request.len(), "the request fits into the buffer of the socket");
        for _ in 0..yields {
            tokio::task::yield_now().await;
        }
    }

    /// Asserts that none of these routes exists: the response of each is a 404 with a body.
    pub async fn assert_not_found(&self, routes: &[(Method, &str)]) {
        for (method, path) in routes {
            let answer = Answer::to(self.ann.request(method.clone(), path)).await.expect("an answer");
            assert_eq!((answer.status, answer.body), (404, error("Not Found")), "{method} {path}");
        }
    }

    async fn connect(&self) -> PgConnection {
        PgConnection::connect(&self.database_url).await.expect("Postgres accepts connections")
    }
}

/// The message of every 503.
pub const UNAVAILABLE: &str = "The service is temporarily unavailable, please try again";

/// The body of an error with one message.
pub fn error(message: &str) -> Value {
    json!({"errors": [{"message": message}]})
}

/// The id in a body.
pub fn id(body: &Value) -> &str {
    body["id"].as_str().expect("the body has an id")
}

/// Texts that no well-behaved client sends, for bodies and for parts of bodies.
pub fn hostile_texts() -> [String; 9] {
    ["", "\0", "%", "'", "\"", "\\", "\u{feff}", "9".repeat(90_000).as_str(), "[".repeat(90_000).as_str()]
        .map(str::to_owned)
}
