//! The command line of a service: without a subcommand it serves, with one it runs a task.

use std::ffi::{OsStr, OsString};

use clap::builder::Resettable;
use clap::{Arg, FromArgMatches as _, Parser, Subcommand as _};
use event_bus::Schema;

use crate::config::DURATIONS;
use crate::task::{OF_REPLICAS, Task};

/// The command that a process runs.
pub(super) enum Command<C> {
    Serve(C),
    Do(Task),
}

impl<C: Parser> Command<C> {
    /// Reads the command line and the environment; ends the process with help if that fails.
    ///
    /// An empty variable counts as absent, because compose files and charts pass unset variables as empty.
    pub(super) fn parse(args: impl IntoIterator<Item = OsString>, schema: &Schema) -> Self {
        // A task requires nothing of the configuration of the service.
        let command = Task::augment_subcommands(C::command().after_help(DURATIONS))
            .subcommand_required(false)
            .subcommand_negates_reqs(true);
        let hide = |command: clap::Command, name| command.mut_subcommand(name, |command| command.hide(true));
        let hidden = if schema.has_replica() { &[][..] } else { &OF_REPLICAS };
        let command = hidden.iter().fold(command, hide);
        let command = ignore_variables(command, &|name| std::env::var_os(name).is_some_and(|value| value.is_empty()));
        let matches = command.get_matches_from(args);
        let parsed = match matches.subcommand_name() {
            Some(_) => Task::from_arg_matches(&matches).map(Self::Do),
            None => C::from_arg_matches(&matches).map(Self::Serve),
        };
        parsed.unwrap_or_else(|error| error.exit())
    }
}

fn ignore_variables(command: clap::Command, ignored: &impl Fn(&OsStr) -> bool) -> clap::Command {
    let ignore = |arg: Arg| match arg.get_env() {
        Some(name) if ignored(name) => arg.env(Resettable::Reset),
        _ => arg,
    };
    command.mut_args(ignore).mut_subcommands(|command| ignore_variables(command, ignored))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;
    use crate::config::Config;

    #[derive(Parser, Debug)]
    struct Cli {
        #[command(flatten)]
        service: Config,
    }

    #[test]
    fn an_ignored_variable_is_as_good_as_unset() {
        // Cargo sets this one for every test it runs.
        let command = Cli::command().mut_arg("jwt_key", |arg| arg.env("CARGO_PKG_NAME"));
        let arguments = ["test", "--database-url=postgres://db/test", "--jwt-public-key=b"];
        assert!(command.clone().try_get_matches_from(arguments).is_err());
        let command = ignore_variables(command, &|name| name == "CARGO_PKG_NAME");
        assert!(command.try_get_matches_from(arguments).is_ok());
    }
}
