//! Lists of any length, read from Postgres and written to the client page by page.
//!
//! A short list is an ordinary response. A long one is streamed: a page is read only when the client has read the one
//! before, and no connection to Postgres is held in between. After an error the connection is closed before the end of
//! the response, so that the client sees that the list is incomplete. A list is not a snapshot: changes during the
//! writing may be in it.

use std::borrow::Borrow;
use std::io;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use anyhow::anyhow;
use axum::body::{Body, Bytes};
use axum::extract::{FromRequestParts, Query};
use axum::http::header::{CONTENT_TYPE, HeaderValue};
use axum::http::request::Parts;
use axum::response::{IntoResponse as _, Response};
use contracts::Id;
use futures::{StreamExt as _, stream};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;
use tracing::error;

use crate::error::ApiError;
use crate::http::{Connection, Limits};
use crate::telemetry::Throttle;

/// The most rows of a page.
const ROWS: u32 = 256;

/// A page ends with the row that reaches this many bytes of text.
const BYTES: i64 = 64 * 1024;

/// The time limit for reading one page. Reading the whole list may exceed the request timeout.
const TIME: Duration = Duration::from_secs(10);

/// The query of a list, `?limit=<number>&after=<id>`.
///
/// Without it, the response has the whole list. A malformed query is a bad request.
#[derive(Debug, Clone, Copy, Deserialize)]
struct Page {
    /// The most items.
    limit: Option<NonZeroU32>,
    /// The last item of the previous page.
    after: Option<Id>,
}

/// The rows that a service has to read for one page of a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Part {
    /// Only rows created after the one with this id, if the client named one.
    pub after: Option<Id>,
    /// Only rows with a greater number.
    pub number: i64,
    /// The most rows.
    pub rows: i64,
    /// The last row is the one with which the page reaches this many bytes of text.
    pub bytes: i64,
}

/// The rows of one page, encoded while they are read.
#[derive(Debug, Default)]
pub struct Rows {
    /// The items, separated by commas.
    json: Vec<u8>,
    count: u32,
    /// Bytes of text in all rows.
    bytes: i64,
    /// The number of the last row.
    last: Option<i64>,
}

impl Rows {
    /// Appends a row. `number` orders the list; `bytes` is the text in this row and all before it on its page; `item` is what
    /// the client sees.
    ///
    /// # Errors
    /// The item cannot be encoded.
    pub fn push(&mut self, number: i64, bytes: i64, item: &impl Serialize) -> serde_json::Result<()> {
        if self.count > 0 {
            self.json.push(b',');
        }
        serde_json::to_writer(&mut self.json, item)?;
        (self.count, self.bytes, self.last) = (self.count + 1, bytes, Some(number));
        Ok(())
    }
}

/// The list that a request reads.
pub struct List {
    page: Page,
    connection: Arc<Connection>,
    limits: Arc<Limits>,
}

impl<S: Send + Sync> FromRequestParts<S> for List {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let Query(page) = Query::from_request_parts(parts, state).await?;
        let extension = || ApiError::Internal(anyhow!("a list is read outside of a service"));
        let connection = parts.extensions.get().cloned().ok_or_else(extension)?;
        let limits = parts.extensions.get().cloned().ok_or_else(extension)?;
        Ok(Self { page, connection, limits })
    }
}

impl List {
    /// Responds with the rows that `read` returns.
    ///
    /// Calls `read` once for each page, never while a page is being sent.
    ///
    /// # Errors
    /// Those of the first page.
    pub async fn answer<R, F>(self, read: impl Fn(Part) -> F + Send + 'static) -> Result<Response, ApiError>
    where
        R: Borrow<Rows> + Send + 'static,
        F: Future<Output = Result<R, ApiError>> + Send + 'static,
    {
        let Self { page, connection, limits } = self;
        let left = page.limit.map(NonZeroU32::get);
        let mut reader = Reader { read, limits, connection, after: page.after, next: Some(0), left };
        let first = reader.page(vec![b'[']).await?;
        let json = [(CONTENT_TYPE, HeaderValue::from_static("application/json"))];
        if reader.next.is_none() {
            return Ok((json, first).into_response());
        }
        let under_way = reader.limits.running.token();
        let rest = stream::try_unfold((reader, under_way), async |(mut reader, under_way)| {
            if reader.next.is_none() {
                return io::Result::Ok(None);
            }
            let page = reader.page(Vec::new()).await.map_err(|error| {
                static LOG: Throttle = Throttle::new();
                if let Some(unlogged) = LOG.pass() {
                    error!(?error, unlogged, "a list broke off");
                }
                io::Error::other(error)
            })?;
            Ok(Some((page, (reader, under_way))))
        });
        Ok((json, Body::from_stream(stream::iter([io::Result::Ok(first)]).chain(rest))).into_response())
    }
}

/// Reads a list page by page.
struct Reader<R> {
    read: R,
    limits: Arc<Limits>,
    connection: Arc<Connection>,
    after: Option<Id>,
    /// The number after which the next page begins; `None` after the last row.
    next: Option<i64>,
    /// Rows that are still to be read, if the list has a limit.
    left: Option<u32>,
}

impl<R> Reader<R> {
    /// Appends the next page to `json`, and the end of the list if this is the last one.
    async fn page<P, F>(&mut self, mut json: Vec<u8>) -> Result<Bytes, ApiError>
    where
        R: Fn(Part) -> F,
        P: Borrow<Rows> + Send + 'static,
        F: Future<Output = Result<P, ApiError>> + Send + 'static,
    {
        let is_first = self.next == Some(0);
        let _reading = if is_first { None } else { Some(self.limits.pages.reading.acquire().await) };
        let room = self.limits.pages.room().await;
        let rows = self.left.map_or(ROWS, |left| left.min(ROWS));
        let part = Part { after: self.after, number: self.next.unwrap_or(i64::MAX), rows: rows.into(), bytes: BYTES };
        // On a task of its own: if the client hangs up, the statement is still read to its end.
        let page = self.limits.running.spawn(timeout(TIME, (self.read)(part)));
        let page = page.await.ok().and_then(Result::ok).ok_or(ApiError::Unavailable)??;

        let Rows { json: items, count, bytes, last } = page.borrow();
        // A comma and the end.
        json.reserve_exact(items.len() + 2);
        if !is_first && *count > 0 {
            json.push(b',');
        }
        json.extend_from_slice(items);
        self.left = self.left.map(|left| left.saturating_sub(*count));
        let is_full = *count == rows || *bytes >= BYTES;
        self.next = last.filter(|_| is_full && self.left != Some(0));
        if self.next.is_none() {
            json.push(b']');
        }
        Ok(room.send(json, self.connection.clone()))
    }
}
