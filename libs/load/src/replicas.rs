//! Replicas of tickets: whether more of them serve more requests.

use crate::bench::Bench;
use crate::drive::Pace;
use crate::markdown::cells::line;
use crate::options::Options;
use crate::point::{Plan, Point};
use crate::progress::print;
use crate::routes::Route;
use anyhow::Result;

const MOST: usize = 4;
const CONNECTIONS: u16 = 128;

/// POST tickets with 1 to 4 replicas. The connections are spread over them evenly.
pub async fn measure(options: &Options, bench: &mut Bench) -> Result<Vec<Point>> {
    let mut points = Vec::new();
    for replicas in 1..=MOST {
        bench.system.scale_tickets(replicas).await?;
        let point = bench.measure(Plan::new(options, Route::Post, CONNECTIONS, Pace::Closed)).await?;
        print(&format!("{replicas} replicas: {}", line(&point)));
        points.push(point);
    }
    Ok(points)
}
