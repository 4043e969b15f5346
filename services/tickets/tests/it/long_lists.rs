//! Lists that are longer than a page, and clients that read them slowly.

use crate::tickets::{Tickets, start, start_with};
use std::time::Duration;
use testkit::{eventually, id};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

/// More than the buffers of the two kernels hold, in titles of 100 kB.
const MANY: usize = 200;
const LARGE: usize = 100_000;

/// A client that has requested the whole list and has read nothing.
async fn slow_reader(tickets: &Tickets) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(16 * 1024).unwrap();
    let mut stream = socket.connect(tickets.address.parse().unwrap()).await.unwrap();
    stream.write_all(b"GET /api/tickets HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
    stream
}

/// Reads until the connection ends. Returns the text, and whether the response is complete.
async fn rest(mut stream: TcpStream) -> (String, bool) {
    let mut answer = Vec::new();
    // A connection that is cut off may end with an error.
    let _ = timeout(Duration::from_mins(1), stream.read_to_end(&mut answer)).await.expect("an end");
    let answer = String::from_utf8(answer).unwrap();
    let is_whole = answer.ends_with("\r\n0\r\n\r\n");
    (answer, is_whole)
}

#[tokio::test]
async fn a_list_of_several_pages_is_complete_and_in_order() {
    let tickets = start().await;
    // Pages end by rows, by bytes, and exactly with the list; 256 rows are a page.
    for sizes in [[(256, 10), (0, 10)], [(257, 10), (7, 70_000)], [(300, 1_000), (212, 5)], [(1, 90_000), (512, 1)]] {
        tickets.sql("delete from tickets").await;
        let mut made = Vec::new();
        for (count, bytes) in sizes {
            made.extend(tickets.insert(count, bytes).await);
        }
        let answer = tickets.anonymous.get("/api/tickets").await.unwrap();
        assert_eq!(answer.headers["content-type"], "application/json");
        let all: Vec<_> = answer.body.as_array().unwrap().iter().map(|ticket| id(ticket).to_owned()).collect();
        assert_eq!(all, made);
        for limit in [1, 255, 256, 257, 600] {
            let path = format!("/api/tickets?limit={limit}");
            let some = tickets.anonymous.get(&path).await.unwrap().expect(200).unwrap();
            let some: Vec<_> = some.as_array().unwrap().iter().map(id).collect();
            assert_eq!(some, made[..limit.min(made.len())], "limit {limit}");
        }
    }
}

#[tokio::test]
async fn a_short_list_has_a_length_and_a_long_one_is_streamed() {
    let tickets = start().await;
    tickets.insert(50, 10).await;
    let short = tickets.anonymous.get("/api/tickets").await.unwrap();
    assert!(short.headers.contains_key("content-length"));
    tickets.sql("delete from tickets").await;
    tickets.insert(1_000, 10).await;
    let long = tickets.anonymous.get("/api/tickets").await.unwrap();
    assert!(!long.headers.contains_key("content-length"));
}

#[tokio::test]
async fn clients_that_read_slowly_hold_no_connection_to_postgres() {
    let tickets = start_with(&["--database-connections=1"]).await;
    tickets.insert(MANY, LARGE).await;
    let mut slow = Vec::new();
    for _ in 0..5 {
        slow.push(slow_reader(&tickets).await);
    }
    for _ in 0..20 {
        tickets.anonymous.get("/api/tickets?limit=1").await.unwrap().expect(200).unwrap();
    }
    for stream in slow {
        let (answer, is_whole) = rest(stream).await;
        assert!(is_whole && answer.matches("\"userId\"").count() == MANY, "{} bytes", answer.len());
    }
}

#[tokio::test]
async fn a_list_that_fails_halfway_is_seen_to_be_incomplete() {
    let tickets = start().await;
    tickets.insert(MANY, LARGE).await;
    let mut slow = slow_reader(&tickets).await;
    assert_eq!(slow.read_u8().await.unwrap(), b'H');
    tickets.sql("alter table tickets rename to hidden").await;
    let (answer, is_whole) = rest(slow).await;
    assert!(!is_whole && answer.len() < MANY * LARGE, "{} bytes", answer.len());
    // An error before the first byte is an ordinary response.
    assert_eq!(tickets.anonymous.get("/api/tickets").await.unwrap().status, 500);
}

#[tokio::test]
async fn a_list_in_progress_is_completed_when_the_service_stops() {
    let tickets = start().await;
    tickets.insert(MANY, LARGE).await;
    let (stalled, mut slow) = (slow_reader(&tickets).await, slow_reader(&tickets).await);
    assert_eq!(slow.read_u8().await.unwrap(), b'H');
    let health = format!("http://{}/readyz", tickets.address);
    let stopped = tokio::spawn(tickets.service.running.stop());
    eventually("the service to refuse connections", async || reqwest::get(&health).await.is_err()).await.unwrap();
    let (answer, is_whole) = rest(slow).await;
    assert!(is_whole && answer.matches("\"userId\"").count() == MANY, "{} bytes", answer.len());
    // A client that does not read does not keep the service running.
    stopped.await.unwrap().unwrap();
    assert!(!rest(stalled).await.1);
}
