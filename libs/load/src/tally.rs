//! What was counted while a load ran.

use crate::http::Call;
use anyhow::Result;
use hdrhistogram::Histogram;
use hyper::StatusCode;
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Latencies and failures of one point.
///
/// Throughput is the number of expected responses within the measured time. A latency is recorded if its request was sent, or due,
/// within that time, however late the response is. Every failure counts.
pub struct Tally {
    from: Instant,
    until: Instant,
    counted: Mutex<Counted>,
}

struct Counted {
    /// Expected responses within the measured time.
    responses: u64,
    latencies: Histogram<u64>,
    failures: BTreeMap<String, u64>,
}

/// Percentiles of times.
#[derive(Clone, Copy, Debug, Default)]
pub struct Percentiles {
    /// How many times were measured.
    pub count: u64,
    /// The median.
    pub p50: Duration,
    /// 99 % were at most this.
    pub p99: Duration,
    /// 99.9 % were at most this.
    pub p999: Duration,
    /// The longest.
    pub max: Duration,
}

impl Tally {
    /// Measures between these two moments.
    pub fn new(from: Instant, until: Instant) -> Self {
        let counted = Mutex::new(Counted { responses: 0, latencies: histogram(), failures: BTreeMap::new() });
        Self { from, until, counted }
    }

    /// The measured time.
    pub fn window(&self) -> (Instant, Instant) {
        (self.from, self.until)
    }

    /// Whether the load has ended.
    pub fn is_over(&self) -> bool {
        Instant::now() >= self.until
    }

    /// Counts a response to a request that was sent, or should have been sent, at `sent`. Returns whether it was as expected.
    pub fn response(&self, status: StatusCode, expected: StatusCode, sent: Instant) -> bool {
        if status != expected {
            self.failure(&format!("status {}", status.as_u16()));
            return false;
        }
        let (now, measured) = (Instant::now(), self.from..self.until);
        let mut counted = self.counted();
        counted.responses += u64::from(measured.contains(&now));
        if measured.contains(&sent) {
            record(&mut counted.latencies, now - sent);
        }
        true
    }

    /// Counts a request without a response, or with a wrong one.
    pub fn failure(&self, what: &str) {
        *self.counted().failures.entry(what.to_owned()).or_default() += 1;
    }

    /// The expected responses within the measured time, the latencies, and the failures with their numbers.
    pub fn result(&self) -> (u64, Percentiles, Vec<(String, u64)>) {
        let counted = self.counted();
        let failures = counted.failures.iter().map(|(what, count)| (what.clone(), *count)).collect();
        (counted.responses, Percentiles::of(&counted.latencies), failures)
    }

    fn counted(&self) -> std::sync::MutexGuard<'_, Counted> {
        self.counted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Percentiles {
    /// Those of a histogram in microseconds.
    pub fn of(histogram: &Histogram<u64>) -> Self {
        let at = |percentile| Duration::from_micros(histogram.value_at_percentile(percentile));
        let max = Duration::from_micros(histogram.max());
        Self { count: histogram.len(), p50: at(50.0), p99: at(99.0), p999: at(99.9), max }
    }
}

/// A histogram of microseconds, up to two minutes, with three digits.
pub fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 120_000_000, 3).expect("the bounds are valid")
}

/// Adds a time. One beyond the bound of the histogram counts as the bound.
pub fn record(histogram: &mut Histogram<u64>, time: Duration) {
    histogram.saturating_record(u64::try_from(time.as_micros()).unwrap_or(u64::MAX).max(1));
}

/// The name of a failed request.
pub fn failure(call: &Call, error: &anyhow::Error) -> String {
    format!("{} without a response: {error:#}", call.method)
}

/// Ends a load that cannot reach its service.
pub fn check_reachable(failures: u32) -> Result<()> {
    anyhow::ensure!(failures < 10, "ten requests in a row had no response");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_expected_responses_are_counted() {
        let now = Instant::now();
        let (created, failed) = (StatusCode::CREATED, StatusCode::SERVICE_UNAVAILABLE);
        let tally = Tally::new(now, now + Duration::from_mins(1));
        assert!(tally.response(created, created, now));
        assert!(!tally.response(failed, created, now));
        let (responses, latencies, failures) = tally.result();
        assert_eq!((responses, latencies.count, failures), (1, 1, vec![("status 503".to_owned(), 1)]));
    }

    #[test]
    fn a_late_response_has_a_latency_and_is_no_throughput() {
        let now = Instant::now();
        // Over before the response.
        let tally = Tally::new(now, now + Duration::from_nanos(1));
        tally.response(StatusCode::OK, StatusCode::OK, now);
        let (responses, latencies, _) = tally.result();
        assert_eq!((responses, latencies.count), (0, 1));
    }

    #[test]
    fn percentiles_are_exact_to_three_digits() {
        let mut times = histogram();
        (1..=1_000).for_each(|milliseconds| record(&mut times, Duration::from_millis(milliseconds)));
        let Percentiles { p50, p99, max, .. } = Percentiles::of(&times);
        let is_near = |time: Duration, expected: u128| time.as_millis().abs_diff(expected) <= 1;
        assert!(is_near(p50, 500) && is_near(p99, 990) && is_near(max, 1_000), "{p50:?} {p99:?} {max:?}");
    }
}
