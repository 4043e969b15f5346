//! The connection to NATS, and its streams and consumers.

use std::path::{Path, PathBuf};

use clap::Args;
use event_bus::{Authentication, NatsSettings, Topology, TopologyError};
use secrecy::{ExposeSecret as _, SecretString};

use super::SecretUrl;
use crate::topology;

/// The settings of NATS, for a service and for `provision`.
#[derive(Args, Clone, Debug)]
#[group(skip)]
pub struct NatsConfig {
    /// NATS servers, separated by commas: `nats://user:password@host:4222,nats://other:4222`; the user is the same for all
    #[arg(
        long,
        env,
        hide_env_values = true,
        default_value = "nats://127.0.0.1:4222",
        value_delimiter = ',',
        value_parser = server
    )]
    pub nats_url: Vec<SecretUrl>,

    /// Authentication without user and password.
    #[command(flatten)]
    pub authentication: AuthenticationConfig,

    /// File with the client certificate for NATS (PEM); encrypts the connections
    #[arg(long, env, requires = "nats_key")]
    pub nats_cert: Option<PathBuf>,

    /// File with the key of the client certificate (PEM)
    #[arg(long, env, requires = "nats_cert")]
    pub nats_key: Option<PathBuf>,

    /// File with the certificates of the authority of NATS (PEM); encrypts the connections
    #[arg(long, env)]
    pub nats_ca: Option<PathBuf>,

    /// JetStream domain, if it differs from that of the servers in the URL
    #[arg(long, env, value_parser = domain)]
    pub nats_domain: Option<String>,

    /// Number of servers that keep each stream: 1, or 3 in a cluster; applied when streams are created or updated
    #[arg(long, env, default_value = "1", value_parser = clap::value_parser!(u8).range(1..=5))]
    pub stream_replicas: u8,

    /// Directory with files that replace the built-in streams and consumers: `TICKETS.stream.json`,
    /// `TICKETS.orders.consumer.json`
    #[arg(long, env, value_name = "DIR", value_parser = directory)]
    pub topology: Option<Topology>,
}

/// At most one way to authenticate without user and password.
#[derive(Args, Clone, Debug)]
#[group(multiple = false)]
pub struct AuthenticationConfig {
    /// Token for NATS, instead of a user in the URL
    #[arg(long = "nats-token", env = "NATS_TOKEN", hide_env_values = true)]
    pub token: Option<SecretString>,

    /// File with the nkey seed for NATS, instead of a user in the URL
    #[arg(long = "nats-nkey-seed", env = "NATS_NKEY_SEED", value_name = "FILE")]
    pub nkey_seed: Option<PathBuf>,

    /// Credentials file (.creds: JWT and nkey seed) for NATS, instead of a user in the URL
    #[arg(long = "nats-credentials", env = "NATS_CREDENTIALS", value_name = "FILE")]
    pub credentials: Option<PathBuf>,
}

impl NatsConfig {
    pub(crate) fn settings(&self) -> NatsSettings {
        NatsSettings {
            url: self.nats_url.iter().map(SecretUrl::expose).collect::<Vec<_>>().join(","),
            authentication: self.authentication.setting(),
            certificate: self.nats_cert.clone().zip(self.nats_key.clone()),
            authority: self.nats_ca.clone(),
            domain: self.nats_domain.clone(),
            stream_replicas: self.stream_replicas,
        }
    }

    pub(crate) fn topology(&self) -> Topology {
        self.topology.clone().unwrap_or_else(topology::built_in)
    }
}

impl AuthenticationConfig {
    fn setting(&self) -> Option<Authentication> {
        let Self { token, nkey_seed, credentials } = self.clone();
        let token = token.map(|token| Authentication::Token(token.expose_secret().to_owned()));
        token.or(nkey_seed.map(Authentication::NkeySeed)).or(credentials.map(Authentication::Credentials))
    }
}

fn server(address: &str) -> Result<SecretUrl, String> {
    let address = address.trim();
    if address.is_empty() {
        return Err("a server is missing between two commas".to_owned());
    }
    let http = address.strip_prefix("http://");
    Ok(http.map_or_else(|| address.to_owned(), |host| format!("nats://{host}")).into())
}

/// Parses a domain, which becomes one token of a subject.
fn domain(name: &str) -> Result<String, String> {
    if name.is_empty() || name.contains(|c: char| c.is_whitespace() || ".*>".contains(c)) {
        return Err("expected a name without dots, spaces, * and >".to_owned());
    }
    Ok(name.to_owned())
}

/// Parsed here, so that a mistake in a file is reported like any other in the configuration.
fn directory(path: &str) -> Result<Topology, TopologyError> {
    Topology::read(Path::new(path))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;
    use clap::Parser;

    #[derive(Parser, Debug)]
    struct Cli {
        #[command(flatten)]
        nats: NatsConfig,
    }

    fn parse(arguments: &[&str]) -> Result<NatsConfig, clap::Error> {
        Cli::try_parse_from([&["tickets"], arguments].concat()).map(|cli| cli.nats)
    }

    #[test]
    fn several_nats_servers_are_read_and_http_is_tolerated() {
        let config = parse(&["--nats-url=http://one:4222, nats://two:4222,three"]).unwrap();
        assert_eq!(config.settings().url, "nats://one:4222,nats://two:4222,three");
        assert!(parse(&["--nats-url=one,,two"]).is_err());
    }

    #[test]
    fn at_most_one_way_to_authenticate_is_accepted() {
        let ways = ["--nats-token=hidden", "--nats-nkey-seed=/seed", "--nats-credentials=/creds"];
        let expected = ["Token", "NkeySeed", "Credentials"];
        for (way, expected) in ways.iter().zip(expected) {
            let config = parse(&[way]).unwrap();
            let debug = format!("{config:?} {:?}", config.settings());
            assert!(debug.contains(expected) && !debug.contains("hidden"), "{debug}");
            for other in ways.iter().filter(|other| *other != way) {
                assert!(parse(&[way, other]).is_err(), "{way} {other}");
            }
        }
    }

    #[test]
    fn a_certificate_needs_its_key() {
        assert!(parse(&["--nats-cert=/cert"]).is_err());
        assert!(parse(&["--nats-key=/key"]).is_err());
        let settings = parse(&["--nats-cert=/cert", "--nats-key=/key"]).unwrap().settings();
        assert_eq!(settings.certificate, Some(("/cert".into(), "/key".into())));
    }

    #[test]
    fn a_domain_is_one_token() {
        assert_eq!(parse(&["--nats-domain=hub"]).unwrap().settings().domain.as_deref(), Some("hub"));
        for wrong in ["", "a.b", "a b", "*", ">"] {
            assert!(parse(&["--nats-domain", wrong]).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_wrong_topology_is_a_mistake_in_the_configuration() {
        let error = parse(&["--topology=/none"]).unwrap_err().to_string();
        assert!(error.contains("--topology") && error.contains("cannot read /none"), "{error}");
        assert_eq!(parse(&[]).unwrap().topology(), topology::built_in());
    }
}
