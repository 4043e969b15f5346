//! Pulling from a durable consumer, one request at a time.
//!
//! A client library's endless stream always has a request under way; whatever the server delivers to it after the
//! reader has left waits out `ack_wait` before another reader gets it. Here each request has an end that the reader sees –
//! filled, expired or refused. A reader that stops requesting and reads to the end leaves nothing behind.

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
/// How often the server shows that an idle request is alive.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// Without a message or a heartbeat for two and a half, the request or its messages were lost.
const SILENCE: Duration = Duration::from_millis(2500);
/// A refused request is not repeated at once.
const REFUSED: Duration = Duration::from_millis(250);

pub(crate) struct Pull {
    jetstream: jetstream::Context,
    /// Where requests go, behind the prefix of the JetStream API.
    next: String,
    /// Where messages come. One subscription for all requests.
    inbox: String,
    messages: Subscriber,
    /// Messages per request.
    batch: usize,
    /// Bytes per request.
    bytes: usize,
    /// Messages that the server may still send for the request under way; 0: none is.
    due: usize,
}

impl Pull {
    /// Two requests' worth of messages is held at a time: one that is being applied, and one that arrives.
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

    /// What has arrived, waiting for the first message until the request under way ends. Empty: it ended without.
    /// While `more` is wanted, the next request is sent as soon as one has ended, so that the server fills it while the
    /// caller is busy with this batch.
    ///
    /// # Errors
    /// The request was lost: open a new `Pull`.
    pub(crate) async fn receive(&mut self, more: impl Fn() -> bool) -> anyhow::Result<Vec<Message>> {
        let mut batch = Vec::new();
        if more() && self.is_over() {
            self.request().await?;
        }
        while self.due > 0 && batch.is_empty() {
            let message = timeout(SILENCE, self.messages.next()).await.context("no sign of life from the consumer")?;
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

    /// Whether the request under way has come to its end, so that nothing more will be delivered.
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
        timeout(SILENCE, publish).await.context("the connection to NATS does not take a request")??;
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
            // The request has ended: expired, filled, or full of bytes. In a cluster this may come before the last
            // messages of the request, so it counts only those that will not come.
            Some(StatusCode::TIMEOUT | StatusCode::REQUEST_TERMINATED) if let Some(unsent) = unsent(&message) => {
                self.due = self.due.saturating_sub(unsent);
                if unsent == self.batch && message.status == Some(StatusCode::REQUEST_TERMINATED) {
                    bail!("the next message is larger than {} bytes: raise apply_bytes", self.bytes);
                }
            }
            // Nothing to wait for.
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

/// How many messages of a request that has ended will not be sent, if the server says so.
fn unsent(message: &async_nats::Message) -> Option<usize> {
    message.headers.as_ref()?.get("Nats-Pending-Messages")?.as_str().parse().ok()
}
