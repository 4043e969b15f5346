//! Many users order the same ticket.

use crate::records::count;
use crate::system::{System, id};
use anyhow::{Result, ensure};
use futures::future::try_join_all;
use serde_json::json;
use testkit::eventually;

#[tokio::test]
async fn of_two_hundred_users_at_three_replicas_one_gets_the_ticket() -> Result<()> {
    let system = System::start(1, 3).await?;
    let ticket = system.tickets(1).await?.remove(0);
    let orders = (0..200).map(|number| {
        let (buyer, ticket) = (system.buyer(number, &format!("user {number}")), &ticket);
        async move { buyer.post("/api/orders", json!({"ticketId": ticket})).await }
    });
    let (sold, refused): (Vec<_>, Vec<_>) =
        try_join_all(orders).await?.into_iter().partition(|answer| answer.status == 201);
    ensure!(sold.len() == 1, "it was sold {} times", sold.len());
    let reserved = json!({"errors": [{"message": "Ticket is already reserved"}]});
    for answer in refused {
        ensure!((answer.status, &answer.body) == (400, &reserved), "{}: {}", answer.status, answer.body);
    }
    ensure!(count(&system.orders_db, "select count(*) from orders").await? == 1);
    let order = id(&sold[0].body)?;
    eventually("the ticket to be held by it", async || {
        let seen = system.see(&ticket).await?;
        ensure!(seen["orderId"] == json!(order) && seen["version"] == 1, "{seen}");
        anyhow::Ok(())
    })
    .await?;

    // A reserved ticket is not listed, and cannot be edited.
    let list = system.seller(0).get("/api/tickets").await?.expect(200)?;
    ensure!(list == json!([]), "{list}");
    let edit = json!({"title": "Other", "price": 1});
    let answer = system.seller(0).put(&format!("/api/tickets/{ticket}"), edit).await?.expect(400)?;
    ensure!(answer == json!({"errors": [{"message": "Cannot edit a reserved ticket"}]}), "{answer}");
    system.settled().await
}
