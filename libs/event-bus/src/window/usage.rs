//! How full a stream is, and why, for the log.

use super::Reader;
use async_nats::jetstream::stream::{Config, State};
use sqlx::types::time::OffsetDateTime;
use std::fmt;

/// How full a stream is, and which consumer prevents that it is trimmed.
pub(crate) struct Usage {
    stream: &'static str,
    pub(super) bytes: u64,
    max_bytes: i64,
    messages: u64,
    max_messages: i64,
    last: OffsetDateTime,
    /// The consumer that has acknowledged least, if messages outside of the window wait for it.
    holder: Option<Reader>,
}

impl Usage {
    pub(super) fn new(stream: &'static str, state: &State, config: &Config, holder: Option<Reader>) -> Self {
        Self {
            stream,
            bytes: state.bytes,
            max_bytes: config.max_bytes,
            messages: state.messages,
            max_messages: config.max_messages,
            last: state.last_timestamp,
            holder,
        }
    }

    /// After `purged` messages of medium size were purged.
    pub(super) fn without(self, purged: u64) -> Self {
        let messages = self.messages.saturating_sub(purged);
        let bytes = u128::from(self.bytes) * u128::from(messages) / u128::from(self.messages.max(1));
        Self { messages, bytes: u64::try_from(bytes).unwrap_or(self.bytes), ..self }
    }

    /// Whether more than three quarters of what the stream may have are used.
    pub(super) fn is_high(&self) -> bool {
        let is_high = |used: u64, max: i64| u64::try_from(max).is_ok_and(|max| max > 0 && used > max - max / 4);
        is_high(self.bytes, self.max_bytes) || is_high(self.messages, self.max_messages)
    }
}

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { stream, bytes, max_bytes, messages, max_messages, last, .. } = self;
        write!(
            f,
            "{stream} has {bytes} of {} bytes and {messages} of {} messages",
            limit(*max_bytes),
            limit(*max_messages)
        )?;
        write!(f, ", the last one was stored at {last}. ")?;
        match &self.holder {
            Some(Reader { name, acknowledged, behind }) => write!(
                f,
                "The consumer {name} prevents trimming: it has acknowledged the events up to {acknowledged}, and {behind} wait \
                 for it. Start or mend its service; or, if nobody needs it, delete it (`nats consumer rm {stream} {name}`); or "
            )?,
            None => f.write_str("No consumer prevents trimming. Make it larger: ")?,
        }
        write!(f, "raise max_bytes or max_msgs of the stream, in its file or with `nats stream edit {stream}`")
    }
}

/// A limit of a stream.
fn limit(limit: i64) -> String {
    if limit > 0 { limit.to_string() } else { "unlimited".to_owned() }
}
