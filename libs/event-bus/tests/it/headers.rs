use crate::documents::{DocumentEvent, Id, event};
use crate::harness::Harness;
use event_bus::{Error, Event, Handler, Headers, Outgoing, Publish, Received, Transaction, trace};
use std::sync::{Arc, Mutex};
use testkit::eventually;

const TRACEPARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

/// Records the headers of events, and fails for events with the header `refuse`.
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
async fn headers_of_the_application_reach_handlers_and_failed_attempts() {
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
    // The same in a single statement.
    let mut db = bus.statement().await.unwrap();
    sqlx::query(r#"select bus.append('DOCUMENTS', $1, $2, 0, $3, null, '{"correlation-id": "7"}')"#)
        .bind("document.created")
        .bind(third.aggregate_id())
        .bind(third.encode())
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
async fn an_invalid_aggregate_id_is_refused_when_it_is_appended() {
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

#[tokio::test]
async fn an_event_that_nats_would_refuse_is_refused_when_it_is_appended() {
    let mut harness = Harness::start().await;
    let bus = harness.relay().await;
    let append = async |subject: &str, version: i64, traceparent: Option<&str>, headers: &str| {
        let sql = "select bus.append('DOCUMENTS', $1, 'one', $2, '{}', $3, $4::json)";
        let statement = sqlx::query(sql).bind(subject).bind(version).bind(traceparent).bind(headers);
        statement.execute(&mut *bus.statement().await.unwrap()).await
    };
    let subject = "document.created";
    for (subject, version, traceparent, headers) in [
        ("two words", 0, None, "{}"),
        ("document.*", 0, None, "{}"),
        ("", 0, None, "{}"),
        (subject, -1, None, "{}"),
        (subject, 0, Some("line\r\nNats-Msg-Id: 1"), "{}"),
        (subject, 0, None, "[]"),
        (subject, 0, None, r#"{"number": 7}"#),
        (subject, 0, None, r#"{"two words": "x"}"#),
        (subject, 0, None, r#"{"": "x"}"#),
        (subject, 0, None, r#"{"Nats-Msg-Id": "x"}"#),
        (subject, 0, None, r#"{"nats-expected-last-sequence": "1"}"#),
        (subject, 0, None, r#"{"Traceparent": "x"}"#),
        (subject, 0, None, r#"{"line": "a\r\nb"}"#),
        (subject, 0, None, r#"{"control": "\u0085"}"#),
    ] {
        let error = append(subject, version, traceparent, headers).await.unwrap_err();
        assert!(error.as_database_error().unwrap().is_check_violation(), "{subject} {version} {headers}: {error}");
    }
    append(subject, 0, Some(TRACEPARENT), r#"{"Content-Type": "application/json", "tenant": "Zürich", "empty": ""}"#)
        .await
        .unwrap();
    harness.published().await;
}

#[tokio::test]
async fn an_event_that_is_too_large_for_a_message_is_refused_when_it_is_appended() {
    let mut harness = Harness::start().await;
    let bus = harness.relay().await;
    let append = async |body: usize, headers: usize| {
        let mut event = event(Id::generate(), 0);
        let empty = event.encode().len() - event.document().title.len();
        event.document().title = "x".repeat(body - empty);
        let mut outgoing = Outgoing::new(&event);
        for number in 0..headers {
            outgoing = outgoing.with_header(&format!("header-{number:02}"), &"x".repeat(980)).unwrap();
        }
        let mut tx = bus.begin().await.unwrap();
        let appended = tx.append([outgoing]).await;
        if appended.is_ok() {
            tx.commit().await.unwrap();
        }
        appended
    };
    append(1_000_000, 15).await.unwrap();
    for (body, headers) in [(1_000_001, 0), (100, 17)] {
        let error = append(body, headers).await.unwrap_err();
        let Error::Postgres(error) = error else { panic!("{error}") };
        assert!(error.as_database_error().unwrap().is_check_violation(), "{error}");
    }
    harness.published().await;
    assert_eq!(harness.stream().await.len(), 1);
}
