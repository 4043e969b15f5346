/// An event: a fact about one aggregate at one version, with the aggregate's whole public state.
///
/// A subscriber needs this trait for the events of one stream. The body of a message is only the snapshot; the subject
/// is the kind of the event. A subscriber that needs only some fields has its own type with these fields, and ignores
/// all others.
pub trait Event: Sized + Send + Sync + 'static {
    /// The JetStream stream that holds these events, and nothing else.
    const STREAM: &'static str;

    /// The aggregate that the event is about. Events of one aggregate stay in version order.
    ///
    /// The bus does not interpret the id: 1 to 200 visible ASCII characters, for example a UUID or a number.
    fn aggregate_id(&self) -> String;

    /// The version of the aggregate that this event announces, from 0. There is one event per version.
    fn version(&self) -> i64;

    /// Decodes the event from the subject and the body of a message.
    ///
    /// # Errors
    /// The message is not an event that this subscriber knows. Another attempt cannot help, so the message becomes a
    /// dead letter at once.
    fn decode(subject: &str, body: &[u8]) -> Result<Self, DecodeError>;

    /// The id of the event, unique in the stream: `<aggregate id>-<version>`. It is the header `Nats-Msg-Id`.
    fn event_id(&self) -> String {
        format!("{}-{}", self.aggregate_id(), self.version())
    }
}

/// An event that a service publishes: usually an enum with a variant per subject, each with the whole snapshot.
pub trait Publish: Event {
    /// The NATS subject, which says what happened, for example `invoice.created`.
    fn subject(&self) -> &'static str;

    /// The body, as JSON.
    fn encode(&self) -> String;
}

/// Why a message is not an event. Another attempt cannot help.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// The subscriber does not know the subject.
    #[error("no event has the subject {0:?}")]
    UnknownSubject(String),
    /// The body is not JSON, or a field that the subscriber needs is missing or malformed.
    #[error("the body is not the JSON of this event: {0}")]
    Body(#[from] serde_json::Error),
}
