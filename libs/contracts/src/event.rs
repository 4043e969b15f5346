//! What every event is: a fact about one aggregate at one version, carrying the aggregate's whole public state.

use crate::Id;
use serde::{Deserialize, Deserializer, de::DeserializeOwned};

/// What a reader needs of the events of one stream.
///
/// The body on the wire is the snapshot alone, as JSON; the subject says what happened. A reader that needs only some of
/// the fields has a type of its own with these fields. It ignores all others, whether it knows them or not.
pub trait Event: Sized + Send + Sync + 'static {
    /// The JetStream stream that holds these events, and nothing else.
    const STREAM: &'static str;

    /// What it happened to. Events of one aggregate stay in version order.
    fn aggregate_id(&self) -> Id;

    /// The version of the aggregate that this event announces, from 0. One event per version.
    fn version(&self) -> i64;

    /// The event that `subject` and `body` stand for.
    fn decode(subject: &str, body: &[u8]) -> Result<Self, DecodeError>;

    /// Unique within the stream: `<aggregate id>-<version>`. Travels as the `Nats-Msg-Id` header.
    fn event_id(&self) -> String {
        format!("{}-{}", self.aggregate_id(), self.version())
    }
}

/// An event that a service of ours publishes: an enum with a variant per subject, each with the whole snapshot.
pub trait Publish: Event {
    /// What happened, for example `ticket.created`; also the NATS subject.
    fn subject(&self) -> &'static str;

    /// The body, as JSON, with every field of the contract.
    fn encode(&self) -> String;
}

/// Why bytes are not an event. Trying again cannot help.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// The stream carries a subject that its reader does not know.
    #[error("no event has the subject {0:?}")]
    UnknownSubject(String),
    /// The body is not JSON, or a field that the reader needs is missing or malformed.
    #[error("the body is not the JSON of this event: {0}")]
    Body(#[from] serde_json::Error),
}

pub(crate) fn body<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, DecodeError> {
    Ok(serde_json::from_slice(bytes)?)
}

/// Our snapshots have string keys and finite numbers only, which always have a JSON form.
pub(crate) fn json<T: serde::Serialize>(snapshot: &T) -> String {
    serde_json::to_string(snapshot).expect("a snapshot has a JSON form")
}

/// Versions count saved changes, and reservations orders: a negative one is garbage and must not reach a comparison.
pub(crate) fn version<'de, D: Deserializer<'de>>(deserializer: D) -> Result<i64, D::Error> {
    let version = i64::deserialize(deserializer)?;
    if version < 0 {
        return Err(serde::de::Error::custom("versions and reservations are 0 or more"));
    }
    Ok(version)
}
