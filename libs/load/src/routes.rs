//! What is requested: the routes, and the tickets that their requests are about.

use crate::http::Call;
use bytes::Bytes;
use hyper::{Method, StatusCode, Uri};
use std::fmt::{self, Display, Formatter};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

const BODY: Bytes = Bytes::from_static(br#"{"title":"Concert","price":20.5}"#);
const TICKETS: &str = "/api/tickets";

/// A kind of request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, clap::ValueEnum)]
pub enum Route {
    /// POST /api/tickets
    Post,
    /// PUT /api/tickets/{id}
    Put,
    /// GET /api/tickets/{id}
    Get,
    /// GET /api/tickets?limit=50
    List,
    /// POST /api/orders, each for another ticket
    Orders,
    /// 80 % GET by id, 10 % PUT, 5 % POST tickets, 5 % list
    Mix,
}

impl Route {
    /// Whether it writes, so that events are published.
    pub fn is_change(self) -> bool {
        !matches!(self, Self::Get | Self::List)
    }

    /// Whether it changes tickets, so that the lag of the replica can be measured.
    pub fn changes_tickets(self) -> bool {
        matches!(self, Self::Post | Self::Put | Self::Mix)
    }
}

impl Display for Route {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Post => "POST tickets",
            Self::Put => "PUT ticket",
            Self::Get => "GET ticket",
            Self::List => "list of 50",
            Self::Orders => "POST orders",
            Self::Mix => "mix",
        })
    }
}

/// Ids of tickets.
#[derive(Debug)]
pub enum Ids {
    /// The tickets 0 to this number, which [`id`] names: they were filled in by SQL.
    Numbered(u64),
    /// Those that a service gave.
    Given(Arc<Vec<String>>),
}

impl Ids {
    fn any(&self) -> String {
        match self {
            Self::Numbered(count) => id(rand::random_range(0..*count)),
            Self::Given(ids) => ids[rand::random_range(0..ids.len())].clone(),
        }
    }
}

/// The id of the ticket with this number, of those that are filled in by SQL.
pub fn id(number: u64) -> String {
    format!("{number:024x}")
}

/// The requests of a route.
#[derive(Debug)]
pub struct Requests {
    route: Route,
    ids: Ids,
    /// The number of the next ticket to order.
    next_free: AtomicU64,
    /// The first number that must not be ordered.
    end_of_free: u64,
}

impl Requests {
    /// Requests for these tickets. Orders are for the tickets with the numbers in `free`.
    pub fn new(route: Route, ids: Ids, free: std::ops::Range<u64>) -> Self {
        Self { route, ids, next_free: AtomicU64::new(free.start), end_of_free: free.end }
    }

    /// The number of the first ticket that was not ordered.
    pub fn next_free(&self) -> u64 {
        self.next_free.load(Ordering::Relaxed).min(self.end_of_free)
    }

    /// The next request. None if no ticket is left to order.
    pub fn next(&self) -> Option<Call> {
        Some(match self.route {
            Route::Post => post(),
            Route::Put => put(&self.ids.any()),
            Route::Get => get(&self.ids.any()),
            Route::List => list(),
            Route::Orders => order(&self.take_free()?),
            Route::Mix => match rand::random_range(0..100) {
                0..80 => get(&self.ids.any()),
                80..90 => put(&self.ids.any()),
                90..95 => post(),
                _ => list(),
            },
        })
    }

    fn take_free(&self) -> Option<String> {
        let number = self.next_free.fetch_add(1, Ordering::Relaxed);
        (number < self.end_of_free).then(|| id(number))
    }
}

fn post() -> Call {
    let uri = Uri::from_static(TICKETS);
    Call { method: Method::POST, uri, body: BODY, expected: StatusCode::CREATED, changes_ticket: true }
}

fn put(id: &str) -> Call {
    Call { method: Method::PUT, uri: ticket(id), body: BODY, expected: StatusCode::OK, changes_ticket: true }
}

fn get(id: &str) -> Call {
    read(ticket(id))
}

fn list() -> Call {
    read(Uri::from_static("/api/tickets?limit=50"))
}

fn read(uri: Uri) -> Call {
    Call { method: Method::GET, uri, body: Bytes::new(), expected: StatusCode::OK, changes_ticket: false }
}

fn order(ticket: &str) -> Call {
    let body = format!(r#"{{"ticketId":"{ticket}"}}"#).into();
    let uri = Uri::from_static("/api/orders");
    Call { method: Method::POST, uri, body, expected: StatusCode::CREATED, changes_ticket: false }
}

fn ticket(id: &str) -> Uri {
    format!("{TICKETS}/{id}").try_into().expect("an id has no character that a path must not have")
}

/// The id in the JSON of a ticket, without parsing the rest.
pub fn ticket_id(json: &str) -> Option<&str> {
    json.split_once(r#""id":""#)?.1.split('"').next()
}

/// Id and version in the JSON of a ticket.
pub fn id_and_version(json: &[u8]) -> Option<(&str, i64)> {
    let json = std::str::from_utf8(json).ok()?;
    let version = json.split_once(r#""version":"#)?.1;
    let end = version.find(|c: char| !c.is_ascii_digit()).unwrap_or(version.len());
    Some((ticket_id(json)?, version[..end].parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn id_and_version_are_found_in_any_order() {
        for json in
            [r#"{"id":"65a","title":"x","version":12,"price":1}"#, r#"{"title":"x","price":1,"version":12,"id":"65a"}"#]
        {
            assert_eq!(id_and_version(json.as_bytes()), Some(("65a", 12)));
        }
        assert_eq!(id_and_version(b"[]"), None);
    }

    #[test]
    fn each_free_ticket_is_ordered_once() {
        let requests = Requests::new(Route::Orders, Ids::Numbered(10), 3..5);
        let bodies: Vec<_> = std::iter::from_fn(|| requests.next()).map(|call| call.body).collect();
        assert_eq!(bodies.len(), 2);
        assert!(bodies[0].ends_with(br#"3"}"#) && bodies[1].ends_with(br#"4"}"#));
        assert_eq!(requests.next_free(), 5);
    }

    #[test]
    fn ids_have_24_hex_digits_in_order() {
        assert_eq!(id(0x1f), "00000000000000000000001f");
        assert!(id(9) < id(10) && id(255) < id(4096));
    }
}
