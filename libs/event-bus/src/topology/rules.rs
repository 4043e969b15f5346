//! The options with which the bus cannot keep its guarantees.

use super::is_zero;
use serde_json::Value;
use std::time::Duration;

/// One option, and the values that it may have.
pub(super) struct Rule {
    pub option: &'static str,
    /// Null: the option is absent.
    pub allows: fn(&Value) -> bool,
    /// Why other values are refused.
    pub reason: &'static str,
}

/// The shortest `ack_wait`. It begins with the delivery: a batch may wait while the previous one is applied, each for
/// up to `apply_timeout`, and the acks take time too.
const SHORTEST_ACK_WAIT: Duration = Duration::from_secs(25);

/// The options that a stream may have.
pub(super) const STREAM: &[Rule] = &[
    rule("no_ack", is_zero, "the relay waits for the acknowledgement of each event"),
    rule("sealed", is_zero, "a sealed stream stores no events"),
    rule("mirror", is_zero, "a mirror stores no events that are published to it"),
    rule("sources", is_zero, "events of other streams take the positions at which the relay publishes"),
    rule("storage", |value| absent_or(value, "file"), "a restart of the server loses a stream that is kept in memory"),
    rule("persist_mode", |value| absent_or(value, "default"), "an event is acknowledged before it is on disk"),
    rule(
        "retention",
        |value| absent_or(value, "limits"),
        "events are deleted that a new consumer or the relay has to read",
    ),
    // The default is old.
    rule("discard", |value| value == "new", "a full stream deletes events that are not delivered yet; set it to new"),
    rule("max_msgs_per_subject", is_unlimited, "a newer event deletes an older one of another aggregate"),
    rule("subject_transform", is_zero, "the relay compares the subjects of stored events with those of its outbox"),
    rule("num_replicas", Value::is_null, "it depends on the cluster: set stream_replicas instead"),
];

/// The options that a consumer may have. Filters are allowed: they skip subjects.
pub(super) const CONSUMER: &[Rule] = &[
    // The default is none.
    rule("ack_policy", |value| value == "explicit", "each event is acknowledged by itself; set it to explicit"),
    rule("max_deliver", is_unlimited_deliver, "the server drops an event after so many deliveries; set it to -1"),
    rule(
        "ack_wait",
        is_long_ack_wait,
        "an event is delivered again while it is applied; set it to 25000000000 ns or more",
    ),
    rule("backoff", is_zero, "its times replace ack_wait"),
    rule("deliver_subject", is_zero, "the bus pulls; it does not read what the server pushes"),
    rule("headers_only", is_zero, "handlers need the body of an event"),
    rule("replay_policy", |value| absent_or(value, "instant"), "events are delivered as slowly as they were published"),
    rule("mem_storage", is_zero, "a restart of the server loses the position of the consumer"),
    rule("inactive_threshold", is_zero, "the server deletes the consumer while its service is stopped"),
    rule("deliver_policy", |value| !is_last(value), "it skips events of other aggregates; set it to all"),
    rule("max_batch", is_unlimited, "the bus requests batches of its own size, see Settings"),
    rule("max_bytes", is_unlimited, "the bus requests batches of its own size, see Settings"),
    rule("max_expires", is_zero, "the bus requests for as long as it needs"),
    rule("num_replicas", is_zero, "the consumer is kept by as many servers as its stream"),
];

const fn rule(option: &'static str, allows: fn(&Value) -> bool, reason: &'static str) -> Rule {
    Rule { option, allows, reason }
}

fn absent_or(value: &Value, allowed: &str) -> bool {
    value.is_null() || value == allowed
}

fn is_last(value: &Value) -> bool {
    value.as_str().is_some_and(|policy| policy.starts_with("last"))
}

fn is_unlimited(value: &Value) -> bool {
    value.is_null() || value.as_i64().is_some_and(|limit| limit <= 0)
}

fn is_unlimited_deliver(value: &Value) -> bool {
    value.is_null() || value.as_i64() == Some(-1)
}

/// The default is 30 s.
fn is_long_ack_wait(value: &Value) -> bool {
    is_zero(value) || value.as_u64().is_some_and(|wait| Duration::from_nanos(wait) >= SHORTEST_ACK_WAIT)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;
    use crate::{Topology, TopologyError};
    use serde_json::json;

    fn parse(file: &str, mut options: Value, option: &str, value: Value) -> Result<Topology, TopologyError> {
        match value {
            Value::Null => drop(options.as_object_mut().unwrap().remove(option)),
            value => options[option] = value,
        }
        Topology::parse([(file, &*options.to_string())])
    }

    fn stream(option: &str, value: Value) -> Result<Topology, TopologyError> {
        parse("A.stream.json", json!({"discard": "new"}), option, value)
    }

    fn consumer(option: &str, value: Value) -> Result<Topology, TopologyError> {
        parse("A.b.consumer.json", json!({"ack_policy": "explicit"}), option, value)
    }

    /// Asserts that each case is refused with its reason, and that each rule has a case.
    fn refuses(
        rules: &[Rule],
        parse: fn(&str, Value) -> Result<Topology, TopologyError>,
        cases: &[(&'static str, Value, &str)],
    ) {
        for (option, value, expected) in cases {
            match parse(option, value.clone()) {
                Err(TopologyError::Option { option: found, value: shown, reason, .. }) => {
                    assert_eq!((found, &shown), (*option, value));
                    assert!(reason.contains(expected), "{option} is {value}: {reason}");
                }
                other => panic!("{option} is {value}: {other:?}"),
            }
        }
        for Rule { option, .. } in rules {
            assert!(cases.iter().any(|(case, ..)| case == option), "there is no case of {option}");
        }
    }

    #[test]
    fn options_of_a_stream_that_break_a_guarantee_are_refused() {
        refuses(
            STREAM,
            stream,
            &[
                ("no_ack", json!(true), "acknowledgement of each event"),
                ("sealed", json!(true), "stores no events"),
                ("mirror", json!({"name": "B"}), "a mirror stores no events"),
                ("sources", json!([{"name": "B"}]), "take the positions"),
                ("storage", json!("memory"), "kept in memory"),
                ("persist_mode", json!("async"), "before it is on disk"),
                ("retention", json!("workqueue"), "events are deleted"),
                ("retention", json!("interest"), "events are deleted"),
                ("discard", json!("old"), "not delivered yet"),
                ("discard", Value::Null, "not delivered yet"),
                ("max_msgs_per_subject", json!(1), "a newer event deletes"),
                ("max_msgs_per_subject", json!("1"), "a newer event deletes"),
                ("subject_transform", json!({"src": "a", "dest": "b"}), "compares the subjects"),
                ("num_replicas", json!(1), "set stream_replicas"),
            ],
        );
    }

    #[test]
    fn options_of_a_consumer_that_break_a_guarantee_are_refused() {
        refuses(
            CONSUMER,
            consumer,
            &[
                ("ack_policy", json!("all"), "by itself"),
                ("ack_policy", json!("none"), "by itself"),
                ("ack_policy", Value::Null, "by itself"),
                ("max_deliver", json!(5), "drops an event"),
                ("ack_wait", json!(24_999_999_999_u64), "while it is applied"),
                ("ack_wait", json!("30s"), "while it is applied"),
                ("backoff", json!([30_000_000_000_u64]), "replace ack_wait"),
                ("deliver_subject", json!("push"), "the bus pulls"),
                ("headers_only", json!(true), "body of an event"),
                ("replay_policy", json!("original"), "as slowly"),
                ("mem_storage", json!(true), "loses the position"),
                ("inactive_threshold", json!(1), "while its service is stopped"),
                ("deliver_policy", json!("last"), "skips events"),
                ("deliver_policy", json!("last_per_subject"), "skips events"),
                ("max_batch", json!(100), "of its own size"),
                ("max_bytes", json!(1024), "of its own size"),
                ("max_expires", json!(1_000_000_000), "as long as it needs"),
                ("num_replicas", json!(3), "as its stream"),
            ],
        );
    }

    #[test]
    fn other_values_of_the_same_options_are_accepted() {
        for (option, value) in [
            ("storage", json!("file")),
            ("retention", json!("limits")),
            ("max_msgs_per_subject", json!(-1)),
            ("max_bytes", json!(1024)),
            ("an_option_of_a_later_server", json!(true)),
        ] {
            assert!(stream(option, value).is_ok(), "{option}");
        }
        for (option, value) in [
            ("max_deliver", json!(-1)),
            ("ack_wait", json!(25_000_000_000_u64)),
            ("replay_policy", json!("instant")),
            ("deliver_policy", json!("by_start_time")),
            ("filter_subjects", json!(["invoice.created"])),
        ] {
            assert!(consumer(option, value).is_ok(), "{option}");
        }
    }
}
