//! The provider: a real HTTP server that charges cards, and misbehaves as the token of the card says.

use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::sleep;

/// A card, and what happens to a request that charges it.
pub mod card {
    pub const GOOD: &str = "good";
    /// 402.
    pub const DECLINED: &str = "declined";
    /// Charged after 300 ms.
    pub const SLOW: &str = "slow";
    /// The first two requests are answered 500 before anything is charged, the third one is charged.
    pub const FAILS: &str = "fails";
    /// The first request is charged and never answered.
    pub const TIMES_OUT: &str = "times-out";
    /// The first request is neither charged nor answered.
    pub const HANGS: &str = "hangs";
    /// The first request is charged, and the connection closed without an answer.
    pub const BREAKS_OFF: &str = "breaks-off";
    /// Every request gets two answers.
    pub const TWICE: &str = "twice";
    /// The first request is charged and answered, and answered once more after 200 ms.
    pub const LATE: &str = "late";
    /// 302 to another URL of the provider, which answers any request with an id.
    pub const MOVED: &str = "moved";
    /// 307, with which a client repeats its request.
    pub const MOVED_WHOLE: &str = "moved-whole";
    /// The id is empty.
    pub const NAMELESS: &str = "nameless";
    /// The response does not end.
    pub const ENDLESS: &str = "endless";
    /// The response is no JSON.
    pub const GARBLED: &str = "garbled";
}

/// What was charged, and what was asked for.
#[derive(Clone, Debug, Default)]
pub struct Books {
    /// Order, id and amount of each charge, by idempotency key.
    pub charges: HashMap<String, (String, String, Value)>,
    /// Order and idempotency key of each request.
    pub requests: Vec<(String, String)>,
}

pub struct Provider {
    pub url: String,
    books: Arc<Mutex<Books>>,
}

impl Provider {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/charges", listener.local_addr().unwrap());
        let books = Arc::<Mutex<Books>>::default();
        let shared = books.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                // A client that is killed breaks off; that is not the server's fault.
                tokio::spawn(serve(stream, shared.clone()));
            }
        });
        Self { url, books }
    }

    pub fn books(&self) -> Books {
        self.books.lock().unwrap().clone()
    }

    /// How often this order was charged.
    pub fn charges(&self, order: &str) -> usize {
        self.books().charges.values().filter(|(charged, _, _)| charged == order).count()
    }

    /// How often a charge for this order was asked for.
    pub fn requests(&self, order: &str) -> usize {
        self.books().requests.iter().filter(|(requested, _)| requested == order).count()
    }
}

async fn serve(mut stream: TcpStream, books: Arc<Mutex<Books>>) -> std::io::Result<()> {
    while let Some((head, body)) = read(&mut stream).await? {
        if !head.starts_with("POST /charges ") {
            let answer = r#"{"id": "not-a-charge"}"#;
            let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{answer}", answer.len());
            stream.write_all(answer.as_bytes()).await?;
            continue;
        }
        assert!(head.to_lowercase().contains("authorization: bearer secret"), "{head}");
        let key = header(&head, "idempotency-key").expect("every request has a key");
        let (order, card) = (text(&body, "description"), text(&body, "source"));
        let attempt = {
            let mut books = books.lock().unwrap();
            books.requests.push((order.clone(), key.clone()));
            books.requests.iter().filter(|(_, known)| *known == key).count()
        };
        let charge = || {
            let mut books = books.lock().unwrap();
            let next = books.charges.len();
            let charged = books
                .charges
                .entry(key.clone())
                .or_insert_with(|| (order.clone(), format!("ch_{next}"), body["amount"].clone()));
            json!({"id": charged.1, "amount": charged.2}).to_string()
        };
        let (status, answers, answer) = match card.as_str() {
            card::DECLINED => ("402 Payment Required", 1, r#"{"error": "declined"}"#.to_owned()),
            card::SLOW => {
                sleep(Duration::from_millis(300)).await;
                ("200 OK", 1, charge())
            }
            card::FAILS if attempt < 3 => ("500 Internal Server Error", 1, String::new()),
            card::TIMES_OUT if attempt == 1 => {
                charge();
                return std::future::pending().await;
            }
            card::HANGS if attempt == 1 => return std::future::pending().await,
            card::BREAKS_OFF if attempt == 1 => {
                charge();
                return Ok(());
            }
            card::TWICE => ("201 Created", 2, charge()),
            card::LATE if attempt == 1 => {
                let answer = charge();
                let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{answer}", answer.len());
                stream.write_all(answer.as_bytes()).await?;
                sleep(Duration::from_millis(200)).await;
                stream.write_all(answer.as_bytes()).await?;
                continue;
            }
            card::MOVED => ("302 Found\r\nlocation: /elsewhere", 1, String::new()),
            card::MOVED_WHOLE => ("307 Temporary Redirect\r\nlocation: /elsewhere", 1, String::new()),
            card::NAMELESS => ("200 OK", 1, r#"{"id": ""}"#.to_owned()),
            card::ENDLESS => {
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 9999999999\r\n\r\n{\"id\": \"").await?;
                loop {
                    stream.write_all(&[b'x'; 8192]).await?;
                }
            }
            card::GARBLED => ("200 OK", 1, "charged!".to_owned()),
            _ => ("200 OK", 1, charge()),
        };
        let answer = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{answer}", answer.len());
        stream.write_all(answer.repeat(answers).as_bytes()).await?;
    }
    Ok(())
}

/// Head and body of the next request. None: the client has closed.
async fn read(stream: &mut TcpStream) -> std::io::Result<Option<(String, Value)>> {
    let mut bytes = Vec::new();
    loop {
        if let Some(end) = bytes.windows(4).position(|part| part == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
            let length: usize = header(&head, "content-length").map_or(0, |length| length.parse().unwrap());
            if bytes.len() >= end + 4 + length {
                let body = serde_json::from_slice(&bytes[end + 4..end + 4 + length]).unwrap_or_default();
                return Ok(Some((head, body)));
            }
        }
        if stream.read_buf(&mut bytes).await? == 0 {
            return Ok(None);
        }
    }
}

fn header(head: &str, name: &str) -> Option<String> {
    let line = head.lines().find(|line| line.to_lowercase().starts_with(&format!("{name}:")))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

fn text(body: &Value, field: &str) -> String {
    body[field].as_str().expect("the request has this field").to_owned()
}
