//! The open loop does not leave out the time that requests wait (coordinated omission).

use anyhow::{Result, ensure};
use load::drive::{Load, Pace, drive};
use load::http::Target;
use load::routes::{Ids, Requests, Route};
use load::tally::Tally;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::sleep;

/// The time that the service takes for each request.
const SLOW: Duration = Duration::from_millis(20);

/// Responds 200 to every request, one at a time.
async fn serve(mut stream: TcpStream) -> Result<()> {
    let mut request = [0; 1024];
    // The only client has one request under way, which fits into one packet.
    while stream.read(&mut request).await? > 0 {
        sleep(SLOW).await;
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_wait_for_a_slow_service_are_slow() -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let target = Target::new(&listener.local_addr()?.to_string(), "any").await?;
    tokio::spawn(async move { serve(listener.accept().await?.0).await });
    let now = Instant::now();
    let load = Arc::new(Load {
        targets: vec![Arc::new(target)],
        requests: Arc::new(Requests::new(Route::Get, Ids::Numbered(10), 0..0)),
        tally: Tally::new(now, now + Duration::from_millis(500)),
        sampler: None,
    });
    // Four times as many as it can serve: 100 requests, which take 2 s.
    drive(load.clone(), 1, Pace::Open(200)).await?;
    let (responses, latency, failures) = load.tally.result();
    ensure!(failures.is_empty(), "{failures:?}");
    ensure!((90..=100).contains(&latency.count), "{} of 100 requests have a latency", latency.count);
    ensure!(responses <= 25, "{responses} responses within 500 ms");
    // Seen by a client that sends its next request after the last response, each would take 20 ms.
    ensure!(latency.p50 > Duration::from_millis(500), "the median is {:?}", latency.p50);
    ensure!(latency.max > Duration::from_millis(1_300), "the longest took {:?}", latency.max);
    Ok(())
}
