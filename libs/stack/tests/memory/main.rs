//! The memory of a service under slow clients, while it serves other clients.
//!
//! These tests run separately and one at a time, because the response times depend on the load of the machine.

#![allow(clippy::disallowed_methods, reason = "tests write into tables")]

use anyhow::{Context, Result, ensure};
use futures::future::try_join_all;
use reqwest::Method;
use serde_json::json;
use sqlx::{Connection, PgConnection};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use testkit::{Client, JWT_KEY, Postgres, Process, free_port};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::{Mutex, MutexGuard};
use tokio::task::JoinSet;

/// The memory that a service must not exceed.
const LIMIT_KB: u64 = 64 * 1024;

/// The time limit for the responses to other clients, on a busy machine.
const PROMPT: Duration = Duration::from_secs(5);

const LARGE: usize = 100_000;

/// A tickets service with the settings of production: all defaults.
struct Tickets {
    process: Process,
    database_url: String,
    _postgres: Arc<Postgres>,
    _alone: MutexGuard<'static, ()>,
}

impl Tickets {
    async fn start() -> Result<Self> {
        static ALONE: Mutex<()> = Mutex::const_new(());
        let alone = ALONE.lock().await;
        let postgres = Postgres::shared().await?;
        let database_url = postgres.database("memory").await?;
        let env = [
            ("DATABASE_URL", database_url.clone()),
            ("NATS_URL", format!("127.0.0.1:{}", free_port())),
            ("JWT_KEY", JWT_KEY.to_owned()),
        ];
        let mut process = Process::spawn(Path::new(env!("CARGO_BIN_EXE_stack")), "tickets", env)?;
        process.wait_ready().await?;
        Ok(Self { process, database_url, _postgres: postgres, _alone: alone })
    }

    async fn connect(&self) -> Result<TcpStream> {
        Ok(TcpStream::connect(("127.0.0.1", self.process.port())).await?)
    }

    /// Checks that other clients are served: one of `/healthz`, one that reads, one that sends a large body.
    async fn serves_others(&self) -> Result<()> {
        let title = "y".repeat(LARGE);
        for _ in 0..5 {
            // Each on its own connection.
            let prompt = async |what: &str, answer: &mut (dyn Future<Output = Result<testkit::Answer>> + Unpin)| {
                let begun = Instant::now();
                let answer = answer.await.with_context(|| format!("{what} was not answered"))?;
                ensure!(answer.status < 300, "{what} was answered {} {}", answer.status, answer.body);
                ensure!(begun.elapsed() < PROMPT, "{what} took {:?}", begun.elapsed());
                Ok(())
            };
            let other = || self.process.client().signed_in("other");
            let (health, list, create) = (other(), other(), other());
            prompt("GET /healthz", &mut Box::pin(health.get("/healthz"))).await?;
            prompt("GET /api/tickets", &mut Box::pin(list.get("/api/tickets?limit=2"))).await?;
            let body = json!({"title": title, "price": 1});
            prompt("POST /api/tickets", &mut Box::pin(create.post("/api/tickets", body))).await?;
        }
        Ok(())
    }

    fn stays_small(&self) -> Result<()> {
        let peak = self.process.memory_peak()?;
        ensure!(peak < LIMIT_KB, "it needed {peak} kB");
        Ok(())
    }
}

/// Reads the whole list at full speed. Returns its size in bytes.
async fn read_all(client: Client) -> Result<usize> {
    let mut answer = client.request(Method::GET, "/api/tickets").timeout(Duration::from_mins(2)).send().await?;
    ensure!(answer.status() == 200, "{}", answer.status());
    let mut bytes = 0;
    while let Some(chunk) = answer.chunk().await? {
        bytes += chunk.len();
    }
    Ok(bytes)
}

/// Requests the whole list and reads only the beginning of the response.
async fn read_nothing(port: u16) -> Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.set_recv_buffer_size(16 * 1024)?;
    let mut stream = socket.connect(([127, 0, 0, 1], port).into()).await?;
    stream.write_all(b"GET /api/tickets HTTP/1.1\r\nhost: x\r\n\r\n").await?;
    ensure!(stream.read_u8().await? == b'H');
    Ok(stream)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_megabytes_listed_by_fast_and_slow_readers_need_little_memory() -> Result<()> {
    let tickets = Tickets::start().await?;
    let mut db = PgConnection::connect(&tickets.database_url).await?;
    let sql = "insert into tickets (id, title, price, user_id, version)
               select substr(md5(n::text), 1, 24), repeat('x', 100000), 20, 'ann', 0 from generate_series(1, 1000) as n";
    sqlx::query(sql).execute(&mut db).await?;
    let _slow = try_join_all((0..100).map(|_| read_nothing(tickets.process.port()))).await?;
    let mut fast = JoinSet::new();
    for _ in 0..2 {
        fast.spawn(read_all(tickets.process.client()));
    }
    tickets.serves_others().await?;
    while let Some(read) = fast.join_next().await {
        let bytes = read??;
        ensure!(bytes > 1_000 * LARGE, "a fast reader got only {bytes} bytes");
    }
    tickets.stays_small()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_bodies_of_1300_clients_need_little_memory() -> Result<()> {
    let tickets = Tickets::start().await?;
    let head = format!(
        "POST /api/tickets HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\ncontent-type: application/json\r\n\
         content-length: {LARGE}\r\n\r\n{{\"title\": \"",
        testkit::token("slow")
    );
    let bytes: Arc<[u8]> = [head.as_bytes(), &vec![b'x'; LARGE - 1_000]].concat().into();
    let mut slow = JoinSet::new();
    for _ in 0..1_300 {
        let (mut stream, bytes) = (tickets.connect().await?, bytes.clone());
        slow.spawn(async move {
            // A client whose body is dropped may get the response while it is still sending.
            let _ = stream.write_all(&bytes).await;
            let mut answer = [0; 12];
            stream.read_exact(&mut answer).await.map(|_| String::from_utf8_lossy(&answer).into_owned())
        });
    }
    tickets.serves_others().await?;
    while let Some(answer) = slow.join_next().await {
        // Some are disconnected while they send.
        if let Ok(answer) = answer? {
            ensure!(answer == "HTTP/1.1 408", "{answer}");
        }
    }
    tickets.stays_small()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_connections_of_3000_clients_need_little_memory() -> Result<()> {
    let tickets = Tickets::start().await?;
    let mut idle = Vec::new();
    // Quickly, because the service closes connections that were idle for ten seconds.
    for _ in 0..30 {
        let connections = (0..100).map(async |_| {
            let mut stream = tickets.connect().await?;
            stream.write_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n").await?;
            stream.read_exact(&mut [0; 12]).await?;
            anyhow::Ok(stream)
        });
        idle.extend(try_join_all(connections).await?);
    }
    tickets.serves_others().await?;
    tickets.stays_small()
}
