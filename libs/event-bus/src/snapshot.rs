//! A snapshot as the owner of a stream sends it to a reader.

use crate::headers::Headers;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// The event that announced the current version of an aggregate.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Snapshot {
    pub(crate) id: String,
    pub(crate) version: i64,
    pub(crate) subject: String,
    /// The bytes of the event, unchanged.
    pub(crate) body: Box<RawValue>,
    #[serde(default, skip_serializing_if = "Headers::is_empty")]
    pub(crate) headers: Headers,
}
