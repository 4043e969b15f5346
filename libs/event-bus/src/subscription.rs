//! Applying: a durable place in another service's stream, shared by all replicas of this one.
//!
//! Messages that have arrived are applied in one transaction and acknowledged after its commit. No other code
//! acknowledges.
//!
//! What if we die …
//! - before the commit: nothing was applied; the server delivers again after `ack_wait`.
//! - between commit and ack: the server delivers again, and the handler's version guard finds nothing newer in it.
//!   `events_replayed_doubled_and_shuffled_leave_the_replica_unchanged` shows it.
//! - while a dead letter is being stored: it is terminated only afterwards, and storing it twice changes nothing.
//! - on SIGTERM: no more is requested, what was requested is applied and acknowledged, so a restart sees nothing twice.
//!   `a_stop_under_load_leaves_nothing_to_redeliver` shows it.
//!
//! One event that cannot be applied holds up no other: when a batch fails, its events are applied one by one, and the
//! aggregates of those that fail alone are remembered, so that their events stay out of later batches.

mod apply;

use crate::broker::Broker;
use crate::connection::Transaction;
use crate::database::Database;
use crate::dead_letters::{self, FailedAttempt, Verdict};
use crate::error::{Error, is_outage};
use crate::headers::Headers;
use crate::panics::panic_message;
use crate::pull::Pull;
use crate::retry::{Backoff, exponential, jitter};
use crate::settings::Settings;
use apply::{Failure, Locks};
use async_nats::header;
use async_nats::jetstream::{AckKind, Message};
use event_bus_core::Event;
use metrics::Counter;
use std::collections::HashMap;
use std::future::Future;
use std::ops::Deref;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

/// What a service does with the events of another.
pub trait Handler: Send + Sync + 'static {
    /// The events of the stream it is subscribed to.
    type Event: Event;

    /// Applies `events`, in stream order, inside `tx`. Called again with the same events in any order and number, it
    /// must end in the same state: apply what is newer than what you have, ignore the rest.
    ///
    /// # Errors
    /// An error undoes the whole transaction. An outage of Postgres is waited out. An event that needs a row which another
    /// transaction has locked is tried again until the lock is gone. Any other error counts against the event, tried
    /// alone, and so does a panic: after [`Settings::attempts`] of them it becomes a dead letter.
    fn apply(
        &self,
        tx: &mut Transaction,
        events: &[Received<Self::Event>],
    ) -> impl Future<Output = anyhow::Result<()>> + Send;
}

/// An event as it came out of the stream.
#[derive(Debug, Clone)]
pub struct Received<E> {
    /// What happened.
    pub event: E,
    /// What it carries beside its body.
    pub headers: Headers,
}

impl<E> Deref for Received<E> {
    type Target = E;

    fn deref(&self) -> &E {
        &self.event
    }
}

/// An ack is a message of its own, and must not hold us up when the link is down.
const ACK: Duration = Duration::from_secs(1);
/// The first delay of an event that waits for a lock; it doubles up to the second one.
const LOCKED: Duration = Duration::from_millis(500);
const LOCKED_LONG: Duration = Duration::from_secs(4);
/// So many events in a row that wait for locks: more than single rows are locked, and the rest is not tried.
const LOCKED_IN_A_ROW: usize = 8;
/// How long the events of an aggregate are kept out of batches after one of them failed.
const SUSPECT: Duration = Duration::from_mins(2);
/// The delay of a message that could not even be stored as a dead letter.
const UNSTORABLE: Duration = Duration::from_mins(1);

struct Subscription<'a, H> {
    database: &'a Database,
    broker: &'a Broker,
    settings: &'a Settings,
    durable: &'static str,
    handler: &'a H,
    stop: &'a CancellationToken,
    outage: Backoff,
    locked: Backoff,
    /// Aggregates of which an event failed when it was applied alone, and when.
    suspects: HashMap<String, Instant>,
    dead_letters: Counter,
}

/// Messages and the events in them, in the same order.
struct Deliveries<E> {
    messages: Vec<Message>,
    events: Vec<Received<E>>,
}

/// Applies the events of `H::Event::STREAM` until `stop`.
pub(crate) async fn run<H: Handler>(
    database: &Database,
    broker: &Broker,
    settings: &Settings,
    durable: &'static str,
    handler: &H,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let what = format!("consuming {} as {durable}", H::Event::STREAM);
    let mut subscription = Subscription {
        database,
        broker,
        settings,
        durable,
        handler,
        stop,
        outage: Backoff::default(),
        locked: Backoff::default(),
        suspects: HashMap::new(),
        dead_letters: metrics::counter!("event_bus_dead_letters_total", "stream" => H::Event::STREAM),
    };
    let mut backoff = Backoff::default();
    while !stop.is_cancelled() {
        let Err(error) = subscription.consume(|| backoff.succeed(&what)).await else { break };
        broker.provision_again(stop).await;
        let pause = backoff.fail(&what, &error);
        tokio::select! {
            () = sleep(pause) => {}
            () = stop.cancelled() => {}
        }
    }
    // Acks are only queued; the process may end after this.
    let _ = timeout(ACK, broker.client.flush()).await;
    Ok(())
}

impl<H: Handler> Subscription<'_, H> {
    /// Pulls and applies until `stop`, or until the pull is lost.
    async fn consume(&mut self, mut alive: impl FnMut()) -> anyhow::Result<()> {
        self.broker.connected()?;
        let mut pull = Pull::open(self.broker, self.settings, H::Event::STREAM, self.durable).await?;
        loop {
            let batch = pull.receive(|| !self.stop.is_cancelled()).await?;
            alive();
            self.process(batch).await;
            if self.stop.is_cancelled() && pull.is_over() {
                return Ok(());
            }
        }
    }

    async fn process(&mut self, batch: Vec<Message>) {
        self.forget_suspects();
        let (mut together, mut alone, mut poison) = (Deliveries::default(), Deliveries::default(), Vec::new());
        for message in batch {
            match decode::<H::Event>(&message) {
                Ok(event) if !self.suspects.is_empty() && self.suspects.contains_key(&event.aggregate_id()) => {
                    alone.push(message, event);
                }
                Ok(event) => together.push(message, event),
                Err(reason) => poison.push((message, reason)),
            }
        }
        if !together.events.is_empty() {
            match self.apply(&together.messages, &together.events, Locks::Batch).await {
                Ok(()) => acknowledge(&together.messages).await,
                Err(Failure::Outage(error)) => {
                    let others = alone.messages.into_iter().chain(poison.into_iter().map(|(message, _)| message));
                    together.messages.extend(others);
                    return self.wait_out(&error, &together.messages).await;
                }
                Err(_) => self.apply_one_by_one(&together).await,
            }
        }
        self.apply_one_by_one(&alone).await;
        // Last: it takes a statement each, and there may be a lot of it.
        for (message, error) in poison {
            let event_id = message.headers.as_ref().and_then(|headers| headers.get(header::NATS_MESSAGE_ID));
            let event_id = event_id.map(ToString::to_string);
            self.failed(FailedAttempt { message: &message, event_id, error, retryable: false }).await;
        }
    }

    /// One bad event must not take its neighbours with it.
    async fn apply_one_by_one(&mut self, deliveries: &Deliveries<H::Event>) {
        let mut locked_in_a_row = 0;
        for (number, (message, event)) in deliveries.messages.iter().zip(&deliveries.events).enumerate() {
            if locked_in_a_row == LOCKED_IN_A_ROW {
                self.suspects.insert(event.aggregate_id(), Instant::now());
                postpone(message).await;
                continue;
            }
            let (message, event) = (std::slice::from_ref(message), std::slice::from_ref(event));
            let (aggregate, event_id) = (event[0].aggregate_id(), event[0].event_id());
            match self.apply(message, event, Locks::Single).await {
                Ok(()) => {
                    locked_in_a_row = 0;
                    acknowledge(message).await;
                    self.no_longer_suspect(&aggregate);
                }
                Err(Failure::Locked(error)) => {
                    locked_in_a_row += 1;
                    self.suspects.insert(aggregate, Instant::now());
                    let what = format!("applying {}: event {event_id} waits for a lock", H::Event::STREAM);
                    self.locked.fail(&what, &error);
                    postpone(&message[0]).await;
                }
                Err(Failure::Event(error)) => {
                    self.suspects.insert(aggregate, Instant::now());
                    let (event_id, error) = (Some(event_id), format!("{error:#}"));
                    self.failed(FailedAttempt { message: &message[0], event_id, error, retryable: true }).await;
                }
                Err(Failure::Outage(error)) => return self.wait_out(&error, &deliveries.messages[number..]).await,
            }
        }
    }

    fn no_longer_suspect(&mut self, aggregate: &str) {
        if self.suspects.remove(aggregate).is_some() {
            self.forget_suspects();
        }
    }

    /// Those that have not failed for a while; another replica may have applied their events.
    fn forget_suspects(&mut self) {
        self.suspects.retain(|_, failed| failed.elapsed() < SUSPECT);
        if self.suspects.is_empty() {
            self.locked.succeed(&format!("applying {}: waiting for locks", H::Event::STREAM));
        }
    }

    /// Records a failed attempt; the message comes back later, or is done with once it is a dead letter.
    async fn failed(&mut self, attempt: FailedAttempt<'_>) {
        let FailedAttempt { message, ref event_id, ref error, .. } = attempt;
        match self.record(&attempt).await {
            Ok(Verdict::Dead) => {
                tracing::error!(subject = %message.subject, event_id, error, "an event became a dead letter");
                self.dead_letters.increment(1);
                send(message, AckKind::Term).await;
            }
            Ok(Verdict::Retry { attempts }) => {
                tracing::warn!(subject = %message.subject, event_id, error, attempts, "an event is tried again later");
                send(message, AckKind::Nak(Some(exponential(self.settings.retry_delay, attempts)))).await;
            }
            Ok(Verdict::Superseded) => send(message, AckKind::Term).await,
            Err(error) if is_outage(&error) => {
                self.wait_out(&error, std::slice::from_ref(message)).await;
            }
            Err(error) => {
                tracing::error!(subject = %message.subject, event_id, "cannot store a dead letter: {error:#}");
                send(message, AckKind::Nak(Some(UNSTORABLE))).await;
            }
        }
    }

    async fn record(&self, attempt: &FailedAttempt<'_>) -> anyhow::Result<Verdict> {
        let mut db = self.database.background_connection().await?;
        let recorded = dead_letters::record(&mut db, attempt, self.settings.attempts);
        let limit = self.settings.apply_timeout;
        timeout(limit, recorded).await.map_err(|_| Error::NoAnswer(limit))?
    }

    /// Postgres is away: hand `messages` back, to be delivered to a replica that can apply them by then, and wait.
    async fn wait_out(&mut self, error: &anyhow::Error, messages: &[Message]) {
        let what = format!("applying {}", H::Event::STREAM);
        let delay = self.outage.fail(&what, error);
        for message in messages {
            send(message, AckKind::Nak(Some(delay))).await;
        }
        let mut pause = delay;
        while self.stop.run_until_cancelled(sleep(pause)).await.is_some() {
            if self.database.is_ready().await {
                self.outage.succeed(&what);
                return;
            }
            pause = self.outage.fail(&what, error);
        }
    }
}

impl<E> Default for Deliveries<E> {
    fn default() -> Self {
        Self { messages: Vec::new(), events: Vec::new() }
    }
}

impl<E> Deliveries<E> {
    fn push(&mut self, message: Message, event: Received<E>) {
        self.messages.push(message);
        self.events.push(event);
    }
}

/// The event in a message, or why there is none.
fn decode<E: Event>(message: &Message) -> Result<Received<E>, String> {
    let decoded = catch_unwind(AssertUnwindSafe(|| E::decode(&message.subject, &message.payload)));
    match decoded {
        Ok(Ok(event)) => Ok(Received { event, headers: Headers::of_message(message.headers.as_ref()) }),
        Ok(Err(error)) => Err(error.to_string()),
        Err(panic) => Err(format!("decoding panicked: {}", panic_message(&*panic))),
    }
}

async fn acknowledge(messages: &[Message]) {
    for message in messages {
        send(message, AckKind::Ack).await;
    }
}

/// Hands back a message whose turn has not come, each time for longer.
async fn postpone(message: &Message) {
    let deliveries = message.info().map_or(1, |info| u32::try_from(info.delivered).unwrap_or(1));
    let delay = LOCKED.saturating_mul(1 << deliveries.saturating_sub(1).min(8)).min(LOCKED_LONG);
    send(message, AckKind::Nak(Some(jitter(delay)))).await;
}

/// A lost ack costs one harmless redelivery, so it is sent once and not waited for.
async fn send(message: &Message, kind: AckKind) {
    let _ = timeout(ACK, message.ack_with(kind)).await;
}
