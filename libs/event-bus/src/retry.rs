//! How long to wait before trying again, and what to log meanwhile.

use std::time::Duration;
use tokio::time::{Instant, sleep};

/// The longest delay of background work. An attempt is one small request, and a longer delay would add lag.
const CEILING: Duration = Duration::from_secs(1);
const SLOW: Duration = Duration::from_secs(5);
/// The longest delay between attempts of an event or a task.
const LONGEST: Duration = Duration::from_mins(10);
/// A failure that lasts is logged again after this long.
const REMINDER: Duration = Duration::from_mins(1);

/// A random time between half of `ceiling` and `ceiling`, so that replicas do not retry at the same time.
pub(crate) fn jitter(ceiling: Duration) -> Duration {
    ceiling.mul_f64(0.5 + rand::random::<f64>() / 2.0)
}

/// The delay after so many failed attempts of an event or a task: `first`, doubled with each further one up to 10
/// minutes, jittered.
pub(crate) fn exponential(first: Duration, attempts: u32) -> Duration {
    jitter(first.saturating_mul(2_u32.saturating_pow(attempts.saturating_sub(1))).min(LONGEST))
}

/// A delay that doubles with each failure in a row, from 100 ms to 1 s, jittered.
///
/// Logs a warning on the second failure in a row, because the first one may be a connection that is not open yet; then
/// once a minute while failures last, and one line when they are over.
#[derive(Debug, Default)]
pub struct Backoff {
    failures: u32,
    began: Option<Instant>,
    logged: Option<Instant>,
    alarmed: bool,
    /// The longest delay, if it is not [`CEILING`].
    ceiling: Option<Duration>,
}

impl Backoff {
    /// A delay of up to 5 s, for migrations: an attempt that waits for a lock blocks other statements.
    pub(crate) fn slow() -> Self {
        Self { ceiling: Some(SLOW), ..Self::default() }
    }

    /// Counts a failure of `what`. Returns the delay before the next attempt.
    pub fn fail(&mut self, what: &str, error: &anyhow::Error) -> Duration {
        let delay = self.count();
        if self.failures > 1 && self.is_news() {
            let (failures, since) = (self.failures, self.since());
            tracing::warn!(failures, since, "{what}: {error:#}; trying again until it works");
        } else {
            tracing::debug!("{what}: {error:#}");
        }
        delay
    }

    /// Counts a failure for which a person has to act. Logged as an error, from the first one on.
    pub(crate) fn alarm(&mut self, what: &str, error: &anyhow::Error) -> Duration {
        let delay = self.count();
        // Logged at once, even if a warning was logged a moment ago.
        if !self.alarmed {
            (self.alarmed, self.logged) = (true, None);
        }
        if self.is_news() {
            let (failures, since) = (self.failures, self.since());
            tracing::error!(failures, since, "{what}: {error:#}");
        }
        delay
    }

    /// Resets the delay: `what` works.
    pub fn succeed(&mut self, what: &str) {
        if self.failures == 0 {
            return;
        }
        let Self { failures, logged, .. } = *self;
        let since = self.since();
        *self = Self { ceiling: self.ceiling, ..Self::default() };
        if logged.is_some() {
            tracing::info!(failures, since, "{what}: works again");
        }
    }

    fn count(&mut self) -> Duration {
        let delay = jitter(Duration::from_millis(100 << self.failures.min(6)).min(self.ceiling.unwrap_or(CEILING)));
        self.failures = self.failures.saturating_add(1);
        self.began.get_or_insert_with(Instant::now);
        delay
    }

    fn is_news(&mut self) -> bool {
        let news = self.logged.is_none_or(|last| last.elapsed() >= REMINDER);
        if news {
            self.logged = Some(Instant::now());
        }
        news
    }

    /// For how long it has been failing, as a field of a log line.
    fn since(&self) -> String {
        let began = self.began.map_or(Duration::ZERO, |began| began.elapsed());
        format!("{:.1}s", began.as_secs_f64())
    }
}

/// Repeats `attempt` until it succeeds, fails with an error that cannot pass, or `patience` is over.
pub(crate) async fn patiently<T>(
    patience: Duration,
    what: &str,
    may_pass: impl Fn(&anyhow::Error) -> bool,
    attempt: impl AsyncFn() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let deadline = Instant::now() + patience;
    let mut backoff = Backoff::slow();
    loop {
        match attempt().await {
            Err(error) if may_pass(&error) && Instant::now() < deadline => sleep(backoff.fail(what, &error)).await,
            outcome => return outcome,
        }
    }
}
