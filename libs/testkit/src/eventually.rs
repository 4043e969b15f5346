use anyhow::{Context, Result, anyhow, bail};
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout_at};

/// The deadline of [`eventually`]: much longer than a healthy system needs on a busy two-core machine.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The result of one attempt of [`eventually`].
pub trait Attempt {
    /// The value that is waited for.
    type Value;
    /// The value, or the reason why it is not there yet.
    fn outcome(self) -> Result<Self::Value>;
}

impl<T, E: Into<anyhow::Error>> Attempt for Result<T, E> {
    type Value = T;

    fn outcome(self) -> Result<T> {
        self.map_err(Into::into)
    }
}

impl<T> Attempt for Option<T> {
    type Value = T;

    fn outcome(self) -> Result<T> {
        self.context("not there yet")
    }
}

impl Attempt for bool {
    type Value = ();

    fn outcome(self) -> Result<()> {
        self.then_some(()).context("not true yet")
    }
}

/// Repeats `attempt` until it returns `Ok`, `Some` or `true`, for [`PATIENCE`].
///
/// `what` completes the error "gave up waiting for …", which also has the reason of the last attempt.
pub async fn eventually<A: Attempt>(what: &str, attempt: impl AsyncFnMut() -> A) -> Result<A::Value> {
    eventually_within(PATIENCE, what, attempt).await
}

/// [`eventually`] with its own deadline, which also ends an attempt that hangs.
pub async fn eventually_within<A: Attempt>(
    patience: Duration,
    what: &str,
    mut attempt: impl AsyncFnMut() -> A,
) -> Result<A::Value> {
    let deadline = Instant::now() + patience;
    let mut pause = Duration::from_millis(5);
    let mut last = anyhow!("the first attempt never ended");
    loop {
        match timeout_at(deadline, attempt()).await.map(Attempt::outcome) {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(reason)) => last = reason,
            Err(_) => bail!("gave up waiting for {what} after {patience:?}, in an attempt that hung; before: {last:#}"),
        }
        if Instant::now() + pause >= deadline {
            return Err(last.context(format!("gave up waiting for {what} after {patience:?}")));
        }
        sleep(pause).await;
        // Short pauses first, longer ones later: waiting must not add to the load.
        pause = (pause * 3 / 2).min(Duration::from_millis(200));
    }
}
