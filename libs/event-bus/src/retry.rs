//! How long to wait before trying again.

use std::time::Duration;
use tokio::time::{Instant, sleep};

/// A random time between half of `ceiling` and all of it, so that replicas do not come back in step.
pub(crate) fn jitter(ceiling: Duration) -> Duration {
    ceiling.mul_f64(0.5 + rand::random::<f64>() / 2.0)
}

/// Doubles with every failure in a row from 100 ms to 5 s, jittered. A failure is worth a warning when it happens again,
/// because once may be no more than a connection that is just being made; and then not until it is another one.
#[derive(Default)]
pub struct Backoff {
    failures: u32,
    last: String,
    warned: bool,
}

impl Backoff {
    /// One more failure of `what`, logged where it is news: how long to wait before the next try.
    pub fn fail(&mut self, what: &str, error: &anyhow::Error) -> Duration {
        let delay = jitter(Duration::from_millis(100 << self.failures.min(6)).min(Duration::from_secs(5)));
        self.failures += 1;
        let error = format!("{error:#}");
        if error != self.last {
            tracing::debug!("{what}: {error}");
            (self.last, self.warned) = (error, false);
        } else if !self.warned {
            tracing::warn!("{what}: {error}; trying again until it works");
            self.warned = true;
        }
        delay
    }

    /// `what` works: the next failure is the first.
    pub fn succeed(&mut self, what: &str) {
        if std::mem::take(self).warned {
            tracing::info!("{what}: works again");
        }
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
    let mut backoff = Backoff::default();
    loop {
        match attempt().await {
            Err(error) if may_pass(&error) && Instant::now() < deadline => sleep(backoff.fail(what, &error)).await,
            outcome => return outcome,
        }
    }
}
