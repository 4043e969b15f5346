//! Creating what is missing on the server, and changing what differs from its file.
//!
//! The server changes some options only of a new stream or consumer. Such an option stays as it is, all others are
//! changed, and what to do is reported: deleting a stream or a consumer is the decision of a person.

use super::{Options, Topology, is_zero, shown};
use crate::nats::{self, NatsSettings};
use crate::retry::patiently;
use anyhow::{Context as _, anyhow, ensure};
use async_nats::jetstream::Context;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::time::timeout;

/// How long the server may take for one reply.
const REPLY: Duration = Duration::from_secs(3);
/// How long the first connection may take before a failure is logged.
const OPENING: Duration = Duration::from_secs(1);

const STREAM_NOT_FOUND: u64 = 10059;
const CONSUMER_NOT_FOUND: u64 = 10014;

/// The consumer exists, and the option of a consumer cannot be changed.
const CONSUMER_OPTION: u64 = 10012;
/// The option does not exist, or its value has another type.
const UNKNOWN_OPTION: u64 = 10025;
/// The stream would need more memory than the server has.
const MEMORY: u64 = 10028;
/// The stream would need more disk than the server has.
const DISK: u64 = 10047;
/// The stream exists, and the option cannot be changed; or options contradict each other.
const STREAM_OPTION: u64 = 10052;

/// Replies to a configuration that the server refuses however often it is sent.
const FINAL: [u64; 5] = [CONSUMER_OPTION, UNKNOWN_OPTION, MEMORY, DISK, STREAM_OPTION];

/// What is logged while it fails.
pub(crate) const PROVISIONING: &str = "provisioning streams and consumers";

/// What to do about what is there but configured otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Drift {
    /// Change it, and say so.
    Mend,
    /// Leave it: it may have been changed by hand for a reason.
    Leave,
}

/// Creates and changes streams and consumers until they are as `topology` says. Doing it again changes nothing.
///
/// Services do not call it, and need no right for it.
///
/// # Errors
/// It did not work for all of `patience`; or the server does not change an option of what exists, which the error
/// names. All others are changed before this is reported.
pub async fn provision(settings: &NatsSettings, topology: &Topology, patience: Duration) -> anyhow::Result<()> {
    let nats = nats::connect(settings, "provisioner", "provisioner").await?;
    let jetstream = nats::jetstream(settings, nats.clone());
    // Not a failed attempt: the connection is being opened.
    let _ = timeout(OPENING.min(patience), nats.flush()).await;
    let attempt = async || {
        nats::connected(&nats)?;
        let outcome = ensure(&jetstream, topology, settings.stream_replicas, Drift::Mend).await?;
        outcome.failed.map_or(Ok(outcome.unchanged), Err)
    };
    let unchanged = patiently(patience, PROVISIONING, may_pass, attempt).await?;
    ensure!(unchanged.is_empty(), "not all is as the files say: {}", unchanged.join("; "));
    Ok(())
}

/// Provisions for a service.
pub(crate) struct Provisioner {
    jetstream: Context,
    topology: Topology,
    replicas: u8,
    /// What has been logged, which several tasks of a service would find.
    logged: Mutex<BTreeSet<String>>,
}

impl Provisioner {
    pub(crate) fn new(jetstream: Context, topology: Topology, replicas: u8) -> Self {
        Self { jetstream, topology, replicas, logged: Mutex::default() }
    }

    /// Creates what is missing. Doing it twice, or from several replicas at once, changes nothing. An option that the
    /// server does not change is logged once, and is no error: the service works with what there is.
    pub(crate) async fn ensure(&self, drift: Drift) -> anyhow::Result<()> {
        let outcome = ensure(&self.jetstream, &self.topology, self.replicas, drift).await?;
        let mut logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner);
        for line in outcome.unchanged {
            if logged.insert(line.clone()) {
                tracing::warn!("{line}");
            }
        }
        outcome.failed.map_or(Ok(()), Err)
    }
}

/// What became of all streams and consumers.
#[derive(Default)]
struct Outcome {
    /// Options of what exists that the server does not change, and what to do.
    unchanged: Vec<String>,
    /// The first that could not be provisioned.
    failed: Option<anyhow::Error>,
}

/// # Errors
/// The server does not reply.
async fn ensure(jetstream: &Context, topology: &Topology, replicas: u8, drift: Drift) -> anyhow::Result<Outcome> {
    let mut outcome = Outcome::default();
    let streams = topology.streams.iter().map(|(name, options)| Object::stream(name, options, replicas));
    let consumers = topology.consumers.iter().map(|((stream, name), options)| Object::consumer(stream, name, options));
    for object in streams.chain(consumers) {
        match object.ensure(jetstream, drift).await? {
            Ok(unchanged) => outcome.unchanged.extend(unchanged),
            Err(error) => {
                outcome.failed.get_or_insert(anyhow!(error).context(object.what));
            }
        }
    }
    Ok(outcome)
}

/// A stream or a consumer, and how the server is asked about it.
struct Object<'a> {
    what: String,
    options: Options,
    /// The stream of a consumer.
    stream: Option<&'a str>,
    info: String,
    not_found: u64,
    create: String,
    update: String,
    /// What deletes it.
    command: String,
}

impl<'a> Object<'a> {
    fn stream(name: &str, options: &Options, replicas: u8) -> Self {
        let mut options = options.clone();
        options.insert("num_replicas".to_owned(), replicas.into());
        Self {
            what: format!("stream {name}"),
            options,
            stream: None,
            info: format!("STREAM.INFO.{name}"),
            not_found: STREAM_NOT_FOUND,
            create: format!("STREAM.CREATE.{name}"),
            update: format!("STREAM.UPDATE.{name}"),
            command: format!("`nats stream rm {name}`, which deletes its events and its consumers"),
        }
    }

    fn consumer(stream: &'a str, name: &str, options: &Options) -> Self {
        let create = format!("CONSUMER.DURABLE.CREATE.{stream}.{name}");
        Self {
            what: format!("consumer {name} of {stream}"),
            options: options.clone(),
            stream: Some(stream),
            info: format!("CONSUMER.INFO.{stream}.{name}"),
            not_found: CONSUMER_NOT_FOUND,
            update: create.clone(),
            create,
            command: format!("`nats consumer rm {stream} {name}`, which deletes its position in the stream"),
        }
    }

    /// Creates it, or changes what differs. Returns what the server does not change.
    async fn ensure(&self, jetstream: &Context, drift: Drift) -> anyhow::Result<Result<Vec<String>, ServerError>> {
        // Not `&()`: the server refuses null.
        match ask(jetstream, &self.info, &json!({})).await? {
            Ok(_) if drift == Drift::Leave => Ok(Ok(Vec::new())),
            Ok(found) => self.mend(jetstream, found).await,
            Err(error) if error.err_code == self.not_found => {
                let created = self.call(jetstream, &self.create, &self.options).await?;
                Ok(created.map(|()| {
                    tracing::info!("{} created", self.what);
                    Vec::new()
                }))
            }
            Err(error) => Ok(Err(error)),
        }
    }

    /// Changes all that differs at once; or, if the server refuses that for good, each option by itself.
    async fn mend(&self, jetstream: &Context, mut found: Value) -> anyhow::Result<Result<Vec<String>, ServerError>> {
        let Value::Object(mut config) = found["config"].take() else { return Ok(Ok(Vec::new())) };
        let differences = differences(&config, &self.options);
        let mut all = config.clone();
        all.extend(differences.iter().map(|(option, wanted)| (option.clone(), wanted.clone())));
        if differences.is_empty() {
            return Ok(Ok(Vec::new()));
        }
        match self.call(jetstream, &self.update, &all).await? {
            Ok(()) => {
                for (option, wanted) in &differences {
                    self.log_change(option, &config, wanted);
                }
                return Ok(Ok(Vec::new()));
            }
            Err(error) if !error.is_final() => return Ok(Err(error)),
            Err(_) => {}
        }
        let mut unchanged = Vec::new();
        for (option, wanted) in differences {
            let mut one = config.clone();
            one.insert(option.clone(), wanted.clone());
            match self.call(jetstream, &self.update, &one).await? {
                Ok(()) => {
                    self.log_change(&option, &config, &wanted);
                    config = one;
                }
                Err(error) => unchanged.push(self.report(&option, &config, &wanted, &error)),
            }
        }
        Ok(Ok(unchanged))
    }

    fn log_change(&self, option: &str, before: &Options, wanted: &Value) {
        let before = shown(before.get(option).unwrap_or(&Value::Null));
        tracing::warn!("{}: {option} was {before} and is {wanted} now", self.what);
    }

    fn report(&self, option: &str, config: &Options, wanted: &Value, error: &ServerError) -> String {
        let Self { what, command, .. } = self;
        let stays = shown(config.get(option).unwrap_or(&Value::Null));
        format!(
            "{what}: {option} stays {stays}, its file says {wanted}: the server refuses the change: {error}. Correct the \
             file; or delete the {what} with {command}, and provision again to create it"
        )
    }

    async fn call(
        &self,
        jetstream: &Context,
        subject: &str,
        config: &Options,
    ) -> anyhow::Result<Result<(), ServerError>> {
        let reply = match self.stream {
            None => ask(jetstream, subject, config).await?,
            Some(stream) => ask(jetstream, subject, &json!({ "stream_name": stream, "config": config })).await?,
        };
        Ok(reply.map(drop))
    }
}

/// The options that the server has otherwise than they are wanted, with the wanted values.
fn differences(config: &Options, wanted: &Options) -> Vec<(String, Value)> {
    let differs = |option: &String, value: &Value| match config.get(option) {
        // The server leaves out what is false, zero or empty.
        None => !is_zero(value),
        Some(found) => found != value,
    };
    wanted.clone().into_iter().filter(|(option, value)| differs(option, value)).collect()
}

/// The server replies that it does not do something.
#[derive(Debug, thiserror::Error, Deserialize)]
#[error("{description} (error {err_code})")]
struct ServerError {
    err_code: u64,
    description: String,
}

impl ServerError {
    fn is_final(&self) -> bool {
        FINAL.contains(&self.err_code)
    }
}

/// Whether the same may succeed later.
fn may_pass(error: &anyhow::Error) -> bool {
    !error.downcast_ref().is_some_and(ServerError::is_final)
}

/// # Errors
/// There is no reply.
async fn ask(
    jetstream: &Context,
    subject: &str,
    request: &(impl Serialize + ?Sized),
) -> anyhow::Result<Result<Value, ServerError>> {
    let reply = timeout(REPLY, jetstream.request(subject.to_owned(), request)).await;
    let mut reply: Value =
        reply.with_context(|| format!("{subject}: no reply"))?.with_context(|| subject.to_owned())?;
    match reply["error"].take() {
        Value::Null => Ok(Ok(reply)),
        error => Ok(Err(serde_json::from_value(error).with_context(|| format!("{subject}: unexpected reply"))?)),
    }
}
