//! The recorder of all metrics of the process, and their text at `/metrics`.

use std::convert::Infallible;
use std::sync::LazyLock;
use std::time::Duration;

use metrics::{describe_gauge, gauge};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use metrics_process::Collector;
use tokio::time::sleep;

/// Bounds of durations, in seconds: those that OpenTelemetry advises for requests, and smaller ones.
const DURATIONS: [f64; 16] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0];
/// Bounds of lags, in seconds: an outage may last for hours.
const LAGS: [f64; 14] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 30.0, 300.0, 3_600.0, 86_400.0];
/// Bounds of the sizes of batches.
const SIZES: [f64; 10] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0];

/// How often recorded values are added to the histograms. Until then they take 8 bytes each.
const UPKEEP: Duration = Duration::from_secs(5);

/// The metrics of the whole process: tests start several services in one.
static METRICS: LazyLock<PrometheusHandle> = LazyLock::new(|| {
    // Suffixes are tried in alphabetical order.
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_lag_seconds".to_owned()), &LAGS)
        .and_then(|builder| builder.set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &DURATIONS))
        .and_then(|builder| builder.set_buckets(&SIZES))
        .and_then(PrometheusBuilder::install_recorder)
        .expect("the bounds are not empty, and nobody else records metrics");
    describe_gauge!("build_info", "Always 1; the labels name the service, its version and its commit");
    PROCESS.describe();
    handle
});

/// CPU, memory and file descriptors of the process.
static PROCESS: LazyLock<Collector> = LazyLock::new(Collector::default);

/// Starts counting. What is recorded before is lost, and handles that were registered before record nothing.
pub(crate) fn start_counting() {
    LazyLock::force(&METRICS);
}

/// The text of all metrics.
pub(crate) fn render() -> String {
    PROCESS.collect();
    METRICS.render()
}

/// Adds recorded values to the histograms every 5 s, for ever. Otherwise they would stay in memory until the next scrape.
pub(crate) async fn keep() -> Infallible {
    loop {
        sleep(UPKEEP).await;
        METRICS.run_upkeep();
    }
}

/// Records which service this is. The variable `BUILD_COMMIT` of the compilation names the commit.
pub(crate) fn name_build(service: &'static str) {
    let (version, commit) = (env!("CARGO_PKG_VERSION"), option_env!("BUILD_COMMIT").unwrap_or("unknown"));
    gauge!("build_info", "service" => service, "version" => version, "commit" => commit).set(1.0);
}
