//! Metrics of the consumer, from messages and replies that the subscription receives anyway: no extra requests.

use super::{Handler, Subscription};
use crate::headers::APPENDED_AT;
use async_nats::jetstream::Message;
use async_nats::jetstream::consumer::Info;
use sqlx::types::time::OffsetDateTime;

impl<H: Handler> Subscription<'_, H> {
    /// Records pending messages and redeliveries of a batch.
    pub(super) fn measure(&self, batch: &[Message]) {
        let Some(Ok(last)) = batch.last().map(Message::info) else { return };
        self.meters.pending.set(float(last.pending));
        let redelivered = batch.iter().filter(|message| message.info().is_ok_and(|info| info.delivered > 1)).count();
        self.meters.redelivered.increment(redelivered as u64);
    }

    /// The consumer, as the server describes it every 10 s.
    pub(super) fn measure_consumer(&self, consumer: &Info) {
        self.meters.pending.set(float(consumer.num_pending));
        self.meters.unacknowledged.set(float(u64::try_from(consumer.num_ack_pending).unwrap_or_default()));
    }

    /// Events that were applied, by the time of our Postgres. Those of services without the header are not measured.
    pub(super) fn measure_lag(&self, messages: &[Message], applied_at: OffsetDateTime) {
        for message in messages {
            let appended_at = message.headers.as_ref().and_then(|headers| headers.get(APPENDED_AT));
            let appended_at = appended_at.and_then(|micros| micros.as_str().parse::<i64>().ok());
            if let Some(appended_at) = appended_at
                && let Ok(appended_at) = OffsetDateTime::from_unix_timestamp_nanos(i128::from(appended_at) * 1000)
            {
                // The clocks of two databases may differ.
                self.meters.lag.record((applied_at - appended_at).as_seconds_f64().max(0.0));
            }
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "a number of messages in a stream")]
fn float(number: u64) -> f64 {
    number as f64
}
