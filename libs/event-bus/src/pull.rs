//! Pulling from a durable consumer, one request at a time.
//!
//! The endless stream of the client library always has an open request. Messages that the server delivers to it after
//! the subscription has stopped are redelivered only after `ack_wait`. Here the subscription sees the end of each
//! request: filled, expired or refused. If it stops requesting and reads to the end, no delivered message is left
//! without an ack.

use crate::broker::Broker;
use crate::settings::Settings;
use anyhow::{Context, bail};
use async_nats::jetstream::{self, Message};
use async_nats::{Request, StatusCode, Subscriber};
use futures::{FutureExt, StreamExt};
use serde_json::json;
use std::time::Duration;
use tokio::time::timeout;

/// How long a request may wait for messages; also how long stopping an idle subscription can take.
const EXPIRES: Duration = Duration::from_secs(2);
/// How often the server sends a heartbeat for an idle request.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// After this long without a message or a heartbeat, the request or its messages were lost: two and a half heartbeats.
const SILENCE: Duration = Duration::from_millis(2500);
/// The delay after a refused request.
const REFUSED: Duration = Duration::from_millis(250);

pub(crate) struct Pull {
    jetstream: jetstream::Context,
    /// The subject of requests, without the prefix of the JetStream API.
    next: String,
    /// The subject to which messages are delivered. One subscription for all requests.
    inbox: String,
    messages: Subscriber,
    /// Messages per request.
    batch: usize,
    /// Bytes per request.
    bytes: usize,
    /// Messages that the server may still send for the open request; 0 if no request is open.
    due: usize,
}

impl Pull {
    /// Opens a subscription, without a request. Two batches may be in memory: one is applied while the next one
    /// arrives.
    pub(crate) async fn open(
        broker: &Broker,
        settings: &Settings,
        stream: &str,
        durable: &str,
    ) -> anyhow::Result<Self> {
        let client = &broker.client;
        let inbox = client.new_inbox();
        Ok(Self {
            jetstream: broker.jetstream.clone(),
            next: format!("CONSUMER.MSG.NEXT.{stream}.{durable}"),
            messages: client.subscribe(inbox.clone()).await?,
            inbox,
            batch: settings.apply_events,
            bytes: settings.apply_bytes,
            due: 0,
        })
    }

    /// The messages that have arrived. Waits for the first one until the open request ends, and returns none if it ends
    /// without a message.
    ///
    /// While `more` returns true, sends the next request as soon as one has ended: the server fills it while the caller
    /// applies this batch.
    ///
    /// # Errors
    /// The request was lost: open a new `Pull`.
    pub(crate) async fn receive(&mut self, more: impl Fn() -> bool) -> anyhow::Result<Vec<Message>> {
        let mut batch = Vec::new();
        if more() && self.is_over() {
            self.request().await?;
        }
        while self.due > 0 && batch.is_empty() {
            let message = timeout(SILENCE, self.messages.next()).await.context("no heartbeat from the consumer")?;
            self.take(message, &mut batch).await?;
        }
        while self.due > 0 && batch.len() < self.batch {
            let Some(message) = self.messages.next().now_or_never() else { break };
            self.take(message, &mut batch).await?;
        }
        if more() && self.is_over() {
            self.request().await?;
        }
        Ok(batch)
    }

    /// Whether no request is open: nothing more will be delivered.
    pub(crate) fn is_over(&self) -> bool {
        self.due == 0
    }

    async fn request(&mut self) -> anyhow::Result<()> {
        let request = json!({
            "batch": self.batch,
            "max_bytes": self.bytes,
            "expires": u64::try_from(EXPIRES.as_nanos())?,
            "idle_heartbeat": u64::try_from(HEARTBEAT.as_nanos())?,
        });
        let request = Request::new().inbox(self.inbox.clone()).payload(request.to_string().into());
        let publish = self.jetstream.send_request(self.next.clone(), request);
        timeout(SILENCE, publish).await.context("cannot send a request: the connection to NATS is blocked")??;
        self.due = self.batch;
        Ok(())
    }

    async fn take(&mut self, message: Option<async_nats::Message>, batch: &mut Vec<Message>) -> anyhow::Result<()> {
        let message = message.context("the subscription ended")?;
        match message.status {
            None => {
                self.due -= 1;
                batch.push(Message { message, context: self.jetstream.clone() });
            }
            Some(StatusCode::IDLE_HEARTBEAT) => {}
            // The request has ended: it expired, or reached its limit of messages or bytes. In a cluster this status
            // may overtake the last messages, so subtract only the messages that will not be sent.
            Some(StatusCode::TIMEOUT | StatusCode::REQUEST_TERMINATED) if let Some(unsent) = unsent(&message) => {
                self.due = self.due.saturating_sub(unsent);
                if unsent == self.batch && message.status == Some(StatusCode::REQUEST_TERMINATED) {
                    bail!("the next message is larger than {} bytes: raise apply_bytes", self.bytes);
                }
            }
            // No message will be sent.
            Some(StatusCode::TIMEOUT | StatusCode::NOT_FOUND) => self.due = 0,
            Some(StatusCode::NO_RESPONDERS) => {
                self.due = 0;
                tokio::time::sleep(REFUSED).await;
                bail!("the consumer does not exist: run the command `provision`");
            }
            Some(status) => {
                self.due = 0;
                let reason = message.description.as_deref().unwrap_or("no reason given");
                tokio::time::sleep(REFUSED).await;
                if batch.is_empty() {
                    bail!("the server ended the request: {status} {reason}");
                }
            }
        }
        Ok(())
    }
}

/// How many messages of an ended request will not be sent, if the status has this header.
fn unsent(message: &async_nats::Message) -> Option<usize> {
    message.headers.as_ref()?.get("Nats-Pending-Messages")?.as_str().parse().ok()
}
