//! Applying: a durable place in another service's stream, shared by all replicas of this one.
//!
//! Messages are taken as they have arrived, applied in one transaction, and acknowledged after its commit. Nobody else
//! acknowledges.
//!
//! What if we die …
//! - before the commit: nothing was applied; the server delivers again after `ack_wait`.
//! - between commit and ack: the server delivers again, and the handler's version guard finds nothing newer in it.
//!   `events_replayed_doubled_and_shuffled_leave_the_replica_unchanged` shows it.
//! - while a dead letter is being stored: it is terminated only afterwards, and storing it twice changes nothing.
//! - on SIGTERM: no more is requested, what was requested is applied and acknowledged, so a restart sees nothing twice.
//!   `a_stop_under_load_leaves_nothing_to_redeliver` shows it.

use crate::Bus;
use crate::dead_letters::{self, Refusal, Verdict};
use crate::outbox::{Connection, Transaction};
use crate::postgres::{is_outage, is_statement_timeout};
use crate::pull::Pull;
use crate::retry::{Backoff, jitter};
use async_nats::header;
use async_nats::jetstream::{AckKind, Message};
use contracts::Event;
use metrics::Counter;
use std::future::Future;
use std::time::Duration;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

/// What a service does with the events of another.
pub trait Handler: Send + Sync + 'static {
    /// The events of the stream it is subscribed to.
    type Event: Event;

    /// Applies `events`, in stream order, inside `tx`. Called again with the same events in any order and number, it
    /// must end in the same state: apply what is newer than what you have, ignore the rest.
    ///
    /// # Errors
    /// Undoes the whole transaction. An error of Postgres being away is waited out; any other counts against the event,
    /// tried alone: after five times in about 30 seconds it becomes a dead letter.
    fn apply(&self, tx: &mut Transaction, events: &[Self::Event]) -> impl Future<Output = anyhow::Result<()>> + Send;
}

/// How long one transaction may take; far below `ack_wait`, since up to two batches wait at a time.
const APPLY: Duration = Duration::from_secs(10);
/// An ack is a message of its own, and must not hold us up when the link is down.
const ACK: Duration = Duration::from_secs(1);
/// The first delay of an event that was refused; it doubles.
const REFUSED: Duration = Duration::from_secs(2);
/// The delay of a message that could not even be stored as a dead letter.
const UNSTORABLE: Duration = Duration::from_mins(1);

struct Subscription<'a, H> {
    bus: &'a Bus,
    durable: &'static str,
    handler: &'a H,
    stop: &'a CancellationToken,
    outage: Backoff,
    dead_letters: Counter,
}

/// Applies the events of `H::Event::STREAM` until `stop`.
pub(crate) async fn run<H: Handler>(
    bus: &Bus,
    durable: &'static str,
    handler: &H,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let what = format!("consuming {} as {durable}", H::Event::STREAM);
    let dead_letters = metrics::counter!("event_bus_dead_letters_total", "stream" => H::Event::STREAM);
    let mut subscription = Subscription { bus, durable, handler, stop, outage: Backoff::default(), dead_letters };
    let mut backoff = Backoff::default();
    while !stop.is_cancelled() {
        let Err(error) = subscription.consume(|| backoff.succeed(&what)).await else { break };
        bus.provision_again(stop).await;
        let pause = backoff.fail(&what, &error);
        tokio::select! {
            () = sleep(pause) => {}
            () = stop.cancelled() => {}
        }
    }
    // Acks are only queued; the process may end after this.
    let _ = timeout(ACK, bus.nats.flush()).await;
    Ok(())
}

impl<H: Handler> Subscription<'_, H> {
    /// Pulls and applies until `stop`, or until the pull is lost.
    async fn consume(&mut self, mut alive: impl FnMut()) -> anyhow::Result<()> {
        self.bus.connected()?;
        let mut pull = Pull::open(&self.bus.jetstream, H::Event::STREAM, self.durable).await?;
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
        let (mut messages, mut events, mut poison) = (Vec::new(), Vec::new(), Vec::new());
        for message in batch {
            match H::Event::decode(&message.subject, &message.payload) {
                Ok(event) => {
                    messages.push(message);
                    events.push(event);
                }
                Err(error) => poison.push((message, error)),
            }
        }
        if !events.is_empty() {
            match self.apply(&events).await {
                Ok(()) => acknowledge(&messages).await,
                Err(error) if self.blames_events(&error).await => self.isolate(&messages, &events).await,
                Err(error) => self.wait_out(&error, &messages).await,
            }
        }
        // Last: it takes a statement each, and there may be a lot of it.
        for (message, error) in poison {
            let event_id = message.headers.as_ref().and_then(|headers| headers.get(header::NATS_MESSAGE_ID));
            let event_id = event_id.map(ToString::to_string);
            self.refuse(Refusal { message: &message, event_id, error: error.to_string(), hopeless: true }).await;
        }
    }

    /// One bad event must not take its neighbours with it.
    async fn isolate(&mut self, messages: &[Message], events: &[H::Event]) {
        for (number, message) in messages.iter().enumerate() {
            match self.apply(&events[number..=number]).await {
                Ok(()) => acknowledge(&messages[number..=number]).await,
                Err(error) if self.blames_events(&error).await => {
                    let event_id = Some(events[number].event_id());
                    self.refuse(Refusal { message, event_id, error: format!("{error:#}"), hopeless: false }).await;
                }
                Err(error) => return self.wait_out(&error, &messages[number..]).await,
            }
        }
    }

    async fn apply(&self, events: &[H::Event]) -> anyhow::Result<()> {
        let applied: Vec<_> = events.iter().map(|event| (event.aggregate_id().to_string(), event.version())).collect();
        timeout(APPLY, async {
            let mut tx = Transaction::begin(&self.bus.db, &self.bus.wake).await?;
            let result = match self.handler.apply(&mut tx, events).await {
                Ok(()) => dead_letters::supersede(&mut tx, self.durable, &applied).await.map_err(Into::into),
                Err(error) => Err(error),
            };
            match result {
                Ok(()) => Ok(tx.commit().await?),
                Err(error) if database_errors(&error).any(is_outage) => Err(error),
                Err(error) => {
                    tx.rollback().await?;
                    Err(error)
                }
            }
        })
        .await
        .map_err(|_| TooSlow)?
    }

    /// Whether it is the events' own fault that they were not applied: it is not if Postgres is away. What takes too long
    /// while Postgres answers others would take as long the next time, and hold up its neighbours for ever.
    async fn blames_events(&self, error: &anyhow::Error) -> bool {
        let timed_out = error.is::<TooSlow>() || database_errors(error).any(is_statement_timeout);
        if timed_out { self.bus.is_ready().await } else { !database_errors(error).any(is_outage) }
    }

    /// Records a refusal; the message comes back later, or is done with once it is a dead letter.
    async fn refuse(&mut self, refusal: Refusal<'_>) {
        let Refusal { message, ref event_id, ref error, .. } = refusal;
        match self.store(&refusal).await {
            Ok(Verdict::Dead) => {
                tracing::error!(subject = %message.subject, event_id, error, "an event became a dead letter");
                self.dead_letters.increment(1);
                settle(message, AckKind::Term).await;
            }
            Ok(Verdict::Retry { attempts }) => {
                tracing::warn!(subject = %message.subject, event_id, error, attempts, "an event is tried again later");
                settle(message, AckKind::Nak(Some(jitter(REFUSED * 2_u32.pow(attempts - 1))))).await;
            }
            Ok(Verdict::Superseded) => settle(message, AckKind::Term).await,
            Err(error) if database_errors(&error).any(is_outage) => {
                self.wait_out(&error, std::slice::from_ref(message)).await;
            }
            Err(error) => {
                tracing::error!(subject = %message.subject, event_id, "cannot store a dead letter: {error:#}");
                settle(message, AckKind::Nak(Some(UNSTORABLE))).await;
            }
        }
    }

    async fn store(&self, refusal: &Refusal<'_>) -> anyhow::Result<Verdict> {
        let mut db = Connection::acquire(&self.bus.db).await?;
        timeout(APPLY, dead_letters::refuse(&mut db, refusal)).await.map_err(|_| sqlx::Error::PoolTimedOut)?
    }

    /// Postgres is away: hand `messages` back, to be delivered to whoever can apply them by then, and wait.
    async fn wait_out(&mut self, error: &anyhow::Error, messages: &[Message]) {
        let what = format!("applying {}", H::Event::STREAM);
        let delay = self.outage.fail(&what, error);
        for message in messages {
            settle(message, AckKind::Nak(Some(delay))).await;
        }
        let mut pause = delay;
        while self.stop.run_until_cancelled(sleep(pause)).await.is_some() {
            if self.bus.is_ready().await {
                self.outage.succeed(&what);
                return;
            }
            pause = self.outage.fail(&what, error);
        }
    }
}

fn database_errors(error: &anyhow::Error) -> impl Iterator<Item = &sqlx::Error> {
    error.chain().filter_map(|cause| cause.downcast_ref())
}

#[derive(Debug, thiserror::Error)]
#[error("applying took longer than {APPLY:?}")]
struct TooSlow;

async fn acknowledge(messages: &[Message]) {
    for message in messages {
        settle(message, AckKind::Ack).await;
    }
}

/// A lost answer costs one harmless redelivery, so it is sent once and not waited for.
async fn settle(message: &Message, kind: AckKind) {
    let _ = timeout(ACK, message.ack_with(kind)).await;
}
