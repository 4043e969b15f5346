//! Charging: a durable task, so that the charge is no dual write.

use anyhow::{bail, ensure};
use axum::http::StatusCode;
use contracts::neighbours::Payment;
use contracts::{Id, PaymentEvent, Price};
use event_bus::{Task, Transaction};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Charges cards at the provider.
pub struct Charge {
    http: reqwest::Client,
    url: String,
    key: String,
}

/// What to charge.
#[derive(Serialize, Deserialize)]
pub struct Request {
    pub payment: Id,
    pub order: Id,
    pub price: Price,
    /// The provider's name for the card.
    pub token: String,
}

impl Charge {
    pub fn new(url: String, key: String) -> Self {
        Self { http: reqwest::Client::new(), url, key }
    }
}

impl Task for Charge {
    const KIND: &'static str = "charge";
    type Input = Request;
    /// The provider's name for the charge; none if it declined the card.
    type Output = Option<String>;

    async fn perform(&self, key: &str, due: &Request) -> anyhow::Result<Option<String>> {
        let body = json!({"amount": due.price, "source": due.token, "description": due.order});
        let post = self.http.post(&self.url).bearer_auth(&self.key).header("Idempotency-Key", key).json(&body);
        let response = post.send().await?;
        match response.status() {
            StatusCode::PAYMENT_REQUIRED => Ok(None),
            status if status.is_success() => match &response.json::<Value>().await?["id"] {
                Value::String(id) => Ok(Some(id.clone())),
                _ => bail!("the provider's answer has no id"),
            },
            status => bail!("the provider answered {status}"),
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
