//! Streams and durable consumers, as `infra/jetstream/*.json` describes them in NATS' own format.
//!
//! The files go to the server as they are, so that every option it has can be set there, known to the client or not.

use crate::nats::{self, NatsSettings};
use crate::retry::patiently;
use anyhow::{Context, bail, ensure};
use async_nats::Client;
use bytes::Bytes;
use serde_json::{Map, Value, json};
use std::time::Duration;
use tokio::time::timeout;

/// Streams: name and configuration.
const STREAMS: [(&str, &str); 4] = [
    ("TICKETS", include_str!("../../../infra/jetstream/TICKETS.stream.json")),
    ("ORDERS", include_str!("../../../infra/jetstream/ORDERS.stream.json")),
    ("PAYMENTS", include_str!("../../../infra/jetstream/PAYMENTS.stream.json")),
    ("EXPIRATION", include_str!("../../../infra/jetstream/EXPIRATION.stream.json")),
];

/// Durable consumers: stream, name and configuration.
const CONSUMERS: [(&str, &str, &str); 4] = [
    ("TICKETS", "orders", include_str!("../../../infra/jetstream/TICKETS.orders.consumer.json")),
    ("ORDERS", "tickets", include_str!("../../../infra/jetstream/ORDERS.tickets.consumer.json")),
    ("PAYMENTS", "orders", include_str!("../../../infra/jetstream/PAYMENTS.orders.consumer.json")),
    ("EXPIRATION", "orders", include_str!("../../../infra/jetstream/EXPIRATION.orders.consumer.json")),
];

const STREAM_NOT_FOUND: u64 = 10059;
const CONSUMER_NOT_FOUND: u64 = 10014;

/// What to do about what is there but configured otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Drift {
    /// Change it, and say so.
    Mend,
    /// Somebody may have had a reason.
    Leave,
}

/// How long the server may take for one answer.
const ANSWER: Duration = Duration::from_secs(3);

/// Creates what is missing and mends what has drifted, once and not as a part of a service, which then needs no right to.
///
/// # Errors
/// It did not work for all of `patience`.
pub async fn provision(settings: &NatsSettings, patience: Duration) -> anyhow::Result<()> {
    let nats = nats::connect(settings, "provisioner", "provisioner").await?;
    let provision = async || {
        nats::connected(&nats)?;
        self::ensure(&nats, settings.stream_replicas, Drift::Mend).await
    };
    patiently(patience, "provisioning streams and consumers", |_| true, provision).await
}

/// Creates what is missing. Doing it twice, or from several replicas at once, changes nothing.
pub(crate) async fn ensure(nats: &Client, replicas: u8, drift: Drift) -> anyhow::Result<()> {
    for (name, file) in STREAMS {
        let mut wanted: Value = serde_json::from_str(file).context("a stream's file is not JSON")?;
        wanted["num_replicas"] = replicas.into();
        match find(nats, &format!("STREAM.INFO.{name}"), STREAM_NOT_FOUND).await? {
            None => call(nats, &format!("STREAM.CREATE.{name}"), &wanted).await?,
            Some(found) if drift == Drift::Mend => {
                if let Some(config) = merge(&format!("stream {name}"), &found, &wanted) {
                    call(nats, &format!("STREAM.UPDATE.{name}"), &config).await?;
                }
            }
            Some(_) => {}
        }
    }
    for (stream, name, file) in CONSUMERS {
        let wanted = serde_json::from_str(file).context("a consumer's file is not JSON")?;
        let config = match find(nats, &format!("CONSUMER.INFO.{stream}.{name}"), CONSUMER_NOT_FOUND).await? {
            None => Some(wanted),
            Some(_) if drift == Drift::Leave => None,
            Some(found) => merge(&format!("consumer {name} of {stream}"), &found, &wanted),
        };
        if let Some(config) = config {
            let request = json!({ "stream_name": stream, "config": config });
            call(nats, &format!("CONSUMER.DURABLE.CREATE.{stream}.{name}"), &request).await?;
        }
    }
    Ok(())
}

/// What the server has under its configuration, changed to what we want; `None` where they agree.
fn merge(what: &str, found: &Value, wanted: &Value) -> Option<Value> {
    let empty = Map::new();
    let mut config = found["config"].as_object().unwrap_or(&empty).clone();
    let mut drifted = false;
    for (option, value) in wanted.as_object().unwrap_or(&empty) {
        let before = config.insert(option.clone(), value.clone());
        // The server leaves out what is false, zero or empty.
        if before.as_ref() != Some(value) && !(before.is_none() && is_zero(value)) {
            let before = before.unwrap_or_default();
            tracing::warn!("{what}: {option} is {before} and becomes {value}");
            drifted = true;
        }
    }
    drifted.then_some(Value::Object(config))
}

fn is_zero(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(flag) => !flag,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
    }
}

async fn find(nats: &Client, subject: &str, not_found: u64) -> anyhow::Result<Option<Value>> {
    let answer = ask(nats, subject, Bytes::new()).await?;
    match answer["error"]["err_code"].as_u64() {
        None if answer["error"].is_null() => Ok(Some(answer)),
        Some(code) if code == not_found => Ok(None),
        _ => bail!("{subject}: the server answers {}", answer["error"]),
    }
}

async fn call(nats: &Client, subject: &str, request: &Value) -> anyhow::Result<()> {
    let answer = ask(nats, subject, request.to_string().into()).await?;
    ensure!(answer["error"].is_null(), "{subject}: the server answers {}", answer["error"]);
    tracing::info!("{subject}: done");
    Ok(())
}

async fn ask(nats: &Client, subject: &str, request: Bytes) -> anyhow::Result<Value> {
    let answer = timeout(ANSWER, nats.request(format!("$JS.API.{subject}"), request)).await;
    let answer = answer.with_context(|| format!("{subject} is not answered"))?.with_context(|| subject.to_owned())?;
    serde_json::from_slice(&answer.payload).with_context(|| format!("{subject}: the answer is not JSON"))
}
