use std::io::{Write, stderr};
use std::time::Duration;
use tokio::time::{Instant, MissedTickBehavior, interval_at};

/// Prints a line of progress. It is visible in tests too: the harness captures only `eprintln!`.
pub fn say(line: &str) {
    // A closed terminal is no reason to stop.
    let _ = writeln!(stderr(), "--- {line}");
}

/// Runs `work`, and prints its progress repeatedly if it takes longer than a second.
pub async fn announced<T>(what: &str, work: impl Future<Output = T>) -> T {
    let start = Instant::now();
    let mut ticks = interval_at(start + Duration::from_secs(1), Duration::from_secs(5));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut work = std::pin::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return done,
            _ = ticks.tick() => say(&format!("{what} … {} s", start.elapsed().as_secs())),
        }
    }
}
