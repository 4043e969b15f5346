//! `recover`: an older database and its stream.

use std::process::ExitCode;

use clap::Args;
use event_bus::{Schema, Unknown};

use super::FOUND;
use crate::config::{LogConfig, NatsConfig, SecretUrl};

/// Show what a database that is older than its stream would take over
///
/// Only shows it: a running service recovers by itself, when it starts. Changes nothing. The exit code is 0 if there is nothing to
/// take over, and 3 if there is.
#[derive(Args)]
pub(crate) struct Recover {
    /// Change nothing
    #[arg(long, required = true)]
    dry_run: bool,

    /// The service's database: `postgres://user:password@host/database`
    #[arg(long, env, hide_env_values = true)]
    database_url: SecretUrl,

    #[command(flatten)]
    nats: NatsConfig,

    #[command(flatten)]
    pub(super) log: LogConfig,
}

impl Recover {
    pub(super) async fn run(&self, schema: &Schema) -> anyhow::Result<ExitCode> {
        let mut code = ExitCode::SUCCESS;
        for unknown in event_bus::find_unknown(self.database_url.expose(), schema, &self.nats.settings()).await? {
            let Unknown { stream, position, end, deleted, events, aggregates, published } = unknown;
            if events == 0 && deleted == 0 {
                tracing::info!(stream, position, end, "nothing to take over: the database is as new as its stream");
                continue;
            }
            code = ExitCode::from(FOUND);
            let (first, last) = published.map(|(first, last)| (first.to_string(), last.to_string())).unzip();
            tracing::warn!(
                stream,
                position,
                end,
                events,
                aggregates,
                first,
                last,
                "the database is older than its stream"
            );
            if deleted > 0 {
                tracing::error!(
                    stream,
                    deleted,
                    "messages after the position are deleted: the database cannot be recovered. Restore a newer one"
                );
            }
        }
        Ok(code)
    }
}
