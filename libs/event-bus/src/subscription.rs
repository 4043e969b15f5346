//! Applying: a durable consumer of another service's stream, shared by all replicas of this one.
//!
//! Messages that have arrived are applied in one transaction and acknowledged after its commit. No other code
//! acknowledges.
//!
//! What if we die …
//! - before the commit: nothing was applied; the server redelivers after `ack_wait`.
//! - between commit and ack: the server redelivers, and the handler skips the events because they are not newer.
//!   `events_replayed_doubled_and_shuffled_leave_the_replica_unchanged` shows it.
//! - while a dead letter is stored: the message is terminated only afterwards, and storing it twice changes nothing.
//! - on SIGTERM, this is a graceful shutdown: no more messages are requested, and those that were requested are applied
//!   and acknowledged, so nothing is redelivered after a restart. `a_stop_under_load_leaves_nothing_to_redeliver` shows
//!   it.
//!
//! An event that cannot be applied does not delay others: when a batch fails, its events are applied one by one. The
//! aggregates of events that fail alone are remembered, and their events stay out of later batches.

mod apply;
mod measure;
mod messages;
mod missed;
mod reapply;

use crate::broker::Broker;
use crate::connection::Transaction;
use crate::database::Database;
use crate::dead_letters::{self, FailedAttempt, Letter, Verdict};
use crate::error::{Error, is_outage};
use crate::headers::Headers;
use crate::meters;
use crate::pull::Pull;
use crate::retry::{Backoff, exponential};
use crate::settings::Settings;
use apply::{Failure, Locks};
use async_nats::header;
use async_nats::jetstream::{AckKind, Message};
use event_bus_core::Event;
use messages::{ACK, Deliveries, acknowledge, decode, postpone, send};
use std::collections::HashMap;
use std::future::Future;
use std::ops::Deref;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

/// Applies the events of another service.
pub trait Handler: Send + Sync + 'static {
    /// The events of the stream.
    type Event: Event;

    /// Whether a database that is recovered gets the events from the newest to the oldest one: then the older ones change nothing, and
    /// states in between do not appear again. False if not versions decide, but which event is applied first. Default: true.
    const NEWEST_FIRST: bool = true;

    /// Whether the owner of the stream has snapshots ([`Bus::relay_with`](crate::Bus::relay_with)), from which missed events are made
    /// up for. If not, a person has to do it.
    const HAS_OWNER: bool = true;

    /// Applies `events` inside `tx`: in stream order, or against it (see [`NEWEST_FIRST`](Self::NEWEST_FIRST)).
    ///
    /// It must be idempotent: the same events, in any order and number, lead to the same state. Apply an event if its
    /// version is newer than the stored one, and ignore it otherwise.
    ///
    /// # Errors
    /// An error rolls the transaction back. In an outage of Postgres, the bus waits and tries again. If another
    /// transaction has locked a row, the event is tried again until the lock is released. After any other error, or a
    /// panic, the events are applied one by one. The failure of a single event is a failed attempt: after
    /// [`Settings::attempts`] of them the event becomes a dead letter.
    fn apply(
        &self,
        tx: &mut Transaction,
        events: &[Received<Self::Event>],
    ) -> impl Future<Output = anyhow::Result<()>> + Send;
}

/// An event of the stream, with its headers.
#[derive(Debug, Clone)]
pub struct Received<E> {
    /// What happened.
    pub event: E,
    /// The headers of the application.
    pub headers: Headers,
}

impl<E> Deref for Received<E> {
    type Target = E;

    fn deref(&self) -> &E {
        &self.event
    }
}

/// After so many events in a row that wait for locks, the rest of the batch is returned without an attempt: probably
/// the whole table is locked.
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
    /// Aggregates of which an event failed alone, and when it failed.
    suspects: HashMap<String, Instant>,
    meters: meters::Applied,
    deliveries: missed::Deliveries,
}

/// What became of a batch.
#[derive(PartialEq, Eq)]
enum Outcome {
    Processed,
    /// There was an outage: the database may have come back older.
    Interrupted,
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
        meters: meters::Applied::new(H::Event::STREAM),
        deliveries: missed::Deliveries::default(),
    };
    let mut backoff = Backoff::default();
    while !stop.is_cancelled() {
        let Err(error) = subscription.consume(|| backoff.succeed(&what)).await else { break };
        subscription.meters.is_down();
        broker.provision_again(stop).await;
        let pause = backoff.fail(&what, &error);
        tokio::select! {
            () = sleep(pause) => {}
            () = stop.cancelled() => {}
        }
    }
    // Acks are only queued, and the process may end after this function.
    let _ = timeout(ACK, broker.client.flush()).await;
    // Keeps the position: nothing that was read is reported as missed after the restart.
    let _ = timeout(ACK, subscription.look_for_missed(true)).await;
    Ok(())
}

impl<H: Handler> Subscription<'_, H> {
    /// Pulls and applies until `stop`, or until the pull is lost.
    async fn consume(&mut self, mut alive: impl FnMut()) -> anyhow::Result<()> {
        self.broker.connected()?;
        let mut pull = Pull::open(self.broker, self.settings, H::Event::STREAM, self.durable).await?;
        self.look_for_missed(true).await;
        self.reapply().await;
        loop {
            let batch = pull.receive(|| !self.stop.is_cancelled()).await?;
            alive();
            self.meters.is_up();
            self.measure(&batch);
            self.look_for_gaps(&batch).await;
            if batch.is_empty() || self.process(batch).await == Outcome::Interrupted {
                self.reapply().await;
            }
            self.look_for_missed(false).await;
            if self.stop.is_cancelled() && pull.is_over() {
                return Ok(());
            }
        }
    }

    async fn process(&mut self, batch: Vec<Message>) -> Outcome {
        self.forget_suspects();
        let (mut together, mut alone, mut poison) = (Deliveries::default(), Deliveries::default(), Vec::new());
        for message in batch {
            let received = decode::<H::Event>(&message.subject, &message.payload)
                .map(|event| Received { event, headers: Headers::of_message(message.headers.as_ref()) });
            match received {
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
                Err(_) if self.apply_one_by_one(&together).await == Outcome::Interrupted => {
                    return Outcome::Interrupted;
                }
                Err(_) => {}
            }
        }
        if self.apply_one_by_one(&alone).await == Outcome::Interrupted {
            return Outcome::Interrupted;
        }
        // Last, because each message takes a statement, and there may be many.
        for (message, error) in poison {
            let event_id = message.headers.as_ref().and_then(|headers| headers.get(header::NATS_MESSAGE_ID));
            let event_id = event_id.map(ToString::to_string);
            self.failed(&message, event_id, error, false).await;
        }
        Outcome::Processed
    }

    /// Applies each event in a transaction of its own, so that one failure does not affect the others.
    async fn apply_one_by_one(&mut self, deliveries: &Deliveries<H::Event>) -> Outcome {
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
                    self.failed(&message[0], event_id, error, true).await;
                }
                Err(Failure::Outage(error)) => return self.wait_out(&error, &deliveries.messages[number..]).await,
            }
        }
        Outcome::Processed
    }

    fn no_longer_suspect(&mut self, aggregate: &str) {
        if self.suspects.remove(aggregate).is_some() {
            self.forget_suspects();
        }
    }

    /// Forgets aggregates that have not failed for a while: another replica may have applied their events.
    fn forget_suspects(&mut self) {
        self.suspects.retain(|_, failed| failed.elapsed() < SUSPECT);
        if self.suspects.is_empty() {
            self.locked.succeed(&format!("applying {}: waiting for locks", H::Event::STREAM));
        }
    }

    /// Records a failed attempt. The message is redelivered later, or terminated if it is a dead letter.
    async fn failed(&mut self, message: &Message, event_id: Option<String>, error: String, retryable: bool) {
        match self.record(message, event_id.as_deref(), &error, retryable).await {
            Ok(Verdict::Dead) => {
                tracing::error!(subject = %message.subject, event_id, error, "an event became a dead letter");
                self.meters.dead_letters.increment(1);
                send(message, AckKind::Term).await;
            }
            Ok(Verdict::Retry { attempts }) => {
                self.meters.failed_attempts.increment(1);
                tracing::warn!(subject = %message.subject, event_id, error, attempts, "an event is tried again later");
                send(message, AckKind::Nak(Some(exponential(self.settings.retry_delay, attempts)))).await;
            }
            Ok(Verdict::Superseded) => {
                self.meters.superseded.increment(1);
                send(message, AckKind::Term).await;
            }
            Err(error) if is_outage(&error) => {
                self.wait_out(&error, std::slice::from_ref(message)).await;
            }
            Err(error) => {
                tracing::error!(subject = %message.subject, event_id, "cannot store a dead letter: {error:#}");
                send(message, AckKind::Nak(Some(UNSTORABLE))).await;
            }
        }
    }

    async fn record(
        &self,
        message: &Message,
        event_id: Option<&str>,
        error: &str,
        retryable: bool,
    ) -> anyhow::Result<Verdict> {
        let attempt = FailedAttempt { letter: Letter::of_delivery(message)?, event_id, error, retryable };
        let mut db = self.database.background_connection().await?;
        let recorded = dead_letters::record(&mut db, &attempt, self.settings.attempts);
        let limit = self.settings.apply_timeout;
        timeout(limit, recorded).await.map_err(|_| Error::NoAnswer(limit))?
    }

    /// Postgres is away, or is being recovered: returns `messages` to the server, which redelivers them to any replica, and waits until
    /// Postgres answers.
    async fn wait_out(&mut self, error: &anyhow::Error, messages: &[Message]) -> Outcome {
        let what = format!("applying {}", H::Event::STREAM);
        let delay = self.outage.fail(&what, error);
        for message in messages {
            send(message, AckKind::Nak(Some(delay))).await;
        }
        let mut pause = delay;
        while self.stop.run_until_cancelled(sleep(pause)).await.is_some() {
            if self.database.answers().await {
                self.outage.succeed(&what);
                break;
            }
            pause = self.outage.fail(&what, error);
        }
        Outcome::Interrupted
    }
}
