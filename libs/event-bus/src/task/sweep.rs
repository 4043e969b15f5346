//! How far back a worker looks for due tasks.

use std::time::Duration;
use tokio::time::Instant;

/// How often to look at all tasks, and not only at those that became due lately.
const SWEEP: Duration = Duration::from_mins(1);

/// How far back a worker looks for due tasks.
///
/// Tasks become due in the order of time, so most of the time it is enough to look at the last minutes, and not at the
/// entries of the index that older tasks have left behind. They stay while a backup or a report holds a snapshot open.
#[derive(Default)]
pub(super) struct Sweep {
    /// When a lease looked at everything, and left nothing behind.
    done: Option<Instant>,
    looks_back: Option<Duration>,
}

impl Sweep {
    /// `None`: at everything.
    pub(super) fn looks_back(&mut self) -> Option<Duration> {
        self.looks_back = self.done.filter(|done| done.elapsed() < SWEEP).map(|_| 2 * SWEEP);
        self.looks_back
    }

    pub(super) fn has_leased(&mut self, all: bool) {
        if self.looks_back.is_none() && all {
            self.done = Some(Instant::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_looks_at_all_tasks_until_none_is_left_behind() {
        let mut sweep = Sweep::default();
        for all in [false, false, true] {
            assert_eq!(sweep.looks_back(), None);
            sweep.has_leased(all);
        }
        for all in [true, false] {
            assert_eq!(sweep.looks_back(), Some(2 * SWEEP));
            sweep.has_leased(all);
        }
        sweep.done = Instant::now().checked_sub(SWEEP);
        assert_eq!(sweep.looks_back(), None);
    }
}
