//! Progress of work that may take long: what is logged, and when.

use std::time::Duration;
use tokio::time::Instant;

/// After this long, and then every [`REMINDER`], progress is logged.
const SLOW: Duration = Duration::from_secs(2);
const REMINDER: Duration = Duration::from_secs(10);

/// How much of a piece of work this process has done, and since when.
pub(crate) struct Estimate {
    begun: Instant,
    /// How much was done before.
    from: i64,
    logged: Option<Instant>,
}

impl Estimate {
    /// This process begins, or resumes after `from`.
    pub(crate) fn new(from: i64) -> Self {
        Self { begun: Instant::now(), from, logged: None }
    }

    /// How much is left in seconds, as a field of a log line, if one is due now.
    pub(crate) fn due(&mut self, passed: i64, total: i64) -> Option<String> {
        let due = self.logged.map_or(self.begun + SLOW, |logged| logged + REMINDER);
        if Instant::now() < due {
            return None;
        }
        self.logged = Some(Instant::now());
        let remaining = remaining(self.begun.elapsed(), passed - self.from, total - passed);
        Some(format!("{:.0}s", remaining.as_secs_f64()))
    }
}

/// How long `ahead` will take, if `done` took `elapsed`.
fn remaining(elapsed: Duration, done: i64, ahead: i64) -> Duration {
    #[expect(clippy::cast_precision_loss, reason = "an estimate")]
    let share = ahead.max(0) as f64 / done.max(1) as f64;
    Duration::try_from_secs_f64(elapsed.as_secs_f64() * share).unwrap_or(Duration::MAX)
}

#[cfg(test)]
mod tests {
    use super::remaining;
    use std::time::Duration;

    #[test]
    fn the_estimate_is_the_rate_so_far() {
        let seconds = Duration::from_secs;
        assert_eq!(remaining(seconds(10), 100, 300), seconds(30));
        assert_eq!(remaining(seconds(10), 100, 0), seconds(0));
        assert_eq!(remaining(seconds(1), 0, 2), seconds(2));
    }
}
