use crate::orders::{cancelled, order, path, start, start_on};
use serde_json::{Value, json};
use testkit::{Postgres, error, id};

fn ids(list: &Value) -> Vec<&str> {
    list.as_array().unwrap().iter().map(id).collect()
}

#[tokio::test]
async fn users_see_their_own_orders_in_every_status_in_order_of_creation() {
    let orders = start().await;
    assert_eq!(orders.ann.get("/api/orders").await.unwrap().expect(200).unwrap(), json!([]));
    let mut made = orders.any_orders::<3>().await.to_vec();
    let of_bob = order(&orders.bob, &orders.ticket().await).await.expect(201).unwrap();
    made.extend(orders.any_orders::<2>().await);
    assert_eq!(orders.ann.get("/api/orders").await.unwrap().expect(200).unwrap(), json!(made));

    for (number, status) in [(1, "complete"), (3, "awaiting:payment")] {
        orders.set_status(&made[number], status).await;
        made[number]["status"] = json!(status);
    }
    orders.ann.delete(&path(&made[2])).await.unwrap().expect(204).unwrap();
    made[2] = cancelled(&made[2]);
    assert_eq!(orders.ann.get("/api/orders").await.unwrap().expect(200).unwrap(), json!(made));
    assert_eq!(orders.bob.get("/api/orders").await.unwrap().expect(200).unwrap(), json!([of_bob]));
}

#[tokio::test]
async fn a_list_can_be_read_in_pages() {
    let orders = start().await;
    let first_three = orders.any_orders::<3>().await;
    let of_bob = order(&orders.bob, &orders.ticket().await).await.expect(201).unwrap();
    let last_two = orders.any_orders::<2>().await;
    let made: Vec<_> = first_three.iter().chain(&last_two).map(id).collect();
    let page = async |query: String| orders.ann.get(&format!("/api/orders?{query}")).await.unwrap();
    for (query, expected) in [
        ("limit=2".to_owned(), &made[..2]),
        (format!("limit=2&after={}", made[1]), &made[2..4]),
        (format!("after={}&utm=ignored", made[3]), &made[4..]),
        (format!("after={}", made[4]), &[]),
        ("limit=4294967295".to_owned(), &made),
        // Any id says where the page begins, whatever it is the id of.
        (format!("after={}", id(&of_bob)), &made[3..]),
        (format!("limit=1&after={}", made[0].to_uppercase()), &made[1..2]),
        ("after=000000000000000000000000".to_owned(), &made),
    ] {
        let answer = page(query.clone()).await.expect(200).unwrap();
        assert_eq!(ids(&answer), expected, "{query}");
    }
    for malformed in ["limit=0", "limit=-1", "limit=x", "limit=", "limit=99999999999", "after=x", "limit=1&limit=2"] {
        let answer = page(malformed.to_owned()).await;
        assert_eq!((answer.status, answer.body), (400, error("Something went wrong")), "{malformed}");
    }
}

/// Ids fall after a clock was set back, or between two replicas whose clocks differ.
#[tokio::test]
async fn orders_are_listed_in_order_of_creation_not_of_ids() {
    let orders = start().await;
    let mut made = Vec::new();
    for number in 0..4 {
        let order = orders.any_order().await;
        let small = format!("00000000000000000000000{}", 9 - number);
        orders
            .sql(&format!(
                "insert into orders
                     (id, user_id, status, expires_at, ticket_id, title, price, ticket_version, reservation, version)
                 select '{small}', user_id, 'created', expires_at, '{small}', title, price, 0, 1, 0
                 from orders where id = '{}'",
                id(&order)
            ))
            .await;
        made.extend([id(&order).to_owned(), small]);
    }
    let all = orders.ann.get("/api/orders").await.unwrap().expect(200).unwrap();
    assert_eq!(ids(&all), made);
    let (mut seen, mut after) = (Vec::new(), String::new());
    while seen.len() < made.len() {
        let page = orders.ann.get(&format!("/api/orders?limit=3{after}")).await.unwrap().expect(200).unwrap();
        after = format!("&after={}", ids(&page).last().unwrap());
        seen.extend(ids(&page).into_iter().map(str::to_owned));
    }
    assert_eq!(seen, made);
}

/// A database of the previous release, with payments.
#[tokio::test]
async fn existing_orders_are_numbered_in_order_of_their_ids() {
    let before = start().await;
    let made = before.any_orders::<3>().await;
    before.sql("alter table orders drop column number").await;
    before.sql("create index orders_of_user on orders (user_id, id)").await;
    before.sql("delete from _sqlx_migrations where version = 3").await;
    before.sql("insert into payments (id, order_id, stripe_id) select id, id, 'pi' from orders").await;
    before.sql("update orders set version = 1 where id = (select min(id) from orders)").await;

    let after = start_on(Postgres::shared().await.unwrap(), before.database_url.clone()).await;
    let newer = after.any_order().await;
    let all = after.ann.get("/api/orders").await.unwrap().expect(200).unwrap();
    let expected: Vec<_> = made.iter().chain([&newer]).map(id).collect();
    assert_eq!(ids(&all), expected);
}

#[tokio::test]
async fn a_request_without_a_user_is_not_authorized() {
    let orders = start().await;
    orders.any_order().await;
    for query in ["", "?limit=1", "?limit=0", "?after=x"] {
        let answer = orders.anonymous.get(&format!("/api/orders{query}")).await.unwrap();
        assert_eq!((answer.status, answer.body), (401, error("Not authorized")), "{query}");
    }
}
