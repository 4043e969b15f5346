//! Charges cards in a durable task, which avoids a dual write.

use anyhow::{Context, bail, ensure};
use axum::http::{HeaderValue, StatusCode, header};
use contracts::{Id, PaymentEvent, Price, neighbours::Payment};
use event_bus::{Task, Transaction};
use reqwest::{Client, Url, redirect::Policy};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

pub struct Charge {
    http: Client,
    url: Url,
}

#[derive(Serialize, Deserialize)]
pub struct Request {
    pub payment: Id,
    pub order: Id,
    pub price: Price,
    /// The provider's name for the card.
    pub token: String,
}

impl Charge {
    pub fn new(url: Url, key: &str) -> anyhow::Result<Self> {
        ensure!(url.scheme() == "http", "PROVIDER_URL: for https, add the feature `rustls` of reqwest");
        let key = HeaderValue::try_from(format!("Bearer {key}")).context("PROVIDER_KEY is not a header value")?;
        let http = Client::builder().default_headers([(header::AUTHORIZATION, key)].into_iter().collect());
        // A response must be that of the provider to this request: no redirects, and a connection for each request.
        Ok(Self { http: http.redirect(Policy::none()).pool_max_idle_per_host(0).build()?, url })
    }
}

impl Task for Charge {
    const KIND: &'static str = "charge";
    type Input = Request;
    /// The provider's name for the charge; none if it declined the card.
    type Output = Option<String>;

    async fn perform(&self, key: &str, due: &Request) -> anyhow::Result<Option<String>> {
        let body = json!({"amount": due.price, "source": due.token, "description": due.order});
        let post = self.http.post(self.url.clone()).header("Idempotency-Key", key).json(&body);
        let mut response = post.send().await.map_err(reqwest::Error::without_url)?;
        match response.status() {
            StatusCode::PAYMENT_REQUIRED => return Ok(None),
            status => ensure!(status.is_success(), "the provider responded {status}"),
        }
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await? {
            body.extend(chunk);
            ensure!(body.len() < 10_000, "the response of the provider is too long");
        }
        match serde_json::from_slice::<Value>(&body)?["id"].as_str() {
            Some(id) if !id.is_empty() => Ok(Some(id.to_owned())),
            _ => bail!("the response of the provider has no id"),
        }
    }

    async fn complete(&self, tx: &mut Transaction, _: &str, due: &Request, id: &Option<String>) -> anyhow::Result<()> {
        let decide = sqlx::query!(
            "update payments set status = case when $2::text is null then 'declined' else 'charged' end, charge_id = $2
             where id = $1 and status = 'pending'",
            due.payment.to_string(),
            id.as_deref(),
        );
        let rows = decide.execute(&mut **tx).await?.rows_affected();
        ensure!(rows == 1, "payment {} is not pending", due.payment);
        let payment = id.clone().map(|stripe_id| Payment { id: due.payment, order_id: due.order, stripe_id });
        Ok(tx.append(payment.map(PaymentEvent::Created).iter()).await?)
    }
}
