use crate::tickets::{error, id, start};
use serde_json::{Value, json};

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
