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
//! More than 12 events, and the events of one transaction, are one atomic batch, which the server stores whole or not at
//! all. A few events are a chain: they are sent at once, and each expects the sequence and the id of the one before. The
//! sequence alone is not enough: if the chains of a stale and of a new relay interleave at the server, messages of the new relay
//! may fill the stream up to the position that a later message of the stale chain expects. The id makes this harmless: both relays
//! publish the same event directly after the same event.
//!
//! While NATS is away, the relay opens no transaction, and events wait in the outbox. If stream and database do not
//! agree, see `heal`, `reconcile` and `recover`.

mod dry_run;
mod floor;
mod heal;
mod outbox;
mod publish;
mod reconcile;
mod recover;
mod room;
mod stored;

use crate::backpressure::Progress;
use crate::broker::Broker;
use crate::connection::Connection;
use crate::database::Database;
use crate::duties::Duties;
use crate::republish::Source;
use crate::retry::{Backoff, jitter};
use crate::settings::Settings;
use crate::window::Window;
use anyhow::{Context, bail};
pub use dry_run::{Unknown, find_unknown};
use floor::Floor;
use heal::Compared;
use outbox::{Batch, Position};
use publish::Published;
use recover::Recovering;
use room::Room;
use sqlx::types::time::OffsetDateTime;
use std::time::Duration;
use stored::LostHistory;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

/// How long the relay waits for the next batch to fill, after one of medium size: a batch costs NATS several files, and Postgres
/// two round trips and a commit.
const COALESCE: Duration = Duration::from_millis(2);
/// How often to look for rows without being woken, such as the rows of a replica that died.
const POLL: Duration = Duration::from_millis(500);
/// How long to wait while another replica relays.
const CONTENDED: Duration = Duration::from_millis(20);
/// How long a step may take before the connection to Postgres counts as dead.
const STEP: Duration = Duration::from_secs(20);
/// How long a stream gets single events after it has refused an atomic batch.
const SINGLE: Duration = Duration::from_mins(10);

/// How long a stream may seem to be too short before that is an error: a node that was cut off from its cluster replies
/// with old state for some seconds.
const CUT_OFF: Duration = Duration::from_secs(15);

enum Step {
    /// This many events were published, and more wait.
    Behind(usize),
    /// More events probably wait, or the stream has to be read again.
    More,
    /// Several events were published, so more will probably come soon.
    Busy,
    /// All events that were committed before the step began are published.
    Done,
    /// Another replica is relaying.
    Contended,
    /// Nothing was stored: the next step publishes single events.
    Again,
    /// Nothing was stored: the stream is full.
    Full,
}

/// The relay of one stream in this process.
struct Relay<'a> {
    database: &'a Database,
    broker: &'a Broker,
    settings: &'a Settings,
    duties: &'a Duties,
    stream: &'static str,
    /// The snapshots with which it heals the stream.
    source: Option<&'a dyn Source>,
    stop: &'a CancellationToken,
    /// When the stream refused an atomic batch. Kept after a failure, unlike `known`: else the next step would send a
    /// batch again.
    refused_batch: Option<Instant>,
    known: Known,
    /// Since when the stream has been too short, or another one.
    lost: Option<Instant>,
    /// Up to which position another stream was compared with the tables, and when that stream was created.
    agreed: Option<(OffsetDateTime, u64)>,
    /// The recovery of the database, if one is under way.
    recovering: Option<Recovering>,
    /// The connection of the last step, while events keep coming.
    connection: Option<Connection>,
    progress: Progress,
    /// The part of the stream that is kept.
    window: &'a Window<'a>,
    meters: crate::meters::Published,
    /// The most bytes and messages that the stream may have, if there are limits.
    room: Room,
    /// Since when the stream is full.
    full: Option<Instant>,
}

/// What the relay knows of the database and the stream. Forgotten after a failure.
#[derive(Default)]
struct Known {
    floor: Floor,
    /// When the stream was last compared, and on which connection to NATS.
    compared: Option<Instant>,
    connects: u64,
    /// The comparison after which the last checkpoint was written.
    checkpoint: Option<Instant>,
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
    source: Option<&dyn Source>,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let window = Window::new(broker, settings, stream);
    let relay = Relay {
        database,
        broker,
        settings,
        duties,
        stream,
        source,
        stop,
        refused_batch: None,
        known: Known::default(),
        lost: None,
        agreed: None,
        recovering: None,
        connection: None,
        progress: database.backpressure().relay(stream),
        window: &window,
        meters: crate::meters::Published::new(stream),
        room: Room::default(),
        full: None,
    };
    tokio::select! {
        outcome = relay.run() => outcome,
        never = window.keep() => match never {},
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
    /// Relays until `stop`.
    async fn run(mut self) -> anyhow::Result<()> {
        let (stop, broker) = (self.stop, self.broker);
        let what = format!("publishing to {}", self.stream);
        let mut backoff = Backoff::default();
        let mut work = self.database.commits();
        while let Err(error) = self.register().await {
            if stop.run_until_cancelled(sleep(backoff.fail(&what, &error))).await.is_none() {
                return Ok(());
            }
        }
        loop {
            // The step publishes what was committed before it.
            work.mark_unchanged();
            let step = timeout(STEP, self.look_and_step()).await.context("Postgres does not answer");
            match step {
                Ok(Ok(Step::Behind(events))) => self.progress.behind(events),
                _ => self.progress.not_behind(),
            }
            let pause = match step.flatten() {
                Ok(step) => {
                    // After these it is unknown whether publishing works again.
                    if !matches!(step, Step::Contended | Step::Again | Step::Full) {
                        self.full = None;
                        backoff.succeed(&what);
                    }
                    match step {
                        Step::Behind(_) | Step::More | Step::Again => Duration::ZERO,
                        Step::Busy if stop.is_cancelled() => Duration::ZERO,
                        Step::Busy => COALESCE,
                        // The replica that holds the lock publishes the rest, or a replica does after a restart.
                        Step::Contended | Step::Full if stop.is_cancelled() => return Ok(()),
                        Step::Done if stop.is_cancelled() && !work.has_changed().unwrap_or_default() => return Ok(()),
                        Step::Contended => jitter(CONTENDED),
                        Step::Full => self.make_room(&what, &mut backoff).await,
                        Step::Done => {
                            if !work.has_changed().unwrap_or_default() {
                                self.connection = None;
                            }
                            wait_for_work(&mut work, stop).await;
                            Duration::ZERO
                        }
                    }
                }
                Err(_) if stop.is_cancelled() => return Ok(()),
                Err(error) => {
                    // After an outage, the database or the stream may have another state, and the connection may be lost.
                    (self.known, self.connection) = (Known::default(), None);
                    self.duties.is_in_doubt(self.stream);
                    self.window.is_published_up_to(0);
                    if !error.is::<LostHistory>() {
                        // The stream is in doubt only as long as each look shows the same.
                        self.lost = None;
                    }
                    broker.provision_again(stop).await;
                    match error.downcast_ref() {
                        Some(LostHistory::Broker { .. }) if self.lost.is_none_or(|since| since.elapsed() < CUT_OFF) => {
                            backoff.fail(&what, &error)
                        }
                        Some(
                            LostHistory::Broker { .. } | LostHistory::Database { .. } | LostHistory::TooOld { .. },
                        ) => backoff.alarm(&what, &error),
                        Some(LostHistory::Doubtful { .. }) | None => backoff.fail(&what, &error),
                    }
                }
            };
            tokio::select! {
                () = sleep(pause) => {}
                () = stop.cancelled(), if !pause.is_zero() => {}
            }
        }
    }

    /// Inserts the row that is the lock of the stream, if it does not exist yet.
    async fn register(&self) -> anyhow::Result<()> {
        let mut db = self.database.background_connection().await?;
        let lock = sqlx::query!(
            "insert into bus.relay (stream, republishes) values ($1, $2)
             on conflict (stream) do update set republishes = $2 where relay.republishes <> $2",
            self.stream,
            self.source.is_some(),
        );
        lock.execute(&mut *db).await?;
        Ok(())
    }

    async fn look_and_step(&mut self) -> anyhow::Result<Step> {
        self.duties.look_for_forgotten(self.database).await;
        self.step().await
    }

    /// One transaction of the relay.
    async fn step(&mut self) -> anyhow::Result<Step> {
        let Self { database, broker, settings, stream, .. } = *self;
        broker.connected()?;
        let connection = match self.connection.take() {
            Some(connection) => connection,
            None => database.background_connection().await?,
        };
        let floor = self.known.floor.proven();
        let taken = outbox::take(database, connection, stream, floor, self.limits()).await?;
        let Some(Batch { mut tx, mut position, rows, more }) = taken else { return Ok(Step::Contended) };
        if self.known.committed.is_some_and(|last| position.last_seq < last.last_seq || position.floor < last.floor) {
            // Set back by hand: the floor is no longer proven, and rows below it may exist.
            self.known = Known::default();
            self.duties.is_in_doubt(self.stream);
            tx.rollback().await?;
            return Ok(Step::More);
        }
        position.floor = floor.max(position.floor);
        if self.should_compare() {
            tx = match self.compare(tx, position).await? {
                Compared::Equal(tx) => tx,
                Compared::Moved => return Ok(Step::More),
            };
        }
        self.window.is_published_up_to(position.last_seq);
        if rows.is_empty() {
            return self.idle(tx, position).await;
        }
        let begun = Instant::now();
        let deadline = begun + settings.publish_timeout;
        let step = match publish::publish(broker, stream, position.last_seq, &rows, deadline).await? {
            Published::UpTo { seq, rows: stored } => {
                self.meters.stored(stored, begun);
                let writers = if self.known.floor.is_due() { Some(floor::writers(&mut tx).await?) } else { None };
                let ids: Vec<i64> = rows[..stored].iter().map(|row| row.id).collect();
                self.connection = Some(outbox::move_on(tx, stream, position, seq, &ids).await?);
                self.known.committed = Some(Position { last_seq: seq, ..position });
                self.window.is_published_up_to(seq);
                // Only after the commit are these rows deleted.
                if let (Some(writers), Some(last)) = (writers, ids.last()) {
                    self.known.floor.passed(*last, writers);
                }
                if stored < rows.len() { Step::More } else { self.after(stored, more) }
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
            Published::Full => {
                tx.rollback().await?;
                return Ok(Step::Full);
            }
            Published::Elsewhere => match self.compare(tx, position).await? {
                Compared::Equal(_) => bail!("the server refuses an event, although {stream} ends where it should"),
                Compared::Moved => Step::More,
            },
        };
        Ok(step)
    }

    fn after(&self, events: usize, more: bool) -> Step {
        match events {
            _ if more => Step::Behind(events),
            // No other row waited, and a row that was committed since has woken the relay.
            1..=publish::FEW if !self.stop.is_cancelled() => Step::Done,
            // Under heavy load, more rows have been committed by now.
            events if events >= self.settings.publish_events / 2 => Step::More,
            _ => Step::Busy,
        }
    }
}
