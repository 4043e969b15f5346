//! Growth: what a request costs in tables of different sizes.

use crate::bench::Bench;
use crate::drive::Pace;
use crate::markdown::cells::line;
use crate::options::Options;
use crate::point::{Plan, Point};
use crate::progress::print;
use crate::routes::Route;
use anyhow::Result;
use std::path::Path;
use testkit::announced;

/// POST comes last: it adds tickets.
const ROUTES: [Route; 4] = [Route::Get, Route::List, Route::Put, Route::Post];

/// Enough to keep all cores busy.
const CONNECTIONS: u16 = 32;

/// The points of one size of the tables.
#[derive(Debug)]
pub struct Size {
    /// Tickets in the table and in the replica.
    pub tickets: u64,
    /// One point for each route.
    pub points: Vec<Point>,
}

/// Measures with each of `sizes`, which rise, in a system of its own.
pub async fn measure(options: &Options, binary: &Path, sizes: &[u64]) -> Result<Vec<Size>> {
    let Some(&smallest) = sizes.first() else { return Ok(Vec::new()) };
    let mut bench = announced("starting another system", Bench::start(binary, smallest)).await?;
    let mut results = Vec::new();
    for &tickets in sizes {
        announced(&format!("filling in {tickets} tickets"), bench.grow(tickets)).await?;
        let mut points = Vec::new();
        for route in ROUTES {
            let point = bench.measure(Plan::new(options, route, CONNECTIONS, Pace::Closed)).await?;
            print(&format!("{tickets} tickets: {}", line(&point)));
            points.push(point);
        }
        results.push(Size { tickets, points });
    }
    Ok(results)
}
