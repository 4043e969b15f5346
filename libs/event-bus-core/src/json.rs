//! Bodies as JSON.

use crate::DecodeError;
use serde::de::{DeserializeOwned, Error};
use serde::{Deserialize, Deserializer, Serialize};

/// Decodes a snapshot from a body.
///
/// # Errors
/// The body is not JSON, or a field is missing or malformed.
pub fn decode_json<T: DeserializeOwned>(body: &[u8]) -> Result<T, DecodeError> {
    Ok(serde_json::from_slice(body)?)
}

/// Encodes `snapshot` as a body.
///
/// # Panics
/// It has no JSON form: its `Serialize` fails, or a map has keys that are not strings.
pub fn encode_json<T: Serialize>(snapshot: &T) -> String {
    serde_json::to_string(snapshot).expect("a snapshot has a JSON form")
}

/// Reads a version, for `#[serde(deserialize_with = "event_bus_core::deserialize_version")]`.
///
/// Versions count from 0. A negative one is refused before it is compared with others.
///
/// # Errors
/// It is not an integer, or is negative.
pub fn deserialize_version<'de, D: Deserializer<'de>>(deserializer: D) -> Result<i64, D::Error> {
    let version = i64::deserialize(deserializer)?;
    if version < 0 { Err(D::Error::custom("a version is 0 or more")) } else { Ok(version) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize)]
    struct Snapshot {
        #[serde(deserialize_with = "deserialize_version")]
        version: i64,
    }

    #[test]
    fn a_version_is_an_integer_from_zero() {
        for (body, expected) in [("0", Some(0)), ("7", Some(7)), ("-1", None), ("1.5", None), ("null", None)] {
            let snapshot = decode_json::<Snapshot>(format!(r#"{{"version": {body}}}"#).as_bytes());
            assert_eq!(snapshot.ok().map(|snapshot| snapshot.version), expected, "{body}");
        }
    }
}
