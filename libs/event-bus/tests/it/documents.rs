//! The events of these tests: documents, with UUIDs as ids, and the stream that holds them.

use event_bus::{DecodeError, Event, Publish, Topology, decode_json, encode_json};
use serde::{Deserialize, Serialize};
use std::fmt;

/// A UUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Id(u128);

impl Id {
    pub fn generate() -> Self {
        Self(rand::random())
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = format!("{:032x}", self.0);
        let parts = [&digits[..8], &digits[8..12], &digits[12..16], &digits[16..20], &digits[20..]];
        f.write_str(&parts.join("-"))
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Document {
    pub id: String,
    pub version: i64,
    pub title: String,
}

#[derive(Clone, Debug)]
pub enum DocumentEvent {
    Created(Document),
    Updated(Document),
}

impl DocumentEvent {
    pub fn document(&mut self) -> &mut Document {
        match self {
            Self::Created(document) | Self::Updated(document) => document,
        }
    }

    pub fn snapshot(&self) -> &Document {
        match self {
            Self::Created(document) | Self::Updated(document) => document,
        }
    }
}

impl Event for DocumentEvent {
    const STREAM: &'static str = "DOCUMENTS";

    fn aggregate_id(&self) -> String {
        self.snapshot().id.clone()
    }

    fn version(&self) -> i64 {
        self.snapshot().version
    }

    fn decode(subject: &str, body: &[u8]) -> Result<Self, DecodeError> {
        match subject {
            "document.created" => decode_json(body).map(Self::Created),
            "document.updated" => decode_json(body).map(Self::Updated),
            unknown => Err(DecodeError::UnknownSubject(unknown.to_owned())),
        }
    }
}

impl Publish for DocumentEvent {
    fn subject(&self) -> &'static str {
        match self {
            Self::Created(_) => "document.created",
            Self::Updated(_) => "document.updated",
        }
    }

    fn encode(&self) -> String {
        encode_json(self.snapshot())
    }
}

/// The stream of documents with a consumer, and a stream that takes no atomic batches.
pub fn topology() -> Topology {
    topology_of(2_147_483_648)
}

/// The same, with so many bytes for the documents.
pub fn topology_of(max_bytes: u64) -> Topology {
    let documents = r#"{
        "subjects": ["document.created", "document.updated"],
        "retention": "limits", "storage": "file", "discard": "new", "max_bytes": MAX_BYTES,
        "duplicate_window": 10000000000, "allow_atomic": true, "allow_direct": true
    }"#
    .replace("MAX_BYTES", &max_bytes.to_string());
    let reader = r#"{
        "deliver_policy": "all", "ack_policy": "explicit", "ack_wait": 30000000000, "max_deliver": -1,
        "max_ack_pending": 16384, "max_waiting": 512, "replay_policy": "instant"
    }"#;
    let notes = r#"{
        "subjects": ["note.created"], "retention": "limits", "storage": "file", "discard": "new", "allow_atomic": false
    }"#;
    Topology::parse([
        ("DOCUMENTS.stream.json", &*documents),
        ("DOCUMENTS.reader.consumer.json", reader),
        ("NOTES.stream.json", notes),
    ])
    .unwrap()
}

/// A version of a document.
pub fn event(id: Id, version: i64) -> DocumentEvent {
    let document = Document { id: id.to_string(), version, title: format!("version {version}") };
    if version == 0 { DocumentEvent::Created(document) } else { DocumentEvent::Updated(document) }
}

/// The ids of a document's events.
pub fn event_ids(id: Id, versions: std::ops::Range<i64>) -> Vec<String> {
    versions.map(|version| event(id, version).event_id()).collect()
}
