//! Publishing: `bus.outbox` → JetStream, each event once and in order, at the position the relay expects.
//!
//! A step is one transaction: lock the stream, read the oldest rows of the outbox, publish them on the condition that
//! the stream ends at `last_seq`, delete them and move `last_seq`, commit.
//!
//! What if we die, or are frozen …
//! - before publishing: Postgres releases the lock with the connection; nothing was published.
//! - between publishing and commit: the rows are still there and `last_seq` is old. The server refuses the publish of
//!   the next relay (*wrong last sequence*). The relay reads the messages after `last_seq`, and deletes their rows.
//!   `kill_nine_between_publish_and_delete_loses_and_doubles_nothing` shows it.
//! - and continue after another replica took over: our publish expects a position that is taken, so the server refuses
//!   it. `idle_in_transaction_session_timeout` has ended our transaction. `a_stale_batch_is_refused_as_a_whole` and
//!   `a_relay_frozen_after_publishing_is_taken_over_and_harmless_when_it_thaws` show it.
//!
//! Several events are one atomic batch, which the server stores whole or not at all. A chain of single messages, each
//! with its own expected position, is not safe: if the chains of a stale and of a new relay interleave at the server,
//! messages of the new relay may fill the stream up to the position that a later message of the stale chain expects.
//!
//! While NATS is away, the relay opens no transaction, and events wait in the outbox. If stream and database do not
//! agree, see `reconcile`.

mod floor;
mod outbox;
mod publish;
mod reconcile;

use crate::broker::Broker;
use crate::connection::Transaction;
use crate::database::Database;
use crate::duties::Duties;
use crate::retry::{Backoff, jitter};
use crate::settings::Settings;
use anyhow::Context;
use floor::Floor;
use outbox::{Batch, Limits, Position};
use publish::Published;
use reconcile::LostHistory;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

/// Under load the relay waits this long for a batch to fill: a batch costs six round trips and writes to two disks.
const COALESCE: Duration = Duration::from_millis(5);
/// How often to look for rows without being woken, such as the rows of a replica that died.
const POLL: Duration = Duration::from_millis(500);
/// How long to wait while another replica relays.
const CONTENDED: Duration = Duration::from_millis(20);
/// How long a step may take before the connection to Postgres counts as dead.
const STEP: Duration = Duration::from_secs(20);
/// How long a stream gets single events after it has refused an atomic batch.
const SINGLE: Duration = Duration::from_mins(10);
/// How often a relay with nothing to publish compares the end of the stream with its position.
const COMPARE: Duration = Duration::from_secs(30);

/// How long a stream may seem to be too short before that is an error: a node that was cut off from its cluster replies
/// with old state for some seconds.
const CUT_OFF: Duration = Duration::from_secs(15);

enum Step {
    /// More events wait, or the stream has to be read again.
    More,
    /// Several events were published, so more will probably come soon.
    Busy,
    /// All events that were committed before the step began are published.
    Done,
    /// Another replica is relaying.
    Contended,
    /// Nothing was stored: the next step publishes single events.
    Again,
}

/// The relay of one stream in this process.
struct Relay<'a> {
    database: &'a Database,
    broker: &'a Broker,
    settings: &'a Settings,
    duties: &'a Duties,
    stream: &'static str,
    stop: &'a CancellationToken,
    /// When the stream refused an atomic batch. Kept after a failure, unlike `known`: else the next step would send a
    /// batch again.
    refused_batch: Option<Instant>,
    known: Known,
}

/// What the relay knows of the database and the stream. Forgotten after a failure.
#[derive(Default)]
struct Known {
    floor: Floor,
    /// When the stream last ended at our position.
    compared: Option<Instant>,
    /// The last position that this relay has committed.
    committed: Option<Position>,
}

/// Relays `stream` until `stop`, then publishes the rest, until the first error.
pub(crate) async fn run(
    database: &Database,
    broker: &Broker,
    settings: &Settings,
    duties: &Duties,
    stream: &'static str,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let what = format!("publishing to {stream}");
    let mut backoff = Backoff::default();
    let mut work = database.commits();
    let mut relay =
        Relay { database, broker, settings, duties, stream, stop, refused_batch: None, known: Known::default() };
    // Since when the stream has been too short.
    let mut lost: Option<Instant> = None;
    while let Err(error) = relay.register().await {
        if stop.run_until_cancelled(sleep(backoff.fail(&what, &error))).await.is_none() {
            return Ok(());
        }
    }
    loop {
        let step = timeout(STEP, relay.look_and_step()).await.context("Postgres does not answer");
        let pause = match step.flatten() {
            Ok(step) => {
                // After these it is unknown whether publishing works again.
                if !matches!(step, Step::Contended | Step::Again) {
                    backoff.succeed(&what);
                    lost = None;
                }
                match step {
                    Step::More | Step::Again => Duration::ZERO,
                    Step::Busy if stop.is_cancelled() => Duration::ZERO,
                    Step::Busy => COALESCE,
                    // The replica that holds the lock publishes the rest, or a replica does after a restart.
                    Step::Contended | Step::Done if stop.is_cancelled() => return Ok(()),
                    Step::Contended => jitter(CONTENDED),
                    Step::Done => {
                        wait_for_work(&mut work, stop).await;
                        Duration::ZERO
                    }
                }
            }
            Err(_) if stop.is_cancelled() => return Ok(()),
            Err(error) => {
                // After an outage, the database or the stream may have another state.
                relay.known = Known::default();
                broker.provision_again(stop).await;
                match error.downcast_ref() {
                    Some(LostHistory::Broker { .. }) if lost.get_or_insert_with(Instant::now).elapsed() < CUT_OFF => {
                        backoff.fail(&what, &error)
                    }
                    Some(LostHistory::Broker { .. } | LostHistory::Database { .. }) => backoff.alarm(&what, &error),
                    None => backoff.fail(&what, &error),
                }
            }
        };
        tokio::select! {
            () = sleep(pause) => {}
            () = stop.cancelled(), if !pause.is_zero() => {}
        }
    }
}

async fn wait_for_work(work: &mut watch::Receiver<u64>, stop: &CancellationToken) {
    tokio::select! {
        _ = work.changed() => {}
        () = sleep(jitter(POLL)) => {}
        () = stop.cancelled() => {}
    }
}

impl Relay<'_> {
    /// Inserts the row that is the lock of the stream, if it does not exist yet.
    async fn register(&self) -> anyhow::Result<()> {
        let mut db = self.database.background_connection().await?;
        let lock = sqlx::query!("insert into bus.relay (stream) values ($1) on conflict do nothing", self.stream);
        lock.execute(&mut *db).await?;
        Ok(())
    }

    async fn look_and_step(&mut self) -> anyhow::Result<Step> {
        self.duties.look_for_forgotten(self.database).await;
        self.step().await
    }

    /// One transaction of the relay.
    async fn step(&mut self) -> anyhow::Result<Step> {
        let Self { broker, settings, stream, .. } = *self;
        broker.connected()?;
        let mut tx = self.database.begin_in_background(outbox::BEGIN).await?;
        let Some(mut position) = outbox::lock(&mut tx, stream).await? else {
            tx.rollback().await?;
            return Ok(Step::Contended);
        };
        if self.known.committed.is_some_and(|last| position.last_seq < last.last_seq || position.floor < last.floor) {
            // Set back by hand: the floor is no longer proven.
            self.known.floor = Floor::default();
        }
        position.floor = self.known.floor.proven().max(position.floor);
        // A separate statement: the snapshot of the locking one may still contain rows that the relay before has
        // deleted.
        let batch = outbox::oldest(&mut tx, stream, position.floor, self.limits()).await?;
        if batch.rows.is_empty() {
            return self.idle(tx, position).await;
        }
        let published = publish::publish(broker, stream, position.last_seq, &batch.rows);
        let step = match timeout(settings.publish_timeout, published).await.context(
            "the server did not confirm in time; if this continues, it cannot store (disk full?): see its /healthz",
        )?? {
            Published::UpTo(seq) => {
                outbox::move_on(&mut tx, stream, position, seq, &batch.ids()).await?;
                let writers = if self.known.floor.is_due() { Some(floor::writers(&mut tx).await?) } else { None };
                tx.commit().await?;
                self.known.committed = Some(Position { last_seq: seq, ..position });
                // Only after the commit are these rows deleted.
                if let (Some(writers), Some(last)) = (writers, batch.rows.last()) {
                    self.known.floor.passed(last.id, writers);
                }
                self.after(&batch)
            }
            Published::Singly => {
                tx.rollback().await?;
                tracing::warn!(
                    stream,
                    "the stream takes no atomic batches: events are published one by one, which is slow, and the \
                     events of a transaction are not published together; set allow_atomic on the stream"
                );
                self.refused_batch = Some(Instant::now());
                return Ok(Step::Again);
            }
            Published::Elsewhere => {
                reconcile::reconcile(broker, &mut tx, stream, position).await?;
                tx.commit().await?;
                Step::More
            }
        };
        self.known.compared = Some(Instant::now());
        Ok(step)
    }

    fn limits(&self) -> Limits {
        let single = self.refused_batch.is_some_and(|refused| refused.elapsed() < SINGLE);
        Limits { events: if single { 1 } else { self.settings.publish_events }, bytes: self.settings.publish_bytes }
    }

    fn after(&self, batch: &Batch) -> Step {
        match batch.rows.len() {
            _ if batch.more => Step::More,
            // No other row waited; a row that was committed since has woken the relay.
            1 if !self.stop.is_cancelled() => Step::Done,
            // Under heavy load, more rows have been committed by now.
            events if events >= self.settings.publish_events / 2 => Step::More,
            _ => Step::Busy,
        }
    }

    /// No row waits. From time to time, checks that the floor and the stream are as expected.
    async fn idle(&mut self, mut tx: Transaction, position: Position) -> anyhow::Result<Step> {
        if floor::is_too_high(&mut tx, position.floor).await? {
            tracing::warn!(stream = self.stream, "the ids of bus.outbox have restarted; reading all rows");
            (self.known.floor, self.known.committed) = (Floor::default(), None);
            outbox::forget_floor(&mut tx, self.stream).await?;
            tx.commit().await?;
            return Ok(Step::More);
        }
        if self.known.compared.is_none_or(|last| last.elapsed() > COMPARE) && !self.stop.is_cancelled() {
            reconcile::compare(self.broker, &mut tx, self.stream, position).await?;
            tx.commit().await?;
            self.known.compared = Some(Instant::now());
        } else {
            tx.rollback().await?;
        }
        Ok(Step::Done)
    }
}
