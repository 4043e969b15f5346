//! The W3C trace context, carried from a request to the events and tasks that it causes.

use std::future::Future;

tokio::task_local! {
    static TRACEPARENT: Option<String>;
}

/// Runs `work` with the `traceparent` of the request that caused it: events that it appends have this header.
///
/// A malformed `traceparent` is ignored, as the specification demands.
pub async fn scope<F: Future>(traceparent: Option<String>, work: F) -> F::Output {
    TRACEPARENT.scope(traceparent.filter(|value| is_valid(value)), work).await
}

/// The `traceparent` of the current [`scope`].
pub fn current() -> Option<String> {
    TRACEPARENT.try_with(Clone::clone).ok().flatten()
}

/// `00-<32 hex digits, not all 0>-<16 hex digits, not all 0>-<2 hex digits>`, in lower case. Later versions of
/// the format are not supported.
fn is_valid(value: &str) -> bool {
    let is_hex = |part: &str| part.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'));
    let parts: Vec<&str> = value.split('-').collect();
    matches!(parts[..], ["00", trace, parent, flags]
        if (trace.len(), parent.len(), flags.len()) == (32, 16, 2)
            && parts.iter().all(|part| is_hex(part))
            && [trace, parent].iter().all(|id| id.bytes().any(|digit| digit != b'0')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_valid_trace_context_is_carried_and_a_malformed_one_is_not() {
        let valid = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        assert_eq!(scope(Some(valid.to_owned()), async { current() }).await.as_deref(), Some(valid));
        for malformed in [
            "",
            "00",
            "00-zz-00-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\nX: y",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00F067AA0BA902B7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        ] {
            assert_eq!(scope(Some(malformed.to_owned()), async { current() }).await, None, "{malformed:?}");
        }
        assert_eq!(current(), None);
    }
}
