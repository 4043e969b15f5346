//! The request body: a JSON object of at most 100 kB. Anything else counts as empty or is an error.
//!
//! Values are kept as text until a field is read. So a number keeps its exact digits (`20.00001`, and `1e999`, which no
//! float holds). An unknown field is not parsed, so it cannot be invalid, or overflow the stack by its depth.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody as _};
use axum::extract::{FromRequest, Request};
use axum::http::{HeaderMap, header};
use futures::StreamExt as _;
use serde::de::IgnoredAny;
use serde_json::value::RawValue;
use tokio::time::timeout;

use crate::error::ApiError;
use crate::http::{Bodies, Charge, Receiving};

/// The most bytes of a body: `100kb` of Express.
pub const LIMIT: usize = 100 * 1024;

/// Bytes of a body that is too large that are read and dropped.
///
/// Without it, a client that is still writing would see a connection reset instead of the response.
const DRAINED: usize = 8 * 1024 * 1024;

/// The time limit for receiving a body. Shorter than a usual request timeout, so that the response names the reason.
const TIME: Duration = Duration::from_secs(5);

/// The fields of a JSON object.
///
/// A body that is not declared as JSON, an empty body and an array have no fields.
#[derive(Debug, Default)]
pub struct JsonBody {
    fields: HashMap<String, Box<RawValue>>,
}

/// The value of one field of a body. If a name occurs twice, the last value counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Field<'a> {
    /// The body has no such field.
    Missing,
    /// `null`.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// A number, as it was written: any length, any exponent.
    Number(&'a str),
    /// A string, escapes resolved. It may hold `\0`, which Postgres cannot store.
    Text(String),
    /// An object or an array.
    Other,
    /// A string that is no Unicode text, such as half a surrogate pair (`"\ud800"`).
    Unreadable,
}

impl JsonBody {
    /// The value of a field.
    pub fn field(&self, name: &str) -> Field<'_> {
        let Some(raw) = self.fields.get(name) else { return Field::Missing };
        let raw = raw.get();
        match raw.as_bytes().first() {
            Some(b'n') => Field::Null,
            Some(b't') => Field::Bool(true),
            Some(b'f') => Field::Bool(false),
            Some(b'"') => serde_json::from_str(raw).map_or(Field::Unreadable, Field::Text),
            Some(b'{' | b'[') => Field::Other,
            _ => Field::Number(raw),
        }
    }

    fn parse(bytes: &[u8]) -> Result<Self, ApiError> {
        // A byte order mark is not JSON, but Express accepts it.
        let bytes = bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(bytes);
        let Some(first) = bytes.iter().find(|byte| !byte.is_ascii_whitespace()) else {
            return if bytes.is_empty() { Ok(Self::default()) } else { Err(ApiError::BadRequest) };
        };
        match first {
            b'{' => serde_json::from_slice(bytes).map(|fields| Self { fields }),
            b'[' => serde_json::from_slice(bytes).map(|IgnoredAny| Self::default()),
            _ => return Err(ApiError::BadRequest),
        }
        .map_err(|_| ApiError::BadRequest)
    }
}

impl<S: Send + Sync> FromRequest<S> for JsonBody {
    type Rejection = ApiError;

    /// The middleware has received the body, within its limits, before the handler begins.
    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        if !is_json(request.headers()) {
            return Ok(Self::default());
        }
        let bytes = Bytes::from_request(request, state).await.map_err(|_| ApiError::BadRequest)?;
        Self::parse(&bytes)
    }
}

/// Whether the body is declared as `application/json`, with any parameters.
fn is_json(headers: &HeaderMap) -> bool {
    let declared = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    declared.split(';').next().is_some_and(|essence| essence.trim().eq_ignore_ascii_case("application/json"))
}

/// Receives a whole body, within the limits of its size and time, and of all bodies together.
pub(crate) async fn receive(
    bodies: &Arc<Bodies>,
    headers: &HeaderMap,
    body: Body,
) -> Result<(Vec<u8>, Charge), ApiError> {
    let receiving = bodies.begin();
    tokio::select! {
        read = timeout(TIME, read(&receiving, headers, body)) => read.map_err(|_| ApiError::TooSlow)??,
        () = receiving.given_up() => return Err(ApiError::TooSlow),
    }
    receiving.finish()
}

async fn read(receiving: &Receiving, headers: &HeaderMap, body: Body) -> Result<(), ApiError> {
    let announced = body.size_hint().lower();
    let mut too_large = announced > LIMIT as u64;
    // With `Expect: 100-continue`, the client has not sent the body yet.
    if too_large && headers.contains_key(header::EXPECT) {
        return Err(ApiError::TooLarge);
    }
    let mut received = 0;
    let mut chunks = body.into_data_stream();
    while let Some(chunk) = chunks.next().await {
        // Broken chunks, or a client that disconnected.
        let chunk = chunk.map_err(|_| ApiError::BadRequest)?;
        received += chunk.len();
        too_large |= received > LIMIT;
        if received > DRAINED {
            break;
        }
        if !too_large {
            receiving.append(&chunk)?;
        }
    }
    if too_large { Err(ApiError::TooLarge) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    fn field_of(body: &str) -> Field<'static> {
        match JsonBody::parse(body.as_bytes()).unwrap().field("a") {
            Field::Number(text) => Field::Text(format!("number {text}")),
            Field::Missing => Field::Missing,
            Field::Null => Field::Null,
            Field::Bool(value) => Field::Bool(value),
            Field::Text(text) => Field::Text(text),
            Field::Other => Field::Other,
            Field::Unreadable => Field::Unreadable,
        }
    }

    #[test]
    fn a_field_keeps_what_was_written() {
        let text = |text: &str| Field::Text(text.to_owned());
        for (body, expected) in [
            ("", Field::Missing),
            ("{}", Field::Missing),
            ("[]", Field::Missing),
            (r#" [{"a":1}] "#, Field::Missing),
            ("\u{feff}{\"a\":null}", Field::Null),
            (r#"{"a" : null }"#, Field::Null),
            (r#"{"a":true}"#, Field::Bool(true)),
            (r#"{"a":false}"#, Field::Bool(false)),
            (r#"{"a": 20.00001 }"#, text("number 20.00001")),
            (r#"{"a":1e999}"#, text("number 1e999")),
            (r#"{"a":-0}"#, text("number -0")),
            (r#"{"a":"\u00e9\n\u0000"}"#, text("é\n\0")),
            (r#"{"a":"\ud83c\udfab"}"#, text("🎫")),
            (r#"{"a":"\ud800"}"#, Field::Unreadable),
            (r#"{"a":{}}"#, Field::Other),
            (r#"{"a":["x"]}"#, Field::Other),
            (r#"{"a":1,"a":2}"#, text("number 2")),
            (r#"{"\u0061":1}"#, text("number 1")),
            (r#"{"b":1e999,"c":"\ud800"}"#, Field::Missing),
        ] {
            assert_eq!(field_of(body), expected, "{body}");
        }
    }

    #[test]
    fn what_is_no_object_or_array_is_malformed() {
        let bodies: [&[u8]; 13] = [
            b" ",
            b"null",
            b"1",
            b"\"text\"",
            b"true",
            b"{",
            b"{\"a\":}",
            b"{\"a\":01}",
            b"{\"a\":NaN}",
            b"{'a':1}",
            b"{} {}",
            b"[1,]",
            b"{\"a\":\"\xff\"}",
        ];
        for body in bodies {
            assert!(matches!(JsonBody::parse(body), Err(ApiError::BadRequest)), "{}", String::from_utf8_lossy(body));
        }
    }

    #[test]
    fn deep_nesting_does_not_overflow_the_stack() {
        assert!(JsonBody::parse("[".repeat(LIMIT).as_bytes()).is_err());
        let deep = format!("{}{}", "[".repeat(LIMIT / 2), "]".repeat(LIMIT / 2));
        assert!(JsonBody::parse(deep.as_bytes()).is_ok());
        assert_eq!(field_of(&format!(r#"{{"a":{deep}}}"#)), Field::Other);
        assert!(JsonBody::parse(r#"{"a":"#.repeat(LIMIT / 5).as_bytes()).is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_never_ends_is_given_up() {
        let endless = futures::stream::pending::<Result<Vec<u8>, std::io::Error>>();
        let received = receive(&Bodies::new(LIMIT), &HeaderMap::new(), Body::from_stream(endless)).await;
        assert!(matches!(received, Err(ApiError::TooSlow)));
    }
}
