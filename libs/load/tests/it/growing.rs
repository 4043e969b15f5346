//! A request costs about the same in a table that is a hundred times larger.

use crate::statistics::{Measured, Request};
use anyhow::{Result, ensure};

/// How often each request is sent.
const TIMES: u64 = 100;
/// Each request, and the number of its first ticket. `PUT` leaves old versions of rows, so it has tickets that no other request
/// reads; the list reads the first ones.
const REQUESTS: [(Request, u64); 4] =
    [(Request::Get, 200), (Request::List, 0), (Request::Put, 500), (Request::Post, 0)];
const SMALL: u64 = 1_000;
const LARGE: u64 = 100_000;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_times_more_tickets_cost_at_most_half_more_pages() -> Result<()> {
    let mut measured = Measured::start(SMALL).await?;
    let small = pages(&mut measured).await?;
    measured.records.fill(LARGE - SMALL).await?;
    measured.records.vacuum().await?;
    let large = pages(&mut measured).await?;
    for ((request, _), (small, large)) in REQUESTS.into_iter().zip(small.into_iter().zip(large)) {
        ensure!(2 * large <= 3 * small, "{TIMES} times {request:?}: {small} pages, then {large}");
    }
    Ok(())
}

/// The pages that each of the requests reads.
async fn pages(measured: &mut Measured) -> Result<Vec<i64>> {
    let mut pages = Vec::new();
    for (request, first) in REQUESTS {
        pages.push(measured.statements(request, first..first + TIMES).await?.buffers);
    }
    testkit::say(&format!("pages: {pages:?}"));
    Ok(pages)
}
