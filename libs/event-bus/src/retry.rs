//! How long to wait before trying again.

use std::time::Duration;

/// A random time between half of `ceiling` and all of it, so that replicas do not come back in step.
pub(crate) fn jitter(ceiling: Duration) -> Duration {
    ceiling.mul_f64(0.5 + rand::random::<f64>() / 2.0)
}

/// Doubles with every failure in a row from 100 ms to 5 s, jittered. The second of a row of failures is worth a warning:
/// the first may be no more than a connection that is just being made.
#[derive(Default)]
pub(crate) struct Backoff {
    failures: u32,
}

impl Backoff {
    pub(crate) fn fail(&mut self, what: &str, error: &anyhow::Error) -> Duration {
        let delay = jitter(Duration::from_millis(100 << self.failures.min(6)).min(Duration::from_secs(5)));
        if self.failures == 1 {
            tracing::warn!("{what}: {error:#}; trying again until it works");
        } else {
            tracing::debug!("{what}: {error:#}; still trying");
        }
        self.failures += 1;
        delay
    }

    pub(crate) fn succeed(&mut self, what: &str) {
        if std::mem::take(&mut self.failures) > 1 {
            tracing::info!("{what}: works again");
        }
    }
}
