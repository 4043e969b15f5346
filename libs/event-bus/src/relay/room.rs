//! What the relay does with a stream that has little room, or none.
//!
//! The outbox waits: nothing is lost, and requests are not delayed. As soon as there is room, the events are published in order.

use super::outbox::Limits;
use super::{Relay, SINGLE};
use crate::retry::{Backoff, jitter};
use crate::window::Trimmed;
use anyhow::anyhow;
use async_nats::jetstream::stream::Config;
use std::time::Duration;
use tokio::time::Instant;

/// A stream that is full for less than this long is no error: its consumers are about to acknowledge what fills it.
const BRIEFLY: Duration = Duration::from_secs(5);
/// How long to wait while a stream is full briefly.
const AGAIN: Duration = Duration::from_millis(50);
/// A batch takes at most this part of a stream: it has to fit beside the window.
const PART: usize = 8;
/// About what the server stores of an event beside its body.
const OVERHEAD: usize = 512;

/// The most bytes and messages that a stream may have.
#[derive(Clone, Copy)]
pub(super) struct Room {
    bytes: usize,
    messages: usize,
}

impl Default for Room {
    fn default() -> Self {
        Self { bytes: usize::MAX, messages: usize::MAX }
    }
}

impl Room {
    pub(super) fn of(config: &Config) -> Self {
        // Not positive: there is no limit.
        let limit = |limit: i64| usize::try_from(limit).ok().filter(|limit| *limit > 0).unwrap_or(usize::MAX);
        Self { bytes: limit(config.max_bytes), messages: limit(config.max_messages) }
    }
}

impl Relay<'_> {
    pub(super) fn limits(&self) -> Limits {
        let Room { bytes, messages } = self.room;
        let single = self.refused_batch.is_some_and(|refused| refused.elapsed() < SINGLE);
        let fit = (messages / PART).min(bytes / PART / OVERHEAD).max(1);
        Limits {
            events: if single { 1 } else { self.settings.publish_events.min(fit) },
            bytes: self.settings.publish_bytes.min(bytes / PART).max(1),
        }
    }

    /// The stream is full: trims it. Returns how long to wait before the next attempt.
    pub(super) async fn make_room(&mut self, what: &str, backoff: &mut Backoff) -> Duration {
        let since = *self.full.get_or_insert_with(Instant::now);
        let error = match self.window.trim().await {
            Ok(Trimmed { purged: 1.., .. }) => return Duration::ZERO,
            Ok(Trimmed { usage, .. }) => anyhow!("the stream is full: {usage}"),
            Err(error) => error.context("the stream is full, and cannot be trimmed"),
        };
        if since.elapsed() < BRIEFLY {
            return jitter(AGAIN);
        }
        backoff.alarm(what, &error.context("events wait in the outbox until there is room"))
    }
}
