//! The NATS server: the connection, JetStream, and the streams and consumers there.

use crate::nats::{self, NatsSettings};
use crate::settings::Settings;
use crate::topology::{Drift, Provisioner};
use anyhow::Context;
use async_nats::jetstream::context::ConsumerInfoErrorKind;
use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::stream::{LastRawMessageErrorKind, Stream};
use async_nats::{Client, jetstream};
use futures::future::try_join_all;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

/// How often to check the connection at the start.
const CONNECTING: Duration = Duration::from_millis(50);

/// How long the broker may take to say whether a consumer exists. The relay has locked its stream meanwhile.
const GONE: Duration = Duration::from_secs(1);
/// Messages that are requested at a time, if they are large: each may have a megabyte, and arrives in base64.
const FEWEST: usize = 4;
/// Messages that are requested at a time, if they are small.
const MOST: usize = 64;

/// The NATS server, or its cluster. Clones share everything.
#[derive(Clone)]
pub(crate) struct Broker {
    pub(crate) client: Client,
    pub(crate) jetstream: jetstream::Context,
    /// The JetStream domain, if it differs from that of the connected server.
    pub(crate) domain: Option<String>,
    /// Creates streams and consumers, if this service does.
    provisioner: Option<Arc<Provisioner>>,
}

impl Broker {
    /// Connects in the background: NATS may start later.
    pub(crate) async fn connect(settings: &Settings) -> anyhow::Result<Self> {
        let broker = Self::of(&settings.nats, settings.service, &settings.client).await?;
        let jetstream = broker.jetstream.clone();
        let provisioner =
            || Provisioner::new(jetstream.clone(), settings.topology.clone(), settings.nats.stream_replicas);
        let provisioner = settings.provision.then(|| Arc::new(provisioner()));
        Ok(Self { provisioner, ..broker })
    }

    /// The same, without provisioning. `service` is the prefix of the inbox.
    pub(crate) async fn of(settings: &NatsSettings, service: &str, client: &str) -> anyhow::Result<Self> {
        let client = nats::connect(settings, service, client).await?;
        let jetstream = nats::jetstream(settings, client.clone());
        Ok(Self { client, jetstream, domain: settings.domain.clone(), provisioner: None })
    }

    /// Fails at once if NATS is not connected. Call it before work that would wait for NATS while it holds a lock or a
    /// connection to Postgres.
    pub(crate) fn connected(&self) -> anyhow::Result<()> {
        nats::connected(&self.client)
    }

    /// How many connections there have been. Another server may be behind a new one, or the same with another store.
    pub(crate) fn connects(&self) -> u64 {
        self.client.statistics().connects.load(Ordering::Relaxed)
    }

    /// Waits until there is a connection. Logs nothing: the client logs why it cannot connect.
    pub(crate) async fn wait_connected(&self) {
        while self.connected().is_err() {
            sleep(CONNECTING).await;
        }
    }

    /// Creates the streams and consumers that are missing, if this service provisions.
    pub(crate) async fn provision(&self, drift: Drift) -> anyhow::Result<()> {
        let Some(provisioner) = &self.provisioner else { return Ok(()) };
        self.connected()?;
        provisioner.ensure(drift).await
    }

    /// Creates streams and consumers that are missing, after a failure. Ignores errors: the caller tries again, and
    /// logs its own error.
    pub(crate) async fn provision_again(&self, stop: &CancellationToken) {
        let _ = stop.run_until_cancelled(self.provision(Drift::Leave)).await;
    }

    /// Whether the broker says that a consumer of an existing stream does not exist. False without a reply: perhaps the right is missing.
    pub(crate) async fn is_gone(&self, stream: &str, consumer: &str) -> bool {
        let info = async {
            Ok::<_, anyhow::Error>(self.jetstream.get_stream_no_info(stream).await?.consumer_info(consumer).await)
        };
        let info = timeout(GONE, info).await;
        matches!(info, Ok(Ok(Err(error))) if error.kind() == ConsumerInfoErrorKind::NotFound)
    }
}

/// The message at `seq`, from the leader: a follower may not have it yet. Returns `None` if it was deleted.
pub(crate) async fn message_at<I>(stream: &Stream<I>, seq: u64) -> anyhow::Result<Option<StreamMessage>> {
    match stream.get_raw_message(seq).await {
        Ok(message) => Ok(Some(message)),
        Err(error) if error.kind() == LastRawMessageErrorKind::NoMessageFound => Ok(None),
        Err(error) => Err(error).context("cannot read a message of the stream"),
    }
}

/// Reads messages by their sequences, several at a time.
///
/// The number of messages per read starts small. It is then chosen so that messages as large as the largest of the previous read fit into
/// `bytes`. If large messages follow small ones, one read may have up to [`MOST`] of them in flight.
pub(crate) struct Reader {
    bytes: usize,
    at_a_time: usize,
}

impl Reader {
    pub(crate) fn new(bytes: usize) -> Self {
        Self { bytes, at_a_time: FEWEST }
    }

    /// The messages at the first of `seqs`, in this order. `None` is one that was deleted.
    pub(crate) async fn read<I>(
        &mut self,
        stream: &Stream<I>,
        seqs: impl Iterator<Item = u64>,
    ) -> anyhow::Result<Vec<Option<StreamMessage>>> {
        let requests: Vec<_> = seqs.take(self.at_a_time).map(|seq| message_at(stream, seq)).collect();
        // After an error, which may have been that of large messages, it begins with few again.
        let before = std::mem::replace(&mut self.at_a_time, FEWEST);
        let messages = try_join_all(requests).await?;
        let largest = messages.iter().flatten().map(|message| message.payload.len()).max().unwrap_or_default();
        self.at_a_time = at_a_time(before, self.bytes, largest);
        Ok(messages)
    }
}

/// How many messages to request after `before` of them, the largest of which had so many bytes.
fn at_a_time(before: usize, bytes: usize, largest: usize) -> usize {
    (bytes / largest.max(1)).clamp(FEWEST, MOST).min(2 * before)
}

#[cfg(test)]
mod tests {
    use super::{FEWEST, MOST, at_a_time};

    #[test]
    fn small_messages_are_read_in_growing_numbers_and_large_ones_in_few() {
        let mut before = FEWEST;
        for expected in [8, 16, 32, MOST, MOST] {
            before = at_a_time(before, 1 << 20, 200);
            assert_eq!(before, expected);
        }
        assert_eq!(at_a_time(MOST, 1 << 20, 1 << 16), 16);
        assert_eq!(at_a_time(MOST, 1 << 20, 1 << 20), FEWEST);
    }
}
