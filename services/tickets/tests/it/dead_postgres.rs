//! Postgres does not respond: a frozen server, or a network that loses every packet.

use crate::tickets::start_on;
use futures::future::join_all;
use serde_json::json;
use sqlx::{Connection, PgConnection};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use testkit::{Postgres, Proxy, UNAVAILABLE, error, eventually, eventually_within};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, timeout};

/// Longer than the request timeout.
const BOUND: Duration = Duration::from_secs(15);

/// The `host:port` of the database.
fn host(database_url: &str) -> &str {
    database_url.split(['@', '/']).nth(3).unwrap()
}

#[tokio::test]
async fn dead_connections_are_dropped_and_replaced() {
    let postgres = Postgres::shared().await.unwrap();
    let database_url = postgres.database("tickets").await.unwrap();
    let host = host(&database_url);
    let proxy = Proxy::to(host).await.unwrap();
    let tickets = start_on(postgres, database_url.replace(host, &proxy.address().to_string())).await;
    // As many connections as the service may have, all of them in use.
    join_all((0..64).map(|_| tickets.ticket())).await;

    // They die while some are in use, some return to the pool, and some are idle; three times.
    for round in 0..3 {
        let answers = join_all((0..256).map(|number| {
            let post = tickets.ann.post("/api/tickets", json!({"title": format!("Lost {number}"), "price": 1}));
            async { timeout(BOUND, post).await.expect("an answer in time").unwrap() }
        }));
        let abandon = async {
            tokio::time::sleep(Duration::from_millis(20 + 15 * round)).await; // in the middle of them
            proxy.abandon();
        };
        for answer in tokio::join!(answers, abandon).0 {
            assert!(answer.status == 201 || answer.status == 503, "{} {}", answer.status, answer.body);
            assert!(answer.status == 201 || answer.body == error(UNAVAILABLE));
        }
    }
    // The same process serves again: the dead connections were replaced.
    let body = json!({"title": "After", "price": 1});
    eventually("a live connection", async || {
        tickets.ann.post("/api/tickets", body.clone()).await?.expect(201)?;
        anyhow::Ok(())
    })
    .await
    .unwrap();
    // The pool has lost no connection: all 16 can wait for a lock at once.
    let mut holder = PgConnection::connect(&database_url).await.unwrap();
    sqlx::query("begin").execute(&mut holder).await.unwrap();
    sqlx::query("lock table tickets in share mode").execute(&mut holder).await.unwrap();
    let all_wait = eventually("all 16 connections to be usable", async || {
        let sql = "select count(*) from pg_locks where not granted and relation = 'tickets'::regclass";
        let waiting: i64 = sqlx::query_scalar(sql).fetch_one(&mut holder).await?;
        anyhow::ensure!(waiting == 16, "{waiting} are");
        anyhow::Ok(())
    });
    let posts = async {
        loop {
            join_all((0..24).map(|_| tickets.ann.post("/api/tickets", body.clone()))).await;
        }
    };
    tokio::select! {
        waited = all_wait => waited.unwrap(),
        () = posts => {}
    }
}

#[tokio::test]
async fn frozen_postgres_gives_503_in_bounded_time_and_is_used_again_after() {
    let postgres = Arc::new(Postgres::start().await.unwrap());
    let database_url = postgres.database("tickets").await.unwrap();
    let tickets = start_on(postgres.clone(), database_url).await;
    let ticket = crate::tickets::path(&tickets.ticket().await);

    postgres.pause().await.unwrap();
    for round in 0..2 {
        let answers = join_all((0..32).map(|number| {
            let (ann, ticket) = (&tickets.ann, &ticket);
            async move {
                let answer = match number % 3 {
                    0 => ann.get(ticket).await,
                    1 => ann.put(ticket, json!({"title": "Changed", "price": 1})).await,
                    _ => ann.post("/api/tickets", json!({"title": "New", "price": 1})).await,
                };
                (answer.unwrap().status, number)
            }
        }));
        for (status, number) in timeout(BOUND, answers).await.expect("answers in time") {
            assert_eq!(status, 503, "round {round}, request {number}");
        }
        assert_eq!(tickets.anonymous.get("/readyz").await.unwrap().status, 503);
    }
    postgres.unpause().await.unwrap();
    eventually("an answer", async || tickets.ann.get(&ticket).await?.expect(200)).await.unwrap();
    join_all((0..64).map(|_| tickets.ticket())).await;
}

/// A proxy in front of `server` that opens each connection late.
async fn slow_proxy(server: String) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let server = server.clone();
            tokio::spawn(async move {
                sleep(Duration::from_secs(3)).await; // longer than a request waits for a connection
                let mut server = TcpStream::connect(server).await.unwrap();
                let _ = copy_bidirectional(&mut client, &mut server).await;
            });
        }
    });
    address
}

#[tokio::test]
async fn connections_that_open_too_late_serve_later_requests() {
    let postgres = Postgres::shared().await.unwrap();
    let database_url = postgres.database("tickets").await.unwrap();
    let host = host(&database_url);
    let slow = slow_proxy(host.to_owned()).await;
    let tickets = start_on(postgres, database_url.replace(host, &slow.to_string())).await;
    // More requests than connections, and none is open.
    let answers =
        join_all((0..64).map(|_| tickets.ann.post("/api/tickets", json!({"title": "Early", "price": 1})))).await;
    for answer in answers {
        let answer = answer.unwrap();
        assert_eq!((answer.status, answer.body), (503, error(UNAVAILABLE)));
    }
    let late = async || tickets.ann.post("/api/tickets", json!({"title": "Late", "price": 1})).await?.expect(201);
    eventually_within(Duration::from_secs(10), "a connection that is open", late).await.unwrap();
}
