//! Runs a NATS server until it is ended: `cargo run -p testkit --example nats`.
//!
//! A test kills it, to check that its container ends too.

#[tokio::main]
#[expect(clippy::print_stdout, reason = "the caller reads it")]
async fn main() -> anyhow::Result<()> {
    let nats = testkit::Nats::start().await?;
    println!("{} in container {}", nats.server(), nats.id());
    Ok(tokio::signal::ctrl_c().await?)
}
