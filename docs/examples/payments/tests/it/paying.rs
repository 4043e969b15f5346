use crate::provider::card;
use crate::shop::Shop;
use anyhow::{Result, ensure};
use futures::future::try_join_all;
use serde_json::json;

const UNKNOWN: &str = "5f2b18a3e41d0c0012abcd01";

#[tokio::test]
async fn a_provider_that_misbehaves_charges_each_order_once() -> Result<()> {
    let shop = Shop::open().await?;
    let cards =
        [card::GOOD, card::SLOW, card::FAILS, card::TIMES_OUT, card::HANGS, card::BREAKS_OFF, card::TWICE, card::TWICE];
    let mut orders = Vec::new();
    for card in cards {
        let order = shop.order().await?;
        shop.pay(&order, card).await?;
        orders.push(order);
    }
    shop.settled(&orders).await?;
    // Each of them was tried as often as it took.
    let attempts: Vec<usize> = orders.iter().map(|order| shop.provider.requests(order)).collect();
    ensure!(attempts[..6] == [1, 1, 3, 2, 2, 2], "{attempts:?}");
    Ok(())
}

#[tokio::test]
async fn a_declined_card_charges_nothing_and_another_one_can_be_tried() -> Result<()> {
    let shop = Shop::open().await?;
    let order = shop.order().await?;
    let declined = shop.pay(&order, card::DECLINED).await?;
    shop.wait_for_status(&declined, "declined").await?;
    ensure!(shop.provider.charges(&order) == 0 && shop.announced().await?.is_empty());
    let charged = shop.pay(&order, card::GOOD).await?;
    shop.settled(std::slice::from_ref(&order)).await?;
    ensure!(shop.status(&charged).await? == "charged" && shop.status(&declined).await? == "declined");
    // The provider would answer the same key with the same decision.
    let keys: Vec<_> = shop.provider.books().requests.into_iter().map(|(_, key)| key).collect();
    ensure!(keys == [format!("{order}-0"), format!("{order}-1")], "{keys:?}");
    Ok(())
}

#[tokio::test]
async fn of_many_payments_of_one_order_one_is_accepted() -> Result<()> {
    let shop = Shop::open().await?;
    let order = shop.order().await?;
    let tries = (0..20).map(|_| async {
        let answer = shop.client().post("/api/payments", json!({"orderId": order, "token": card::SLOW})).await?;
        anyhow::Ok(answer.status)
    });
    let mut statuses = try_join_all(tries).await?;
    statuses.sort_unstable();
    ensure!(statuses[0] == 201 && statuses[1..] == [400; 19], "{statuses:?}");
    shop.settled(std::slice::from_ref(&order)).await?;
    let again = json!({"orderId": order, "token": card::GOOD});
    let message = shop.refused(400, again).await?;
    ensure!(
        ["Order is already being paid", "Order is already paid"].iter().any(|known| message == *known),
        "{message}"
    );
    Ok(())
}

#[tokio::test]
async fn payments_that_cannot_be_are_refused() -> Result<()> {
    let shop = Shop::open().await?;
    let order = shop.order().await?;
    let body = json!({"orderId": order, "token": card::GOOD});
    for (client, status) in [(shop.payments.client(), 401), (shop.payments.client().signed_in("bob"), 401)] {
        client.post("/api/payments", body.clone()).await?.expect(status)?;
    }
    for (body, message) in [
        (json!({"orderId": order}), "Token must be provided"),
        (json!({"orderId": order, "token": ""}), "Token must be provided"),
        (json!({"orderId": order, "token": "a\0b"}), "Token must be provided"),
        (json!({"token": card::GOOD}), "OrderId must be provided"),
        (json!({"orderId": "x", "token": card::GOOD}), "OrderId must be provided"),
    ] {
        ensure!(shop.refused(400, body.clone()).await? == message, "{body}");
    }
    ensure!(shop.refused(404, json!({"orderId": UNKNOWN, "token": card::GOOD})).await? == "Not Found");
    let payment = shop.pay(&order, card::GOOD).await?;
    shop.payments.client().signed_in("bob").get(&format!("/api/payments/{payment}")).await?.expect(401)?;
    shop.client().get(&format!("/api/payments/{UNKNOWN}")).await?.expect(404)?;

    let cancelled = shop.order().await?;
    shop.cancel(&cancelled).await?;
    let body = json!({"orderId": cancelled, "token": card::GOOD});
    testkit::eventually("the cancelled order to be refused", async || {
        let message = shop.refused(400, body.clone()).await?;
        ensure!(message == "Cannot pay for a cancelled order", "{message}");
        Ok(())
    })
    .await?;
    shop.settled(&[order]).await
}

#[tokio::test]
async fn a_response_that_is_not_a_charge_leaves_the_payment_pending() -> Result<()> {
    let shop = Shop::open().await?;
    let mut payments = Vec::new();
    for card in [card::GARBLED, card::MOVED, card::MOVED_WHOLE, card::NAMELESS, card::ENDLESS] {
        let order = shop.order().await?;
        payments.push((card, shop.pay(&order, card).await?, order));
    }
    for (card, payment, order) in payments {
        shop.requested(&order, 2).await?;
        ensure!(shop.status(&payment).await? == "pending", "{card}");
    }
    ensure!(shop.announced().await?.is_empty());
    let peak = shop.payments.memory_peak()?;
    ensure!(peak < 100_000, "{peak} kB of memory");
    Ok(())
}

#[tokio::test]
async fn a_second_response_is_not_that_of_the_next_payment() -> Result<()> {
    let shop = Shop::open().await?;
    let (first, second) = (shop.order().await?, shop.order().await?);
    let late = shop.pay(&first, card::LATE).await?;
    shop.wait_for_status(&late, "charged").await?;
    let declined = shop.pay(&second, card::DECLINED).await?;
    shop.wait_for_status(&declined, "declined").await?;
    shop.settled(&[first]).await
}

#[tokio::test]
async fn a_wrong_configuration_of_the_provider_is_reported_at_the_start() -> Result<()> {
    for (url, key, expected) in [
        ("https://provider/charges", "secret", "feature `rustls`"),
        ("provider/charges", "secret", "--provider-url"),
        ("http://provider/charges", "secret\n", "PROVIDER_KEY"),
    ] {
        let options =
            [("DATABASE_URL", "postgres://none"), ("JWT_KEY", "key"), ("PROVIDER_URL", url), ("PROVIDER_KEY", key)];
        let payments = tokio::process::Command::new(env!("CARGO_BIN_EXE_payments")).envs(options).output().await?;
        let said = String::from_utf8_lossy(&payments.stdout) + String::from_utf8_lossy(&payments.stderr);
        ensure!(!payments.status.success() && said.contains(expected), "{said}");
    }
    Ok(())
}
