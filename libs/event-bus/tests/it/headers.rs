use crate::documents::{DocumentEvent, Id, event};
use crate::harness::Harness;
use event_bus::{Event, Handler, Headers, Outgoing, Received, Transaction, trace};
use std::sync::{Arc, Mutex};
use testkit::eventually;

const TRACEPARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

/// Notes the headers of what it is given, and refuses what has the header `refuse`.
#[derive(Clone, Default)]
struct Reader(Arc<Mutex<Vec<(String, Headers)>>>);

impl Handler for Reader {
    type Event = DocumentEvent;

    async fn apply(&self, _: &mut Transaction, events: &[Received<DocumentEvent>]) -> anyhow::Result<()> {
        anyhow::ensure!(events.iter().all(|event| event.headers.get("refuse").is_none()), "refused");
        self.0.lock().unwrap().extend(events.iter().map(|event| (event.event_id(), event.headers.clone())));
        Ok(())
    }
}

#[tokio::test]
async fn headers_of_the_application_reach_the_handler_and_the_dead_letter() {
    let mut harness = Harness::start().await;
    let (bus, reader) = (harness.relay().await, Reader::default());
    harness.tasks.spawn(bus.clone().subscribe("reader", reader.clone(), harness.stop.clone()));
    let [first, second, third, refused] = [(); 4].map(|()| event(Id::generate(), 0));

    let append = async {
        let mut tx = bus.begin().await.unwrap();
        let with_headers = Outgoing::new(&first).with_header("tenant", "Zürich").unwrap();
        tx.append([with_headers.with_header("Content-Type", "application/json").unwrap(), (&second).into()])
            .await
            .unwrap();
        tx.append([Outgoing::new(&refused).with_header("refuse", "yes").unwrap()]).await.unwrap();
        tx.commit().await.unwrap();
    };
    trace::scope(Some(TRACEPARENT.to_owned()), append).await;
    // From a statement that writes a row as well.
    let mut db = bus.statement().await.unwrap();
    sqlx::query(r#"select bus.append('DOCUMENTS', $1, $2, 0, $3, null, '{"correlation-id": "7"}')"#)
        .bind("document.created")
        .bind(third.aggregate_id())
        .bind(event_bus::Publish::encode(&third))
        .execute(&mut *db)
        .await
        .unwrap();
    drop(db);

    eventually("three events to be applied", async || reader.0.lock().unwrap().len() == 3).await.unwrap();
    for (event, expected) in [
        (&first, vec![("Content-Type", "application/json"), ("tenant", "Zürich")]),
        (&second, vec![]),
        (&third, vec![("correlation-id", "7")]),
    ] {
        let applied = reader.0.lock().unwrap();
        let (_, headers) = applied.iter().find(|(id, _)| *id == event.event_id()).unwrap();
        assert_eq!(headers.iter().collect::<Vec<_>>(), expected, "{event:?}");
    }
    let refused_in = "select headers ->> 'refuse' from bus.dead_letters where event_id = $1";
    eventually("the failed attempt to be recorded", async || {
        let mut db = harness.db().await;
        let letter = sqlx::query_scalar::<_, String>(refused_in).bind(refused.event_id()).fetch_optional(&mut db).await;
        letter.is_ok_and(|headers| headers.is_some_and(|value| value.contains("yes")))
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn an_aggregate_id_that_could_not_travel_is_refused_when_it_is_appended() {
    let mut harness = Harness::start().await;
    let bus = harness.relay().await;
    let append = async |id: &str| {
        let sql = "select bus.append('DOCUMENTS', 'document.created', $1, 0, '{}', null)";
        sqlx::query(sql).bind(id).execute(&mut *bus.statement().await.unwrap()).await
    };
    for id in ["", "two words", "line\nbreak", "naïve", &"x".repeat(201)] {
        let error = append(id).await.unwrap_err();
        assert!(error.as_database_error().unwrap().is_check_violation(), "{id:?}: {error}");
    }
    append("0190a5f2-4f5c-7c3e-9b1a-2f3e4d5c6b7a").await.unwrap();
    append(&"x".repeat(200)).await.unwrap();
    harness.published().await;
}
