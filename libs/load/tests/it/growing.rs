//! A request costs about the same in a table that is a hundred times larger.

use crate::statistics::{Measured, Request};
use anyhow::{Result, ensure};
use std::ops::Range;

/// The tickets that requests are about. Not the first ones: `PUT` moves a row to another page, and the list reads the first ones.
const NUMBERS: Range<u64> = 500..600;
const SMALL: u64 = 1_000;
const LARGE: u64 = 100_000;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_times_more_tickets_cost_at_most_half_more_pages() -> Result<()> {
    let requests = [Request::Get, Request::List, Request::Put, Request::Post];
    let mut measured = Measured::start(SMALL).await?;
    let mut small = Vec::new();
    for request in requests {
        small.push(measured.statements(request, NUMBERS).await?.buffers);
    }
    measured.records.fill(LARGE - SMALL).await?;
    measured.records.vacuum().await?;
    for (request, before) in requests.into_iter().zip(small) {
        let after = measured.statements(request, NUMBERS).await?.buffers;
        testkit::say(&format!("{request:?}: {before} pages, then {after}"));
        ensure!(2 * after <= 3 * before, "{NUMBERS:?} {request:?}: {before} pages, then {after}");
    }
    Ok(())
}
