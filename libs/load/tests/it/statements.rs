//! Each request costs a fixed number of statements and events.

use crate::statistics::{Measured, Request};
use anyhow::{Result, ensure};

const REQUESTS: u64 = 200;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_costs_a_fixed_number_of_statements_and_events() -> Result<()> {
    let mut measured = Measured::start(REQUESTS + 1).await?;
    // An order changes its ticket, so it causes a second event. Orders come last: a reserved ticket cannot be edited.
    for (request, statements, events) in [
        (Request::Get, 1, 0),
        (Request::List, 1, 0),
        (Request::Post, 1, 1),
        (Request::Put, 2, 1),
        (Request::Order, 2, 2),
    ] {
        let before = measured.published().await?;
        measured.statements(request, 0..REQUESTS).await?.are(REQUESTS, statements)?;
        let published = u64::try_from(measured.published().await? - before)?;
        // One request more was sent before the statements were counted.
        ensure!(
            published == (REQUESTS + 1) * events,
            "{published} events for {REQUESTS} requests and one: {request:?}"
        );
    }
    Ok(())
}
