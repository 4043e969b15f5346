//! Backpressure: while a relay of this process is behind, batches of writes are slowed down to two thirds of its rate, so that it
//! can catch up.
//!
//! Best effort: only the batchers of the process that relays the stream wait, at most 1 s for each batch. Other replicas and
//! transactions do not wait.
//!
//! All batches share one clock. A batch waits for the time that the batches before it have reserved, in proportion to their
//! items: without concurrent writers, a request waits almost nothing. A relay that has not published for a second delays no
//! batch, so an outage of NATS does not either.

use crate::meters::HELD_BACK;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::{Instant, sleep_until};

/// How long a batch waits at most.
const LONGEST: Duration = Duration::from_secs(1);
/// How long the measured time for an event is valid.
const VALID: Duration = Duration::from_secs(1);

/// Shared by the relays and the batchers of a service.
#[derive(Clone, Debug, Default)]
pub(crate) struct Backpressure(Arc<Mutex<Clock>>);

#[derive(Debug, Default)]
struct Clock {
    /// The streams whose relays are behind: the time that each relay needs for one event, and when that was measured.
    times: HashMap<&'static str, (Duration, Instant)>,
    /// When the next batch may be written.
    next: Option<Instant>,
}

/// The progress of one relay. Not behind after it is dropped.
#[derive(Debug)]
pub(crate) struct Progress {
    shared: Backpressure,
    stream: &'static str,
    /// When the last batch was published that left events behind.
    since: Option<Instant>,
}

impl Backpressure {
    /// Waits before `items` are written, if a relay is behind.
    pub(crate) async fn hold(&self, items: usize) {
        let Some(begin) = self.locked().advance(items) else { return };
        metrics::counter!(HELD_BACK).increment(1);
        sleep_until(begin).await;
    }

    /// The relay of a stream, which is not behind yet.
    pub(crate) fn relay(&self, stream: &'static str) -> Progress {
        Progress { shared: self.clone(), stream, since: None }
    }

    fn locked(&self) -> MutexGuard<'_, Clock> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Clock {
    /// When `items` may be written, if that is later than now.
    fn advance(&mut self, items: usize) -> Option<Instant> {
        let now = Instant::now();
        self.times.retain(|_, (_, measured)| measured.elapsed() < VALID);
        let Some(slowest) = self.times.values().map(|(time, _)| *time).max() else {
            self.next = None;
            return None;
        };
        let begin = self.next.filter(|next| *next > now);
        // A half more, so that the relay catches up.
        let cost = slowest.saturating_mul(u32::try_from(items).unwrap_or(u32::MAX)).saturating_mul(3) / 2;
        self.next = Some(begin.unwrap_or(now) + cost).map(|next| next.min(now + LONGEST));
        begin
    }
}

impl Progress {
    /// A batch of `events` was published, and more events wait.
    pub(crate) fn behind(&mut self, events: usize) {
        let now = Instant::now();
        if let (Some(before), Ok(events @ 1..)) = (self.since.replace(now), u32::try_from(events)) {
            self.shared.locked().times.insert(self.stream, ((now - before) / events, now));
        }
    }

    /// No more events wait than a batch can hold, or nothing can be published.
    pub(crate) fn not_behind(&mut self) {
        if self.since.take().is_some() {
            self.shared.locked().times.remove(self.stream);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.not_behind();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::advance;

    fn waits(backpressure: &Backpressure, items: usize) -> Duration {
        let begin = backpressure.locked().advance(items);
        begin.map_or(Duration::ZERO, |begin| begin - Instant::now())
    }

    #[tokio::test(start_paused = true)]
    async fn batches_are_written_at_two_thirds_of_the_rate_of_the_slowest_relay() {
        let backpressure = Backpressure::default();
        let (mut one, mut two) = (backpressure.relay("ONE"), backpressure.relay("TWO"));
        one.behind(500);
        two.behind(500);
        assert_eq!(waits(&backpressure, 100), Duration::ZERO, "how fast they are is not known yet");
        advance(Duration::from_millis(100)).await;
        one.behind(100);
        two.behind(50);
        assert_eq!(waits(&backpressure, 100), Duration::ZERO, "nothing was written before");
        assert_eq!(waits(&backpressure, 10), Duration::from_millis(300), "2 ms for each of 100 items, and a half more");
        assert_eq!(waits(&backpressure, 100_000), Duration::from_millis(330));
        assert_eq!(waits(&backpressure, 1), LONGEST);
        advance(LONGEST).await;
        one.behind(1000);
        drop(two);
        assert_eq!(waits(&backpressure, 100), Duration::ZERO);
        assert_eq!(waits(&backpressure, 100), Duration::from_millis(150));
        one.not_behind();
        assert_eq!(waits(&backpressure, 100), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn a_relay_that_hangs_holds_nothing_back() {
        let backpressure = Backpressure::default();
        let mut relay = backpressure.relay("ONE");
        relay.behind(1);
        advance(Duration::from_millis(10)).await;
        relay.behind(1);
        assert_eq!(waits(&backpressure, 50), Duration::ZERO);
        assert_eq!(waits(&backpressure, 50), Duration::from_millis(750));
        advance(VALID).await;
        assert_eq!(waits(&backpressure, 50), Duration::ZERO);
    }
}
