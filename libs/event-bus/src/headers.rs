//! Headers of the application, such as a tenant or a correlation id.

use crate::error::Error;
use async_nats::HeaderMap;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Headers of an event, for example a tenant, a correlation id or a content type. Names are case-sensitive.
///
/// The outbox, the stream and dead letters keep them, and handlers get them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "BTreeMap<String, String>", into = "BTreeMap<String, String>")]
pub struct Headers(BTreeMap<String, String>);

impl Headers {
    /// Adds a header, or replaces the one of that name.
    ///
    /// # Errors
    /// The name is not made of 1 to 200 letters, digits and hyphens, or belongs to NATS (`Nats-…`) or to the bus
    /// (`traceparent`, `Event-Bus-Appended-At`); or the value is longer than 1000 bytes or holds control characters.
    pub fn insert(&mut self, name: &str, value: &str) -> Result<(), Error> {
        let is_name = (1..=LONGEST_NAME).contains(&name.len())
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        let is_value = value.len() <= LONGEST_VALUE && !value.chars().any(char::is_control);
        if !is_name || !is_value || is_reserved(name) {
            return Err(Error::Header(name.to_owned()));
        }
        self.0.insert(name.to_owned(), value.to_owned());
        Ok(())
    }

    /// The value of a header.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// All headers, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The headers of a message without those of NATS and of the bus. The first value of each name.
    pub(crate) fn of_message(headers: Option<&HeaderMap>) -> Self {
        let all = headers.into_iter().flat_map(HeaderMap::iter);
        let ours = all.filter(|(name, _)| !is_reserved(AsRef::<str>::as_ref(*name)));
        Self(ours.filter_map(|(name, values)| Some((name.to_string(), values.first()?.to_string()))).collect())
    }

    /// The headers of a row of the outbox, without those of the bus: Postgres permits a name that an earlier release did not use.
    pub(crate) fn of_row(json: &str) -> anyhow::Result<Self> {
        let mut all: BTreeMap<String, String> = serde_json::from_str(json)?;
        all.retain(|name, _| !is_reserved(name));
        Ok(all.try_into()?)
    }

    /// The JSON for `bus.append`, or `None` if there are no headers.
    pub fn to_json(&self) -> Option<String> {
        // Does not panic: strings have a JSON form.
        (!self.is_empty()).then(|| event_bus_core::encode_json(self))
    }
}

impl TryFrom<BTreeMap<String, String>> for Headers {
    type Error = Error;

    fn try_from(map: BTreeMap<String, String>) -> Result<Self, Error> {
        let mut headers = Self::default();
        for (name, value) in &map {
            headers.insert(name, value)?;
        }
        Ok(headers)
    }
}

impl From<Headers> for BTreeMap<String, String> {
    fn from(headers: Headers) -> Self {
        headers.0
    }
}

pub(crate) const TRACEPARENT: &str = "traceparent";

/// When the event was appended to the outbox, by the clock of Postgres: microseconds since 1970.
///
/// Replicas of releases before this header show it to handlers, as a header of the application.
pub(crate) const APPENDED_AT: &str = "Event-Bus-Appended-At";

/// In bytes. The check constraint of `bus.outbox` has the same limits.
const LONGEST_NAME: usize = 200;
const LONGEST_VALUE: usize = 1000;

/// Whether NATS or the bus uses the header `name`.
fn is_reserved(name: &str) -> bool {
    name.eq_ignore_ascii_case(TRACEPARENT)
        || name.eq_ignore_ascii_case(APPENDED_AT)
        || name.get(..5).is_some_and(|start| start.eq_ignore_ascii_case("nats-"))
}

#[cfg(test)]
mod tests {
    use super::Headers;

    #[test]
    fn a_reserved_or_malformed_header_is_refused() {
        let mut headers = Headers::default();
        for (name, value) in [
            ("", "x"),
            ("two words", "x"),
            ("colon:", "x"),
            ("naïve", "x"),
            ("Nats-Msg-Id", "x"),
            ("nats-expected-last-sequence", "x"),
            ("Traceparent", "x"),
            ("event-bus-appended-at", "1"),
            ("tenant", "line\r\nNats-Msg-Id: 1"),
            ("tenant", "nul\0"),
            ("tenant", &"x".repeat(1001)),
        ] {
            assert!(headers.insert(name, value).is_err(), "{name:?}: {value:?}");
        }
        assert!(headers.is_empty());
        headers.insert("Content-Type", "application/json").unwrap();
        headers.insert("tenant", "Zürich").unwrap();
        headers.insert("tenant", "").unwrap();
        assert_eq!(headers.iter().collect::<Vec<_>>(), [("Content-Type", "application/json"), ("tenant", "")]);
    }

    #[test]
    fn a_row_with_a_name_of_the_bus_can_be_published_without_it() {
        let headers = Headers::of_row(r#"{"tenant": "acme", "event-bus-appended-at": "1"}"#).expect("headers");
        assert_eq!(headers.to_json().as_deref(), Some(r#"{"tenant":"acme"}"#));
        assert!(Headers::of_row(r#"{"tenant": 1}"#).is_err());
    }
}
