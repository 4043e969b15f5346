use crate::token::token;
use anyhow::{Context, Result, ensure};
use reqwest::header::HeaderMap;
use reqwest::{Method, RequestBuilder, Response};
use serde_json::Value;
use std::time::Duration;

/// An HTTP client of one user, with JSON bodies. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Client {
    base: String,
    token: Option<String>,
    http: reqwest::Client,
}

/// A response of any status.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// The headers.
    pub headers: HeaderMap,
    /// The JSON; other text as a string; null without a body.
    pub body: Value,
}

impl Client {
    /// A client that is not signed in, for the service at `base`, such as `http://127.0.0.1:3001`.
    pub fn new(base: &str) -> Self {
        // The service is on this machine: a proxy of the environment must not be used.
        let http = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(30)).build();
        Self { base: base.to_owned(), token: None, http: http.expect("only TLS could fail, and there is none") }
    }

    /// The same client, signed in as this user.
    #[must_use]
    pub fn signed_in(&self, user_id: &str) -> Self {
        Self { token: Some(token(user_id)), ..self.clone() }
    }

    /// GET.
    pub async fn get(&self, path: &str) -> Result<Answer> {
        Answer::to(self.request(Method::GET, path)).await
    }

    /// DELETE.
    pub async fn delete(&self, path: &str) -> Result<Answer> {
        Answer::to(self.request(Method::DELETE, path)).await
    }

    /// POST with a JSON body.
    pub async fn post(&self, path: &str, body: Value) -> Result<Answer> {
        Answer::to(self.request(Method::POST, path).json(&body)).await
    }

    /// PUT with a JSON body.
    pub async fn put(&self, path: &str, body: Value) -> Result<Answer> {
        Answer::to(self.request(Method::PUT, path).json(&body)).await
    }

    /// Any request, for headers and bodies that a well-behaved client would not send. Give it to [`Answer::to`].
    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.http.request(method, format!("{}{path}", self.base));
        match &self.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        }
    }
}

impl Answer {
    /// Sends the request and reads the whole response. Only a missing response is an error.
    pub async fn to(request: RequestBuilder) -> Result<Self> {
        let response: Response = request.send().await?;
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let text = response.text().await.context("the answer broke off")?;
        let body = match text.as_str() {
            "" => Value::Null,
            json => serde_json::from_str(json).unwrap_or_else(|_| Value::String(text.clone())),
        };
        Ok(Self { status, headers, body })
    }

    /// The body, if the status is the expected one; an error that shows both otherwise.
    pub fn expect(self, status: u16) -> Result<Value> {
        ensure!(self.status == status, "expected {status}, got {}: {}", self.status, self.body);
        Ok(self.body)
    }
}
