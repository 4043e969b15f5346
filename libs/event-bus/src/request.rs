//! Request/reply between services. An endpoint belongs to NATS' service API, so `nats micro ls` lists it; any replica
//! of its service replies.
//!
//! Requests are not stored. A lost request has no reply, and the requester continues without it.

use crate::broker::Broker;
use crate::connection::Connection;
use crate::database::Database;
use crate::headers::TRACEPARENT;
use crate::retry::Backoff;
use crate::settings::Settings;
use crate::{panics, trace};
use anyhow::{Context, bail};
use async_nats::HeaderMap;
use async_nats::service::error::Error as ServiceError;
use async_nats::service::{NATS_SERVICE_ERROR, NATS_SERVICE_ERROR_CODE, Request, ServiceExt};
use event_bus_core::Endpoint;
use futures::StreamExt;
use serde::{Serialize, de::DeserializeOwned};
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// How long after a stop the requests that have arrived before it are replied to.
const DRAIN: Duration = Duration::from_secs(1);

const NOT_FOUND: usize = 404;

/// Sends requests to other services.
#[derive(Clone)]
pub(crate) struct Requester {
    broker: Broker,
    timeout: Duration,
    /// Logs failures.
    failing: Arc<Mutex<Backoff>>,
}

impl Requester {
    pub(crate) fn new(broker: Broker, timeout: Duration) -> Self {
        Self { broker, timeout, failing: Arc::default() }
    }

    pub(crate) async fn request<Q: Serialize, A: DeserializeOwned>(
        &self,
        endpoint: &Endpoint<Q, A>,
        body: &Q,
    ) -> anyhow::Result<Option<A>> {
        let reply = self.try_request(endpoint, body).await;
        let what = format!("requesting {}", endpoint.subject());
        // Not one line for each failure: there may be hundreds of requests per second.
        let mut log = self.failing.lock().unwrap_or_else(PoisonError::into_inner);
        match &reply {
            Ok(_) => log.succeed(&what),
            Err(error) => drop(log.fail(&what, error)),
        }
        reply
    }

    /// Does not log a failure.
    pub(crate) async fn try_request<Q: Serialize, A: DeserializeOwned>(
        &self,
        endpoint: &Endpoint<Q, A>,
        body: &Q,
    ) -> anyhow::Result<Option<A>> {
        self.broker.connected()?;
        let mut headers = HeaderMap::new();
        if let Some(traceparent) = trace::current() {
            headers.insert(TRACEPARENT, traceparent);
        }
        let request = async_nats::Request::new().payload(serde_json::to_vec(body)?.into()).headers(headers);
        let reply = self.broker.client.send_request(endpoint.subject(), request);
        // The timeout of the client does not cover a blocked connection.
        let reply = timeout(self.timeout, reply).await.context("no reply in time")??;
        if let Some(headers) = &reply.headers
            && let Some(code) = headers.get(NATS_SERVICE_ERROR_CODE)
        {
            if code.as_str() == NOT_FOUND.to_string() {
                return Ok(None);
            }
            let reason = headers.get(NATS_SERVICE_ERROR).map_or("no reason given", |reason| reason.as_str());
            bail!("{} replies {code} {reason}", endpoint.service);
        }
        Ok(Some(serde_json::from_slice(&reply.payload)?))
    }
}

/// One endpoint of this process.
struct Replier<'a, R> {
    database: &'a Database,
    timeout: Duration,
    find: R,
}

pub(crate) async fn reply<Q, A, F>(
    database: &Database,
    broker: &Broker,
    settings: &Settings,
    endpoint: &Endpoint<Q, A>,
    find: impl Fn(Connection, Q) -> F,
    stop: &CancellationToken,
) -> anyhow::Result<()>
where
    Q: DeserializeOwned,
    A: Serialize,
    F: Future<Output = anyhow::Result<Option<A>>>,
{
    let service = broker
        .client
        .service_builder()
        .description(format!("Requests that the replicas of {} reply to", endpoint.service))
        .queue_group(endpoint.service)
        .start(endpoint.service, env!("CARGO_PKG_VERSION"))
        .await
        .map_err(anyhow::Error::from_boxed)?;
    let about = [("description".to_owned(), endpoint.description.to_owned())].into();
    let requests = service.endpoint_builder().name(endpoint.name).metadata(about).add(endpoint.subject()).await;
    let requests = requests.map_err(anyhow::Error::from_boxed)?;
    let replier = Replier { database, timeout: settings.reply_timeout, find };
    let replying = requests.for_each_concurrent(settings.reply_concurrency, |request| replier.reply(request));
    let mut replying = std::pin::pin!(replying);
    tokio::select! {
        () = &mut replying => bail!("the connection to NATS was closed"),
        () = stop.cancelled() => {}
    }
    // From here on, other replicas get the requests. The stream ends after the last request that this one has received.
    let _ = service.stop().await;
    let _ = timeout(DRAIN, replying).await;
    Ok(())
}

impl<R> Replier<'_, R> {
    async fn reply<Q, A, F>(&self, request: Request)
    where
        R: Fn(Connection, Q) -> F,
        Q: DeserializeOwned,
        A: Serialize,
        F: Future<Output = anyhow::Result<Option<A>>>,
    {
        // A reply is published with the rights of this service, so its subject may only be an inbox.
        if !request.message.reply.as_ref().is_some_and(|reply| reply.starts_with("_INBOX")) {
            return tracing::warn!(reply = ?request.message.reply, "a request names no inbox for its reply: ignored");
        }
        let headers = request.message.headers.as_ref();
        let traceparent = headers.and_then(|headers| headers.get(TRACEPARENT)).map(ToString::to_string);
        let reply = match serde_json::from_slice(&request.message.payload) {
            Err(error) => Err(failure(400, "Bad Request", &error.into())),
            Ok(body) => match timeout(self.timeout, trace::scope(traceparent, self.find(body))).await {
                Ok(Ok(Some(found))) => {
                    serde_json::to_vec(&found).map(Into::into).map_err(|error| failure(500, "Internal", &error.into()))
                }
                Ok(Ok(None)) => Err(ServiceError { status: "Not Found".to_owned(), code: NOT_FOUND }),
                Ok(Err(error)) => Err(failure(503, "Unavailable", &error)),
                // The requester has given up.
                Err(_) => return,
            },
        };
        if let Err(error) = request.respond(reply).await {
            tracing::debug!("cannot reply to a request: {error}");
        }
    }

    /// Uses a background connection, so that HTTP requests do not delay replies.
    async fn find<Q, A, F>(&self, body: Q) -> anyhow::Result<Option<A>>
    where
        R: Fn(Connection, Q) -> F,
        F: Future<Output = anyhow::Result<Option<A>>>,
    {
        let mut db = self.database.background_connection().await?;
        // Tables that are being recovered do not have everything: "not found" would be wrong.
        sqlx::query!("select bus.require_recovered()").execute(&mut *db).await?;
        panics::caught("replying", (self.find)(db, body)).await
    }
}

fn failure(code: usize, status: &str, error: &anyhow::Error) -> ServiceError {
    tracing::warn!("cannot reply to a request: {error:#}");
    ServiceError { status: status.to_owned(), code }
}
