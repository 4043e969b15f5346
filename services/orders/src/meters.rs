//! The metrics of orders. Handles are registered once.

use bootstrap::ApiError;
use metrics::{Counter, Histogram, Unit, counter, describe_counter, describe_histogram, histogram};
use std::sync::LazyLock;

const RESERVATIONS: &str = "orders_reservations_total";
const REFUNDS_DUE: &str = "orders_refunds_due_total";
const STALE: &str = "orders_stale_ticket_events_total";
const EXPIRY_LAG: &str = "orders_expiry_lag_seconds";

static METERS: LazyLock<Meters> = LazyLock::new(Meters::new);

/// Handles of all metrics of orders.
pub struct Meters {
    created: Counter,
    already_reserved: Counter,
    unknown_ticket: Counter,
    unavailable: Counter,
    /// Payments that must be refunded.
    pub refunds_due: Counter,
    /// Tickets whose newest event in a batch was not newer than the replica.
    pub stale: Counter,
    /// From the expiry of the first order of a batch to its cancellation, in seconds.
    pub expiry_lag: Histogram,
}

/// The handles. Call it after recording has begun.
pub fn meters() -> &'static Meters {
    &METERS
}

impl Meters {
    fn new() -> Self {
        describe_counter!(RESERVATIONS, "Requests to reserve a ticket, by outcome");
        describe_counter!(REFUNDS_DUE, "Payments of orders that were cancelled or paid before");
        describe_counter!(STALE, "Tickets whose newest event in a batch was not newer than ticket_replica");
        describe_histogram!(
            EXPIRY_LAG,
            Unit::Seconds,
            "Time from the expiry of a batch's first order to its cancellation"
        );
        let outcome = |outcome| zero(counter!(RESERVATIONS, "outcome" => outcome));
        Self {
            created: outcome("created"),
            already_reserved: outcome("already_reserved"),
            unknown_ticket: outcome("unknown_ticket"),
            unavailable: outcome("unavailable"),
            refunds_due: zero(counter!(REFUNDS_DUE)),
            stale: zero(counter!(STALE)),
            expiry_lag: histogram!(EXPIRY_LAG),
        }
    }

    /// A ticket was reserved, or not.
    pub fn reserved<T>(&self, outcome: &Result<T, ApiError>) {
        match outcome {
            Ok(_) => self.created.increment(1),
            Err(ApiError::Refused(_)) => self.already_reserved.increment(1),
            Err(ApiError::NotFound) => self.unknown_ticket.increment(1),
            Err(_) => self.unavailable.increment(1),
        }
    }
}

/// A counter that appears at once, as 0.
fn zero(counter: Counter) -> Counter {
    counter.increment(0);
    counter
}
