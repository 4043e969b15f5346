//! The errors while the database cannot be used.

use crate::harness::Harness;
use event_bus::{Error, Settings};
use std::time::Duration;
use testkit::eventually;

const LIMIT: Duration = Duration::from_millis(100);

#[tokio::test]
async fn without_tables_the_error_is_not_migrated() {
    let harness = Harness::start().await;
    let bus = harness.bus(&harness.nats.url()).await;
    let Err(error) = bus.connection().await else { panic!("there are no tables yet") };
    assert!(matches!(error, Error::NotMigrated), "{error:?}");
    assert!(error.is_outage());
}

#[tokio::test]
async fn with_all_connections_busy_the_error_is_no_connection() {
    let mut harness = Harness::start().await;
    harness.relay().await; // migrates
    let settings = harness.settings(&harness.nats.url());
    let settings = Settings { database_connections: 1, connection_timeout: LIMIT, ..settings };
    let bus = Harness::open(settings).await.unwrap();
    harness.tasks.spawn(bus.clone().relay::<crate::documents::DocumentEvent>(harness.stop.clone()));
    eventually("the database", async || bus.connection().await.map(drop)).await.unwrap();

    let held = eventually("the only connection", async || bus.connection().await).await.unwrap();
    let Err(error) = bus.connection().await else { panic!("the only connection is held") };
    assert!(matches!(error, Error::NoConnection(LIMIT)), "{error:?}");
    assert!(event_bus::is_outage(&anyhow::Error::from(error).context("reading")));
    drop(held);
    eventually("the connection to come back", async || bus.connection().await.map(drop)).await.unwrap();
}
