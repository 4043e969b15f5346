use std::marker::PhantomData;

/// A request `Q` that every replica of a service can reply to with an `A`, or with "not found". Both are JSON.
#[derive(Debug)]
pub struct Endpoint<Q, A> {
    /// The service that replies, one word.
    pub service: &'static str,
    /// What is requested, one word.
    pub name: &'static str,
    /// Shown by the tools of NATS.
    pub description: &'static str,
    types: PhantomData<fn(Q) -> A>,
}

impl<Q, A> Endpoint<Q, A> {
    /// An endpoint, as a constant that both services use.
    pub const fn new(service: &'static str, name: &'static str, description: &'static str) -> Self {
        Self { service, name, description, types: PhantomData }
    }

    /// The NATS subject: `<service>.<name>`.
    pub fn subject(&self) -> String {
        format!("{}.{}", self.service, self.name)
    }
}
