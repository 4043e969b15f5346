//! How long to wait before trying again, and what to log meanwhile.

use std::time::Duration;
use tokio::time::{Instant, sleep};

/// The longest delay. What waits here costs a server one small request per second and process, and each second is lag.
const CEILING: Duration = Duration::from_secs(1);
const SLOW: Duration = Duration::from_secs(5);
/// The longest delay between attempts of one event or task.
const LONGEST: Duration = Duration::from_mins(10);
/// A failure that goes on is logged again after this long.
const REMINDER: Duration = Duration::from_mins(1);

/// A random time between half of `ceiling` and all of it, so that replicas do not come back in step.
pub(crate) fn jitter(ceiling: Duration) -> Duration {
    ceiling.mul_f64(0.5 + rand::random::<f64>() / 2.0)
}

/// The delay after so many failed attempts of one event or task: `first`, doubled with each further one up to 10 minutes,
/// jittered.
pub(crate) fn exponential(first: Duration, attempts: u32) -> Duration {
    jitter(first.saturating_mul(2_u32.saturating_pow(attempts.saturating_sub(1))).min(LONGEST))
}

/// Doubles with every failure in a row from 100 ms to 1 s, jittered.
///
/// Warns on the second failure in a row, because the first may be a connection that is just being opened, then once a
/// minute while failures go on, and logs one line when they are over.
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
    /// With a longest delay of 5 s, for work that blocks others while it waits for a lock.
    pub(crate) fn slow() -> Self {
        Self { ceiling: Some(SLOW), ..Self::default() }
    }

    /// Notes one more failure of `what`. Returns how long to wait before the next try.
    pub fn fail(&mut self, what: &str, error: &anyhow::Error) -> Duration {
        let delay = self.count();
        if self.failures == 1 {
            tracing::debug!("{what}: {error:#}");
        } else if self.is_news() {
            let (failures, since) = (self.failures, self.since());
            tracing::warn!(failures, since, "{what}: {error:#}; trying again until it works");
        }
        delay
    }

    /// [`fail`](Self::fail), for a failure that no time heals: a person has to act. Logged as an error, the first as well.
    pub(crate) fn alarm(&mut self, what: &str, error: &anyhow::Error) -> Duration {
        let delay = self.count();
        // News also where it was only a warning before.
        if !self.alarmed {
            (self.alarmed, self.logged) = (true, None);
        }
        if self.is_news() {
            let (failures, since) = (self.failures, self.since());
            tracing::error!(failures, since, "{what}: {error:#}");
        }
        delay
    }

    /// `what` works: the next failure is the first.
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

/// Tries for as long as `patience` while it fails for a reason that may pass.
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
