//! The configuration all services share. The doc comments below are what `--help` prints.

mod nats;
mod secret;

use std::net::SocketAddr;
use std::num::{NonZeroU32, NonZeroUsize};
use std::time::Duration;

use clap::builder::BoolishValueParser;
use clap::{ArgAction, Args};
use secrecy::SecretString;
use tracing_subscriber::EnvFilter;

pub use nats::NatsConfig;
pub use secret::SecretUrl;

use crate::body;
use crate::telemetry::{self, LogFormat};

/// Flags and environment variables of every service. Flatten it into the service's own parser.
#[derive(Args, Clone, Debug)]
// The service's own parser may be called Config as well.
#[group(skip)]
pub struct Config {
    /// Database of the service: `postgres://user:password@host/database`
    #[arg(long, env, hide_env_values = true)]
    pub database_url: SecretUrl,

    /// Connections to Postgres for requests; the event bus has its own
    #[arg(long, env, default_value = "16")]
    pub database_connections: NonZeroU32,

    /// The connection to NATS.
    #[command(flatten)]
    pub nats: NatsConfig,

    /// Name of this process in the connection lists of NATS and Postgres [default: the name of the service]
    #[arg(long, env)]
    pub nats_client_id: Option<String>,

    /// Create or update streams and consumers at start
    #[arg(long, env, default_value = "true", action = ArgAction::Set, value_parser = BoolishValueParser::new())]
    pub provision: bool,

    /// How long events stay in the service's own stream after all consumers have acknowledged them: 720h
    #[arg(long, env, default_value = "720h", value_parser = duration)]
    pub stream_window: Duration,

    /// Address to listen on; port 0 takes a free one
    #[arg(long, env, default_value = "0.0.0.0:3000")]
    pub http_addr: SocketAddr,

    /// The key of the users' tokens.
    #[command(flatten)]
    pub jwt: JwtConfig,

    /// Time limit of a request, after which the response is 503: 10s, 500ms, 1m
    #[arg(long, env, default_value = "10s", value_parser = duration)]
    pub request_timeout: Duration,

    /// Concurrent requests; the response to any more is 503, without waiting
    #[arg(long, env, default_value = "1024")]
    pub max_requests: NonZeroUsize,

    /// Open connections, more than `MAX_REQUESTS`; beyond it, the one that is idle longest is closed
    #[arg(long, env, default_value = "1536")]
    pub max_connections: NonZeroUsize,

    /// Bytes of all request bodies in memory; beyond it, the response to the oldest unfinished one is 408: 4MiB
    #[arg(long, env, default_value = "4MiB", value_parser = max_body_bytes)]
    pub max_body_bytes: usize,

    /// Time to finish requests and background work after SIGTERM: 20s, 500ms, 1m
    #[arg(long, env, default_value = "20s", value_parser = duration)]
    pub stop_grace: Duration,

    /// The logs.
    #[command(flatten)]
    pub log: LogConfig,
}

impl Config {
    /// The settings of the bus of `service`. Metrics are recorded from here on.
    pub fn bus(&self, service: &'static str) -> event_bus::Settings {
        telemetry::start_counting();
        event_bus::Settings {
            client: self.nats_client_id.clone().unwrap_or_else(|| service.to_owned()),
            database_connections: self.database_connections.get(),
            topology: self.nats.topology(),
            provision: self.provision,
            window_age: self.stream_window,
            ..event_bus::Settings::new(service, self.database_url.expose(), self.nats.settings())
        }
    }
}

/// Logs.
#[derive(Args, Clone, Debug)]
#[group(skip)]
pub struct LogConfig {
    /// What to log, as in `info,sqlx=warn,event_bus=debug`
    #[arg(long = "log", env = "RUST_LOG", default_value = "info,async_nats=warn,sqlx=warn", value_parser = log_filter)]
    pub filter: String,

    /// Format of log lines
    #[arg(long = "log-format", env = "LOG_FORMAT", default_value = "text")]
    pub format: LogFormat,
}

/// The one key that tokens are verified with.
#[derive(Args, Clone, Debug)]
#[group(required = true, multiple = false)]
pub struct JwtConfig {
    /// Secret that the users' tokens are signed with (HS256)
    #[arg(long, env, hide_env_values = true)]
    pub jwt_key: Option<SecretString>,

    /// Public key that the users' tokens are verified with: PEM, Ed25519 or P-256
    #[arg(long, env, hide_env_values = true)]
    pub jwt_public_key: Option<SecretString>,
}

/// Checked here, so that a mistake is reported like any other in the configuration.
fn log_filter(text: &str) -> Result<String, String> {
    EnvFilter::try_new(text).map(|_| text.to_owned()).map_err(|error| error.to_string())
}

/// What `--help` says of all durations.
pub(crate) const DURATIONS: &str =
    "Durations have units, as in 500ms, 20s, 15m, 1h 30m or 7d. A number without a unit is in seconds.";

/// The longest duration. Far longer ones overflow when they are added to a time.
const LONGEST: Duration = Duration::from_hours(100 * 365 * 24);

/// Parses a duration with units, as in `1h 30m`, or a number of seconds. At most 100 years.
pub fn duration(text: &str) -> Result<Duration, String> {
    if text.contains('M') {
        return Err("M stands for months: use m for minutes".to_owned());
    }
    let seconds = text.parse().map(Duration::from_secs);
    let duration = seconds.or_else(|_| humantime::parse_duration(text)).map_err(|error| error.to_string())?;
    if duration > LONGEST { Err("at most 100 years".to_owned()) } else { Ok(duration) }
}

/// Parses a number of bytes, or a number with a unit: `KiB` or `MiB`. At least [`body::LIMIT`].
fn max_body_bytes(text: &str) -> Result<usize, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor = match unit {
        "" => 1,
        "KiB" => 1024,
        "MiB" => 1024 * 1024,
        _ => return Err("expected a number of bytes, KiB or MiB, as in 8MiB".to_owned()),
    };
    let number: usize = number.parse().map_err(|_| "expected a number and a unit, as in 8MiB".to_owned())?;
    let bytes = number.checked_mul(factor).ok_or("too many")?;
    if bytes < body::LIMIT {
        return Err(format!("at least {} bytes, the size of one body", body::LIMIT));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use clap::Parser;

    use super::*;

    #[derive(Parser, Debug)]
    struct Cli {
        #[command(flatten)]
        service: Config,
    }

    const REQUIRED: [&str; 2] = ["tickets", "--database-url=postgres://user:hidden@db/tickets?password=hidden"];

    fn parse(more: &[&str]) -> Result<Config, clap::Error> {
        Cli::try_parse_from(REQUIRED.iter().chain(more)).map(|cli| cli.service)
    }

    #[test]
    fn exactly_one_key_is_needed() {
        assert!(parse(&[]).is_err());
        assert!(parse(&["--jwt-key=a", "--jwt-public-key=b"]).is_err());
        assert!(parse(&["--jwt-key=a"]).is_ok());
        assert!(parse(&["--jwt-public-key=b"]).is_ok());
    }

    #[test]
    fn durations_have_units() {
        assert_eq!(duration("20s"), Ok(Duration::from_secs(20)));
        assert_eq!(duration("20"), Ok(Duration::from_secs(20)));
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("15m"), Ok(Duration::from_mins(15)));
        assert_eq!(duration("1h 30m"), Ok(Duration::from_mins(90)));
        assert_eq!(duration("30d"), Ok(Duration::from_hours(30 * 24)));
        for bad in ["", "s", "15M", "-1s", "-1", "20 apples", "101years", "99999999999999999h", "99999999999999999999"]
        {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_have_units() {
        for (text, expected) in [("8MiB", 8_388_608), ("100KiB", 102_400), ("102400", 102_400)] {
            assert_eq!(max_body_bytes(text), Ok(expected), "{text}");
        }
        for bad in ["", "MiB", "-1", "1.5MiB", "16MB", "102399", "99999999999999999999", "99999999999999999MiB"] {
            assert!(max_body_bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn debug_output_holds_no_secret() {
        let config = parse(&["--jwt-key=hidden", "--nats-url=nats://user:hidden@nats:4222,hidden@other:4222"]).unwrap();
        let token = parse(&["--jwt-public-key=hidden", "--nats-token=hidden"]).unwrap();
        let debug = format!("{config:?} {config:#?} {token:?}");
        assert!(!debug.contains("hidden"), "{debug}");
        assert!(debug.contains("nats:4222") && debug.contains("db/tickets"), "{debug}");
    }
}
