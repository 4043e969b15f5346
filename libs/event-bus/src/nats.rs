//! The connection to NATS.

use anyhow::{Context as _, bail, ensure};
use async_nats::connection::State;
use async_nats::jetstream::{Context, ContextBuilder};
use async_nats::{Client, ConnectOptions, Event, ServerAddr};
use percent_encoding::percent_decode_str;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How to connect to NATS, and how many servers keep a stream.
#[derive(Clone)]
pub struct NatsSettings {
    /// Servers, comma-separated. The first user and password are used for all servers.
    pub url: String,
    /// How a connection authenticates, if not with the user and password of `url`.
    pub authentication: Option<Authentication>,
    /// The client certificate and its key, PEM. With it, connections are encrypted.
    pub certificate: Option<(PathBuf, PathBuf)>,
    /// The CA certificates for the servers, PEM. With them, connections are encrypted.
    pub authority: Option<PathBuf>,
    /// The JetStream domain, if it differs from that of the servers.
    pub domain: Option<String>,
    /// How many servers keep each stream.
    pub stream_replicas: u8,
}

/// A way to authenticate without user and password.
#[derive(Clone)]
pub enum Authentication {
    /// The token that all clients share.
    Token(String),
    /// A file with the seed of the user's nkey.
    NkeySeed(PathBuf),
    /// A credentials file: the JWT of the user and the seed of its nkey.
    Credentials(PathBuf),
}

impl Default for NatsSettings {
    fn default() -> Self {
        Self {
            url: "nats://127.0.0.1:4222".to_owned(),
            authentication: None,
            certificate: None,
            authority: None,
            domain: None,
            stream_replicas: 1,
        }
    }
}

/// Written by hand so that no password reaches a log.
impl fmt::Debug for NatsSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let servers = self.url.split(',').map(|server| server.rsplit('@').next().unwrap_or_default());
        f.debug_struct("NatsSettings")
            .field("url", &servers.collect::<Vec<_>>().join(","))
            .field("authentication", &self.authentication)
            .field("certificate", &self.certificate)
            .field("authority", &self.authority)
            .field("domain", &self.domain)
            .field("stream_replicas", &self.stream_replicas)
            .finish()
    }
}

/// Written by hand so that no token reaches a log.
impl fmt::Debug for Authentication {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Token(_) => f.write_str("Token"),
            Self::NkeySeed(file) => f.debug_tuple("NkeySeed").field(file).finish(),
            Self::Credentials(file) => f.debug_tuple("Credentials").field(file).finish(),
        }
    }
}

/// The setting, as error messages call it.
const AUTHENTICATION: &str = "nats.authentication";

/// Connects in the background, without a limit of attempts.
///
/// The client is usable at once; its requests fail until a server is connected. `nats server report` shows the name
/// `client`.
///
/// # Errors
/// A malformed URL, or a file that is missing or malformed.
pub(crate) async fn connect(settings: &NatsSettings, service: &str, client: &str) -> anyhow::Result<Client> {
    let servers = settings
        .url
        .split(',')
        .map(|url| url.trim().replacen("http://", "nats://", 1).parse())
        .collect::<Result<Vec<ServerAddr>, _>>()
        .context("nats.url must be a list like nats://host:4222,nats://user:password@other:4222")?;
    let options = encrypted(authenticated(ConnectOptions::new(), settings, &servers)?, settings)?;
    options
        .name(client)
        // One prefix for each service, so that permissions keep a service from reading the replies to others.
        .custom_inbox_prefix(format!("_INBOX_{service}"))
        .retry_on_initial_connect()
        .max_reconnects(None)
        .reconnect_delay_callback(|attempt| {
            let ceiling = Duration::from_millis(100 << attempt.min(4)).min(Duration::from_secs(2));
            crate::retry::jitter(ceiling)
        })
        .connection_timeout(Duration::from_secs(3))
        // A dead connection is detected after two of these.
        .ping_interval(Duration::from_secs(5))
        .event_callback(|event| async move {
            match event {
                Event::Connected => tracing::info!("connected to NATS"),
                Event::Disconnected => tracing::warn!("lost the connection to NATS; reconnecting"),
                // One for each attempt to reconnect. The loss of the connection has been logged.
                Event::Draining | Event::Closed | Event::ClientError(_) => tracing::debug!("NATS: {event}"),
                trouble => tracing::warn!("NATS: {trouble}"),
            }
        })
        .connect(servers)
        .await
        .context("cannot set up the NATS client")
}

/// Reads the files now: while the client keeps connecting, it would not report that one is missing.
fn authenticated(
    options: ConnectOptions,
    settings: &NatsSettings,
    servers: &[ServerAddr],
) -> anyhow::Result<ConnectOptions> {
    let user = servers.iter().find(|server| server.has_user_pass());
    let Some(authentication) = &settings.authentication else {
        // The client library ignores a user in the URL.
        let decode = |text: Option<&str>| percent_decode_str(text.unwrap_or_default()).decode_utf8_lossy().into_owned();
        return Ok(match user {
            Some(user) => options.user_and_password(decode(user.username()), decode(user.password())),
            None => options,
        });
    };
    ensure!(user.is_none(), "nats.url has a user, and nats.authentication is set: remove one of them");
    match authentication {
        // Trimmed, because a token from a file often ends with a line break.
        Authentication::Token(token) => Ok(options.token(token.trim().to_owned())),
        Authentication::NkeySeed(file) => Ok(options.nkey(seed(&read(AUTHENTICATION, file)?, file)?)),
        Authentication::Credentials(file) => options
            .credentials(&read(AUTHENTICATION, file)?)
            .with_context(|| format!("{AUTHENTICATION}: {}", file.display())),
    }
}

fn encrypted(mut options: ConnectOptions, settings: &NatsSettings) -> anyhow::Result<ConnectOptions> {
    if let Some(authority) = &settings.authority {
        exists("nats.authority", authority)?;
        options = options.add_root_certificates(authority.clone()).require_tls(true);
    }
    if let Some((certificate, key)) = &settings.certificate {
        exists("nats.certificate", certificate)?;
        exists("nats.certificate, its key", key)?;
        options = options.add_client_certificate(certificate.clone(), key.clone()).require_tls(true);
    }
    Ok(options)
}

fn exists(setting: &str, file: &Path) -> anyhow::Result<()> {
    ensure!(file.is_file(), "{setting}: there is no file {}", file.display());
    Ok(())
}

fn read(setting: &str, file: &Path) -> anyhow::Result<String> {
    exists(setting, file)?;
    std::fs::read_to_string(file).with_context(|| format!("{setting}: cannot read {}", file.display()))
}

/// The seed of a user: 58 characters on a line of its own, as `nsc` and `nk` write it.
fn seed(text: &str, file: &Path) -> anyhow::Result<String> {
    match text.lines().map(str::trim).find(|line| line.starts_with("SU") && line.len() == 58) {
        Some(seed) => Ok(seed.to_owned()),
        None => bail!("{AUTHENTICATION}: {} holds no seed of a user (SU…)", file.display()),
    }
}

/// The JetStream context. Only this function knows the prefix of its API.
pub(crate) fn jetstream(settings: &NatsSettings, nats: Client) -> Context {
    match &settings.domain {
        Some(domain) => ContextBuilder::new().domain(domain).build(nats),
        None => async_nats::jetstream::new(nats),
    }
}

/// Fails if NATS is not connected: requests would wait for a server.
pub(crate) fn connected(nats: &Client) -> anyhow::Result<()> {
    ensure!(nats.connection_state() == State::Connected, "NATS is not connected");
    Ok(())
}
