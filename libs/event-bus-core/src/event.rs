/// An event: a fact about one aggregate at one version, with the aggregate's whole public state.
///
/// This trait is what a reader needs of the events of one stream. The body on the wire is the snapshot alone; the subject
/// says what happened. A reader that needs only some of the fields has a type of its own with these fields, and ignores
/// all others.
pub trait Event: Sized + Send + Sync + 'static {
    /// The JetStream stream that holds these events, and nothing else.
    const STREAM: &'static str;

    /// The aggregate that the event is about. Events of one aggregate stay in version order.
    ///
    /// The bus does not look into the id: 1 to 200 visible ASCII characters, for example a UUID or a number.
    fn aggregate_id(&self) -> String;

    /// The version of the aggregate that this event announces, from 0. There is one event per version.
    fn version(&self) -> i64;

    /// The event that `subject` and `body` stand for.
    ///
    /// # Errors
    /// It is none that this reader understands. Trying again cannot help, so the message becomes a dead letter at once.
    fn decode(subject: &str, body: &[u8]) -> Result<Self, DecodeError>;

    /// Unique within the stream: `<aggregate id>-<version>`. Travels as the `Nats-Msg-Id` header.
    fn event_id(&self) -> String {
        format!("{}-{}", self.aggregate_id(), self.version())
    }
}

/// An event that a service publishes: usually an enum with a variant per subject, each with the whole snapshot.
pub trait Publish: Event {
    /// What happened, for example `invoice.created`; also the NATS subject.
    fn subject(&self) -> &'static str;

    /// The body, as JSON.
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
