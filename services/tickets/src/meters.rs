//! The metrics of tickets. The handle is registered once.

use metrics::{Counter, counter, describe_counter};
use std::sync::LazyLock;

const STALE: &str = "tickets_stale_order_events_total";

static STALE_EVENTS: LazyLock<Counter> = LazyLock::new(|| {
    describe_counter!(STALE, "Events of orders that were applied before, or came after a newer one");
    let stale = counter!(STALE);
    stale.increment(0);
    stale
});

/// Events of orders that were applied before, or came after a newer one. Call it after recording has begun.
pub fn stale() -> &'static Counter {
    &STALE_EVENTS
}
