//! `verify` and `rebuild`: a replica and its owner.

use std::io::Write as _;
use std::process::ExitCode;

use clap::Args;
use event_bus::{Ids, Rebuilt, Schema, Verification};

use super::FOUND;
use crate::config::{LogConfig, NatsConfig, SecretUrl};

/// Compare the replica with its owner
///
/// Changes nothing. Both may be in use: events on their way do not count. The exit code is 0 if they are equal, 3 if they differ, and
/// 1 after an error.
#[derive(Args)]
pub(crate) struct Verify {
    /// The service's database: `postgres://user:password@host/database`
    #[arg(long, env, hide_env_values = true)]
    database_url: SecretUrl,

    /// The connection to NATS, as the user of the service.
    #[command(flatten)]
    nats: NatsConfig,

    /// Print one JSON object
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    pub(super) log: LogConfig,
}

/// Make each row of the replica equal to its owner's
///
/// Only records the request in the database: a running service does the work, while it serves. Waits until it is done. If this command
/// ends before, the service continues.
#[derive(Args)]
pub(crate) struct Rebuild {
    /// The service's database: `postgres://user:password@host/database`
    #[arg(long, env, hide_env_values = true)]
    database_url: SecretUrl,

    #[command(flatten)]
    pub(super) log: LogConfig,
}

impl Verify {
    pub(super) async fn run(self, schema: &Schema) -> anyhow::Result<ExitCode> {
        let verified = event_bus::verify(self.database_url.expose(), schema, self.nats.settings()).await?;
        let is_equal = verified.iter().all(Verification::is_equal);
        let output = if self.json {
            serde_json::json!({ "equal": is_equal, "replicas": verified }).to_string()
        } else {
            verified.iter().map(in_words).collect::<Vec<_>>().join("\n")
        };
        writeln!(std::io::stdout(), "{output}")?;
        Ok(if is_equal { ExitCode::SUCCESS } else { ExitCode::from(FOUND) })
    }
}

fn in_words(verified: &Verification) -> String {
    let Verification { stream, counted, ranges, compared, missing, stale, newer, different, unknown } = verified;
    let kinds = [
        ("are missing", missing),
        ("are older than their owner's", stale),
        ("are newer than their owner's", newer),
        ("have the same version with other content", different),
        ("are unknown to their owner", unknown),
    ];
    let found = kinds.into_iter().filter(|(_, ids)| ids.count > 0);
    let found = found.map(|(what, Ids { count, first })| {
        let more = if *count > first.len() as u64 { " …" } else { "" };
        format!("\n  {count} {what}: {}{more}", first.join(" "))
    });
    let found: String = found.collect();
    let verdict = if found.is_empty() { "equal" } else { "different" };
    format!("{stream}: {verdict}; {counted} counted in {ranges} ranges, {compared} of them row by row{found}")
}

impl Rebuild {
    pub(super) async fn run(self, schema: &Schema) -> anyhow::Result<()> {
        match event_bus::rebuild(self.database_url.expose(), schema).await? {
            Rebuilt::NotBegun => tracing::warn!(
                "the request is recorded, and no service has begun within 5 s: start one, and the owner of the replica. An earlier \
                 request may be under way"
            ),
            Rebuilt::Done { passed, written, failed: 0 } => {
                tracing::info!(passed, written, "the replica equals its owner");
            }
            Rebuilt::Done { passed, written, failed } => {
                anyhow::bail!(
                    "{failed} of {passed} aggregates could not be applied, {written} were written: see the log of the service"
                );
            }
        }
        Ok(())
    }
}
