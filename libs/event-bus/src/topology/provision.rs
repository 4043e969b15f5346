//! Creates the streams and consumers that are missing on the server, and changes those that differ from their files.
//!
//! A limit of a stream that is higher on the server than in its file is kept: somebody has raised it, perhaps because the stream was
//! full. To lower it is a decision of a person, because a smaller stream may be full at once.
//!
//! The server cannot change some options of an existing stream or consumer. All other options are changed, and these
//! are reported with the command to run: a person decides whether to delete the stream or the consumer.

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

/// The consumer exists, and the option cannot be changed.
const CONSUMER_OPTION: u64 = 10012;
/// The option does not exist, or its value has another type.
const UNKNOWN_OPTION: u64 = 10025;
/// The stream would need more memory than the server has.
const MEMORY: u64 = 10028;
/// The stream would need more disk than the server has.
const DISK: u64 = 10047;
/// The stream exists, and the option cannot be changed; or options contradict each other.
const STREAM_OPTION: u64 = 10052;

/// Errors after which the server will also refuse the next attempt.
const FINAL: [u64; 5] = [CONSUMER_OPTION, UNKNOWN_OPTION, MEMORY, DISK, STREAM_OPTION];

/// The limits of a stream that are never lowered. The server has 0 or -1 for no limit.
const LIMITS: [&str; 4] = ["max_bytes", "max_msgs", "max_age", "num_replicas"];

/// The name of this work in logs.
pub(crate) const PROVISIONING: &str = "provisioning streams and consumers";

/// What to do with a stream or a consumer that differs from its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Drift {
    /// Change it, and log the change.
    Mend,
    /// Leave it: it may have been changed by hand for a reason.
    Leave,
}

/// Creates and changes streams and consumers so that they equal `topology`. Idempotent.
///
/// Services do not call it, and do not need the rights for it.
///
/// # Errors
/// It failed for all of `patience`; or the server cannot change an option of an existing stream or consumer. The error
/// names the option. All other options are changed before.
pub async fn provision(settings: &NatsSettings, topology: &Topology, patience: Duration) -> anyhow::Result<()> {
    let nats = nats::connect(settings, "provisioner", "provisioner").await?;
    let jetstream = nats::jetstream(settings, nats.clone());
    // Not a failed attempt: the connection is being opened.
    let _ = timeout(OPENING.min(patience), nats.flush()).await;
    let attempt = async || {
        nats::connected(&nats)?;
        let outcome = ensure(&jetstream, topology, settings.stream_replicas, Drift::Mend).await?;
        outcome.failed.map_or(Ok((outcome.kept, outcome.unchanged)), Err)
    };
    let (kept, unchanged) = patiently(patience, PROVISIONING, may_pass, attempt).await?;
    for line in kept {
        tracing::info!("{line}");
    }
    ensure!(unchanged.is_empty(), "some options differ from their files: {}", unchanged.join("; "));
    Ok(())
}

/// Provisions streams and consumers for a service.
pub(crate) struct Provisioner {
    jetstream: Context,
    topology: Topology,
    replicas: u8,
    /// Lines that have been logged. Several parts of a service provision, and each line is logged once.
    logged: Mutex<BTreeSet<String>>,
}

impl Provisioner {
    pub(crate) fn new(jetstream: Context, topology: Topology, replicas: u8) -> Self {
        Self { jetstream, topology, replicas, logged: Mutex::default() }
    }

    /// Creates what is missing. Idempotent, also from several replicas at once. An option that the server cannot change
    /// is logged once, and is no error: the service works with the existing option.
    pub(crate) async fn ensure(&self, drift: Drift) -> anyhow::Result<()> {
        let outcome = ensure(&self.jetstream, &self.topology, self.replicas, drift).await?;
        let mut logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner);
        for line in outcome.kept {
            if logged.insert(line.clone()) {
                tracing::info!("{line}");
            }
        }
        for line in outcome.unchanged {
            if logged.insert(line.clone()) {
                tracing::warn!("{line}");
            }
        }
        outcome.failed.map_or(Ok(()), Err)
    }
}

/// The outcome for all streams and consumers.
#[derive(Default)]
struct Outcome {
    /// Options that the server cannot change, each with the command to run.
    unchanged: Vec<String>,
    /// Limits that are higher than in their files.
    kept: Vec<String>,
    /// The first error of a stream or a consumer.
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
            Ok(differences) => {
                outcome.unchanged.extend(differences.unchanged);
                outcome.kept.extend(differences.kept);
            }
            Err(error) => {
                outcome.failed.get_or_insert(anyhow!(error).context(object.what));
            }
        }
    }
    Ok(outcome)
}

/// The options of a stream or a consumer that still differ from its file.
#[derive(Default)]
struct Differences {
    /// Those that the server cannot change.
    unchanged: Vec<String>,
    /// Limits that are higher than in the file.
    kept: Vec<String>,
}

/// A stream or a consumer, and the subjects of its requests.
struct Object<'a> {
    what: String,
    options: Options,
    /// The stream of a consumer.
    stream: Option<&'a str>,
    info: String,
    not_found: u64,
    create: String,
    update: String,
    /// The command that deletes it.
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

    /// Creates it, or changes the options that differ. Returns those that still differ.
    async fn ensure(&self, jetstream: &Context, drift: Drift) -> anyhow::Result<Result<Differences, ServerError>> {
        // Not `&()`, which is null: the server refuses null.
        match ask(jetstream, &self.info, &json!({})).await? {
            Ok(_) if drift == Drift::Leave => Ok(Ok(Differences::default())),
            Ok(found) => self.mend(jetstream, found).await,
            Err(error) if error.err_code == self.not_found => {
                let created = self.call(jetstream, &self.create, &self.options).await?;
                Ok(created.map(|()| {
                    tracing::info!("{} created", self.what);
                    Differences::default()
                }))
            }
            Err(error) => Ok(Err(error)),
        }
    }

    /// Changes all options that differ at once. If the server refuses that finally, changes each option by itself.
    async fn mend(&self, jetstream: &Context, mut found: Value) -> anyhow::Result<Result<Differences, ServerError>> {
        let Value::Object(mut config) = found["config"].take() else { return Ok(Ok(Differences::default())) };
        let (raised, differences): (Vec<_>, Vec<_>) = differences(&config, &self.options)
            .into_iter()
            .partition(|(option, wanted)| is_raised(option, &config, wanted));
        let kept = raised.iter().map(|(option, wanted)| self.keep(option, &config, wanted)).collect();
        let mut left = Differences { unchanged: Vec::new(), kept };
        let mut all = config.clone();
        all.extend(differences.iter().map(|(option, wanted)| (option.clone(), wanted.clone())));
        if differences.is_empty() {
            return Ok(Ok(left));
        }
        match self.call(jetstream, &self.update, &all).await? {
            Ok(()) => {
                for (option, wanted) in &differences {
                    self.log_change(option, &config, wanted);
                }
                return Ok(Ok(left));
            }
            Err(error) if !error.is_final() => return Ok(Err(error)),
            Err(_) => {}
        }
        for (option, wanted) in differences {
            let mut one = config.clone();
            one.insert(option.clone(), wanted.clone());
            match self.call(jetstream, &self.update, &one).await? {
                Ok(()) => {
                    self.log_change(&option, &config, &wanted);
                    config = one;
                }
                Err(error) => left.unchanged.push(self.report(&option, &config, &wanted, &error)),
            }
        }
        Ok(Ok(left))
    }

    fn log_change(&self, option: &str, before: &Options, wanted: &Value) {
        let before = shown(before.get(option).unwrap_or(&Value::Null));
        tracing::warn!("{}: {option} was {before} and is {wanted} now", self.what);
    }

    fn keep(&self, option: &str, config: &Options, wanted: &Value) -> String {
        let stays = shown(config.get(option).unwrap_or(&Value::Null));
        format!(
            "{}: {option} stays {stays}, its file says {wanted}: it was raised on the server, and is never lowered",
            self.what
        )
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

/// The options whose value on the server differs, with the wanted values.
fn differences(config: &Options, wanted: &Options) -> Vec<(String, Value)> {
    let differs = |option: &String, value: &Value| match config.get(option) {
        // The server omits options that are false, zero or empty.
        None => !is_zero(value),
        Some(found) => found != value,
    };
    wanted.clone().into_iter().filter(|(option, value)| differs(option, value)).collect()
}

/// Whether the option is a limit that is higher on the server than wanted.
fn is_raised(option: &str, config: &Options, wanted: &Value) -> bool {
    let limit = |value: Option<&Value>| match value.and_then(Value::as_i64) {
        Some(limit) if limit > 0 => limit,
        _ => i64::MAX,
    };
    LIMITS.contains(&option) && limit(config.get(option)) > limit(Some(wanted))
}

/// An error in a reply of the server.
#[derive(Debug, thiserror::Error, Deserialize)]
#[error("{description} (error {err_code})")]
pub(crate) struct ServerError {
    err_code: u64,
    description: String,
}

impl ServerError {
    fn is_final(&self) -> bool {
        FINAL.contains(&self.err_code)
    }
}

/// Whether another attempt may succeed.
fn may_pass(error: &anyhow::Error) -> bool {
    !error.downcast_ref().is_some_and(ServerError::is_final)
}

/// Sends a request to the JetStream API. Returns the error in the reply, if there is one.
///
/// # Errors
/// There is no reply.
pub(crate) async fn ask(
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
