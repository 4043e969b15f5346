use crate::tickets::{Tickets, start, start_on};
use futures::future::join_all;
use serde_json::{Value, json};
use testkit::{Postgres, error, eventually, id};

const UP_TO_DATE: &str = "select version::text from _sqlx_migrations where version = 3 and success";

fn ids(list: &Value) -> Vec<&str> {
    list.as_array().unwrap().iter().map(id).collect()
}

#[tokio::test]
async fn anybody_sees_the_unreserved_tickets_in_order_of_creation() {
    let tickets = start().await;
    assert_eq!(tickets.anonymous.get("/api/tickets").await.unwrap().expect(200).unwrap(), json!([]));
    let mut made = Vec::new();
    for _ in 0..5 {
        made.push(tickets.ticket().await);
    }
    assert_eq!(tickets.anonymous.get("/api/tickets").await.unwrap().expect(200).unwrap(), json!(made));

    tickets.reserve(&made[2], "0123456789abcdef01234567").await;
    made.remove(2);
    assert_eq!(tickets.anonymous.get("/api/tickets").await.unwrap().expect(200).unwrap(), json!(made));
}

#[tokio::test]
async fn a_list_can_be_read_in_pages() {
    let tickets = start().await;
    let mut made = Vec::new();
    for _ in 0..5 {
        made.push(tickets.ticket().await);
    }
    let made: Vec<_> = made.iter().map(|ticket| id(ticket).to_owned()).collect();
    let page = async |query: String| tickets.ann.get(&format!("/api/tickets?{query}")).await.unwrap();
    let first = page("limit=2".to_owned()).await.expect(200).unwrap();
    assert_eq!(ids(&first), made[..2]);
    let second = page(format!("limit=2&after={}", made[1])).await.expect(200).unwrap();
    assert_eq!(ids(&second), made[2..4]);
    let rest = page(format!("after={}&utm=ignored", made[3])).await.expect(200).unwrap();
    assert_eq!(ids(&rest), made[4..]);

    for malformed in ["limit=0", "limit=-1", "limit=x", "limit=99999999999", "after=x", "limit=1&limit=2"] {
        let answer = page(malformed.to_owned()).await;
        assert_eq!((answer.status, answer.body), (400, error("Something went wrong")), "{malformed}");
    }
}

#[tokio::test]
async fn concurrent_lists_of_different_parts_are_each_complete() {
    let tickets = start().await;
    let mut made = Vec::new();
    for _ in 0..8 {
        made.push(id(&tickets.ticket().await).to_owned());
    }
    let parts = (0..8).flat_map(|after| (1..=8).map(move |limit| (after, limit)));
    let reads = parts.flat_map(|part| [part; 2]).map(|(after, limit)| {
        let (tickets, made) = (&tickets, &made);
        async move {
            let path = format!("/api/tickets?limit={limit}&after={}", made[after]);
            let page = tickets.anonymous.get(&path).await.unwrap().expect(200).unwrap();
            assert_eq!(ids(&page), made[after + 1..(after + 1 + limit).min(8)], "{path}");
        }
    });
    join_all(reads).await;
}

/// Reads the list in pages of `limit`, each after the last item of the one before.
async fn walk(tickets: &Tickets, limit: usize) -> Vec<String> {
    let (mut seen, mut after) = (Vec::new(), String::new());
    loop {
        let path = format!("/api/tickets?limit={limit}{after}");
        let page = tickets.anonymous.get(&path).await.unwrap().expect(200).unwrap();
        let Some(last) = ids(&page).last().copied() else { return seen };
        after = format!("&after={last}");
        seen.extend(ids(&page).into_iter().map(str::to_owned));
        assert!(seen.len() < 1_000, "the pages do not end");
    }
}

/// Ids fall after a clock was set back, or between two replicas whose clocks differ.
#[tokio::test]
async fn tickets_are_listed_in_order_of_creation_not_of_ids() {
    let tickets = start().await;
    let mut made = Vec::new();
    for number in 0..4 {
        made.push(id(&tickets.ticket().await).to_owned());
        made.extend(tickets.insert_as(&format!("00000000000000000000000{}", 9 - number)).await);
        made.extend(tickets.insert_as(&format!("fffffffffffffffffffffff{}", 9 - number)).await);
    }
    let all = tickets.anonymous.get("/api/tickets").await.unwrap().expect(200).unwrap();
    assert_eq!(ids(&all), made);
    for limit in [1, 2, 5, 12, 13] {
        assert_eq!(walk(&tickets, limit).await, made, "pages of {limit}");
    }
    // An order holds the last ticket of a page: the next page still begins behind it.
    tickets.sql(&format!("update tickets set order_id = id where id = '{}'", made[1])).await;
    let rest = tickets.anonymous.get(&format!("/api/tickets?after={}", made[1])).await.unwrap().expect(200).unwrap();
    assert_eq!(ids(&rest), made[2..]);
}

#[tokio::test]
async fn a_page_after_an_unknown_id_begins_after_the_greatest_id_below_it() {
    let tickets = start().await;
    let made = tickets.insert_as("00000000000000000000000a").await;
    let made = [made, tickets.insert_as("00000000000000000000000c").await].concat();
    for (after, expected) in [
        ("000000000000000000000000", &made[..]),
        ("00000000000000000000000a", &made[1..]),
        ("00000000000000000000000B", &made[1..]),
        ("ffffffffffffffffffffffff", &[]),
    ] {
        let page = tickets.anonymous.get(&format!("/api/tickets?after={after}")).await.unwrap().expect(200).unwrap();
        assert_eq!(ids(&page), expected, "{after}");
    }
}

/// A database of the previous release, whose replicas continue to insert after the migration.
#[tokio::test]
async fn existing_tickets_are_numbered_in_order_of_their_ids() {
    let postgres = Postgres::shared().await.unwrap();
    let database_url = postgres.database("tickets").await.unwrap();
    let before = start_on(postgres.clone(), database_url.clone()).await;
    before.sql("alter table tickets drop column number").await;
    before.sql("create index tickets_unreserved on tickets (id) where order_id is null").await;
    before.sql("delete from _sqlx_migrations where version = 3").await;
    let mut made = before.insert(100, 10).await;
    made.sort_unstable();

    let after = start_on(postgres, database_url).await;
    eventually("the migration", async || !after.texts(UP_TO_DATE).await.is_empty()).await.unwrap();
    made.extend(after.insert_as("000000000000000000000000").await);
    made.push(id(&after.ticket().await).to_owned());
    let all = after.anonymous.get("/api/tickets").await.unwrap().expect(200).unwrap();
    assert_eq!(ids(&all), made);
    let indexes = after.texts("select indexname::text from pg_indexes where tablename = 'tickets' order by 1").await;
    assert_eq!(indexes, ["tickets_pkey", "tickets_unreserved"]);
}
