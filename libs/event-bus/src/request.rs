//! Request/reply: a question that any replica of a service answers, as an endpoint of NATS' service API, so that
//! `nats micro ls` shows it.
//!
//! Nothing is kept: what dies on the way is a question without an answer, and whoever asks goes on without. Only for what
//! can be done without.

use crate::outbox::Connection;
use crate::{Bus, panics, trace};
use anyhow::{Context, bail};
use async_nats::HeaderMap;
use async_nats::service::error::Error as Refusal;
use async_nats::service::{NATS_SERVICE_ERROR, NATS_SERVICE_ERROR_CODE, Request, ServiceExt};
use contracts::Endpoint;
use futures::StreamExt;
use serde::{Serialize, de::DeserializeOwned};
use std::future::Future;
use std::sync::PoisonError;
use std::time::Duration;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// How long an answer may take. A person waits for it.
const ANSWER: Duration = Duration::from_millis(300);
/// Questions worked on at once: of the connections of the bus, two are enough for thousands per second.
const AT_ONCE: usize = 2;
/// What has arrived when a stop begins is still answered.
const FAREWELL: Duration = Duration::from_secs(1);

const NOT_FOUND: usize = 404;

pub(crate) async fn ask<Q: Serialize, A: DeserializeOwned>(
    bus: &Bus,
    endpoint: &Endpoint<Q, A>,
    question: &Q,
) -> anyhow::Result<Option<A>> {
    let answer = try_ask(bus, endpoint, question).await;
    let what = format!("asking {}", endpoint.subject());
    // Not a line for each of them: requests come by the hundreds.
    let mut log = bus.asking.lock().unwrap_or_else(PoisonError::into_inner);
    match &answer {
        Ok(_) => log.succeed(&what),
        Err(error) => drop(log.fail(&what, error)),
    }
    answer
}

async fn try_ask<Q: Serialize, A: DeserializeOwned>(
    bus: &Bus,
    endpoint: &Endpoint<Q, A>,
    question: &Q,
) -> anyhow::Result<Option<A>> {
    bus.connected()?;
    let mut headers = HeaderMap::new();
    if let Some(traceparent) = trace::current() {
        headers.insert("traceparent", traceparent);
    }
    let request = async_nats::Request::new().payload(serde_json::to_vec(question)?.into()).headers(headers);
    let answer = bus.nats.send_request(endpoint.subject(), request);
    // The client's own limit would not cover a connection that takes nothing.
    let answer = timeout(ANSWER, answer).await.context("no answer in time")??;
    if let Some(headers) = &answer.headers
        && let Some(code) = headers.get(NATS_SERVICE_ERROR_CODE)
    {
        if code.as_str() == NOT_FOUND.to_string() {
            return Ok(None);
        }
        let reason = headers.get(NATS_SERVICE_ERROR).map_or("no reason given", |reason| reason.as_str());
        bail!("{} answers {code} {reason}", endpoint.service);
    }
    Ok(Some(serde_json::from_slice(&answer.payload)?))
}

pub(crate) async fn answer<Q, A, F>(
    bus: &Bus,
    endpoint: &Endpoint<Q, A>,
    find: impl Fn(Connection, Q) -> F,
    stop: &CancellationToken,
) -> anyhow::Result<()>
where
    Q: DeserializeOwned,
    A: Serialize,
    F: Future<Output = anyhow::Result<Option<A>>>,
{
    let service = bus
        .nats
        .service_builder()
        .description(format!("Questions that the replicas of {} answer", endpoint.service))
        .queue_group(endpoint.service)
        .start(endpoint.service, env!("CARGO_PKG_VERSION"))
        .await
        .map_err(anyhow::Error::from_boxed)?;
    let about = [("description".to_owned(), endpoint.description.to_owned())].into();
    let requests = service.endpoint_builder().name(endpoint.name).metadata(about).add(endpoint.subject()).await;
    let requests = requests.map_err(anyhow::Error::from_boxed)?;
    let mut answering = std::pin::pin!(requests.for_each_concurrent(AT_ONCE, |request| respond(bus, request, &find)));
    tokio::select! {
        () = &mut answering => bail!("the connection to NATS was closed"),
        () = stop.cancelled() => {}
    }
    // Other replicas are asked from here on; the stream ends behind the last question that came to us.
    let _ = service.stop().await;
    let _ = timeout(FAREWELL, answering).await;
    Ok(())
}

async fn respond<Q, A, F>(bus: &Bus, request: Request, find: impl Fn(Connection, Q) -> F)
where
    Q: DeserializeOwned,
    A: Serialize,
    F: Future<Output = anyhow::Result<Option<A>>>,
{
    // The server does not check where a reply goes to: it is published with our rights, which an asker may not have.
    if !request.message.reply.as_ref().is_some_and(|reply| reply.starts_with("_INBOX")) {
        return tracing::warn!(reply = ?request.message.reply, "a question names no inbox for its answer: ignored");
    }
    let headers = request.message.headers.as_ref();
    let traceparent = headers.and_then(|headers| headers.get("traceparent")).map(ToString::to_string);
    let answer = match serde_json::from_slice(&request.message.payload) {
        Err(error) => Err(refusal(400, "Bad Request", &error.into())),
        Ok(question) => match timeout(ANSWER, trace::scope(traceparent, look(bus, question, find))).await {
            Ok(Ok(Some(answer))) => {
                serde_json::to_vec(&answer).map(Into::into).map_err(|error| refusal(500, "Internal", &error.into()))
            }
            Ok(Ok(None)) => Err(Refusal { status: "Not Found".to_owned(), code: NOT_FOUND }),
            Ok(Err(error)) => Err(refusal(503, "Unavailable", &error)),
            // Nobody waits for it any more.
            Err(_) => return,
        },
    };
    if let Err(error) = request.respond(answer).await {
        tracing::debug!("cannot answer a question: {error}");
    }
}

/// Not on a connection for requests: the more of those there are, the later an answer would come.
async fn look<Q, A, F>(bus: &Bus, question: Q, find: impl Fn(Connection, Q) -> F) -> anyhow::Result<Option<A>>
where
    F: Future<Output = anyhow::Result<Option<A>>>,
{
    bus.migrated()?;
    panics::caught("answering", find(Connection::acquire(&bus.db).await?, question)).await
}

fn refusal(code: usize, status: &str, error: &anyhow::Error) -> Refusal {
    tracing::warn!("a question was not answered: {error:#}");
    Refusal { status: status.to_owned(), code }
}
