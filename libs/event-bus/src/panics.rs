//! Turns a panic in the code of a service into an error: it ends neither the subscription nor the process.

use anyhow::anyhow;
use futures::FutureExt;
use std::any::Any;
use std::panic::AssertUnwindSafe;

/// The outcome of `work`, or an error if it panics.
pub(crate) async fn caught<T>(what: &str, work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let outcome = AssertUnwindSafe(work).catch_unwind().await;
    outcome.unwrap_or_else(|panic| Err(anyhow!("{what} panicked: {}", panic_message(&*panic))))
}

/// The text of a panic, if it has one.
pub fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}
