use crate::client::Client as HttpClient;
use crate::container::{Container, Probe};
use crate::images::Image;
use crate::port::free_port;
use anyhow::{Context, Result, ensure};
use async_nats::{Client, ConnectOptions, ServerAddr, jetstream};
use futures::FutureExt;
use futures::future::{BoxFuture, try_join_all};
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use testcontainers::core::Mount;
use testcontainers::{ContainerRequest, GenericImage, ImageExt};
use tokio::process::Command;

macro_rules! configuration {
    ($($name:literal),*) => {
        [$(($name, include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../infra/nats/", $name)))),*]
    };
}

/// The files of `infra/nats`. The server gets one of them, which includes others.
const CONFIGURATION: [(&str, &str); 8] = configuration!(
    "nats.conf",
    "users.conf",
    "cluster.conf",
    "routes.conf",
    "tls.conf",
    "cluster-tls.conf",
    "certificates.conf",
    "frozen.sh"
);

const PORT: u16 = 4222;
const MONITORING_PORT: u16 = 8222;

/// NATS with JetStream, configured by `infra/nats`.
///
/// A message is on disk before it is acknowledged, and each user has the rights of `users.conf`. The password of a user is
/// its name: only this machine can reach the server.
#[derive(Debug)]
pub struct Nats {
    container: Container,
    access: Access,
    name: String,
}

/// Differences of a server from `nats.conf`.
#[derive(Clone, Debug, Default)]
pub struct NatsSetup {
    /// The file of `infra/nats` to use instead of `nats.conf`.
    pub configuration: Option<&'static str>,
    /// The whole configuration, instead of a file. Its users are unknown here: only its health is checked.
    pub own_configuration: Option<String>,
    /// The key of the store, if it is encrypted.
    pub store_key: String,
    /// Certificate, key and authority, as `certificates.conf` expects them; and the path of the authority for clients.
    pub certificates: Option<(Vec<u8>, Vec<u8>, PathBuf)>,
    /// Name of the container, of the server, and, without a cluster, of a volume that keeps the data.
    pub name: Option<String>,
    /// The ports for clients and for monitoring.
    pub ports: Option<(u16, u16)>,
    /// A Docker network, and all servers on it.
    pub cluster: Option<(String, Vec<String>)>,
}

/// How clients authenticate.
#[derive(Clone, Debug)]
pub(crate) struct Access {
    port: u16,
    monitoring_port: u16,
    authority: Option<PathBuf>,
    /// Whether there is the user `admin`.
    admin: bool,
}

impl Nats {
    /// Starts a server. Streams have fixed names, so every test needs its own.
    pub async fn start() -> Result<Self> {
        Self::start_with(NatsSetup::default()).await
    }

    /// Starts a server with a fixed container name. Its data stays in the volume of the same name.
    pub async fn start_named(name: &str, port: u16, monitoring_port: u16) -> Result<Self> {
        let ports = Some((port, monitoring_port));
        Self::start_with(NatsSetup { name: Some(name.to_owned()), ports, ..NatsSetup::default() }).await
    }

    /// Starts a cluster of three servers, each in its own container.
    pub async fn start_cluster() -> Result<Vec<Self>> {
        static CLUSTERS: AtomicU32 = AtomicU32::new(0);
        let number = CLUSTERS.fetch_add(1, Ordering::Relaxed);
        let network = format!("testkit-{}-{number}", std::process::id());
        let names: Vec<_> = (0..3).map(|node| format!("{network}-nats-{node}")).collect();
        // Concurrently, because one server alone does not become healthy.
        try_join_all(names.iter().map(|name| {
            Box::pin(Self::start_with(NatsSetup {
                configuration: Some("cluster.conf"),
                name: Some(name.clone()),
                cluster: Some((network.clone(), names.clone())),
                ..NatsSetup::default()
            }))
        }))
        .await
    }

    /// Starts a server with another setup.
    pub async fn start_with(setup: NatsSetup) -> Result<Self> {
        let (port, monitoring_port) = setup.ports.unwrap_or_else(|| (free_port(), free_port()));
        let authority = setup.certificates.as_ref().map(|(_, _, authority)| authority.clone());
        let admin = setup.own_configuration.is_none();
        let access = Access { port, monitoring_port, authority, admin };
        let name = setup.name.clone().unwrap_or_else(|| "ticketing".to_owned());
        let ports = [(port, PORT), (monitoring_port, MONITORING_PORT)];
        let container =
            Container::start(Image::Nats, &ports, access.clone(), |request| setup.configure(request, &name)).await?;
        Ok(Self { container, access, name })
    }

    /// The URL of a user with all rights, for [`connect`](crate::connect) and the `nats` command.
    pub fn url(&self) -> String {
        self.url_of("admin")
    }

    /// The URL of a user of `users.conf`.
    pub fn url_of(&self, user: &str) -> String {
        nats_url(user, &self.server())
    }

    /// The address of the server: `127.0.0.1:4222`.
    pub fn server(&self) -> String {
        self.access.server()
    }

    /// Its name in the cluster.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Connects as a user with all rights.
    pub async fn connect(&self) -> Result<Client> {
        self.access.connect().await
    }

    /// Runs a shell command in the directory of the store, while the server is stopped.
    ///
    /// The directory `jetstream` holds all streams and consumers.
    pub async fn in_store(&self, command: &str) -> Result<()> {
        let (name, tag) = Image::Nats.name();
        let (id, image) = (self.container.id(), format!("{name}:{tag}"));
        let arguments = ["run", "--rm", "--volumes-from", id, "--workdir", "/data", "--entrypoint", "sh", &image, "-c"];
        let output = Command::new("docker").args(arguments).arg(command).output().await?;
        ensure!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    /// The URL of the monitoring of the server (`/jsz`, `/connz`, `/healthz`).
    pub fn monitoring_url(&self) -> String {
        self.access.monitoring_url()
    }
}

impl NatsSetup {
    fn configure(self, request: ContainerRequest<GenericImage>, name: &str) -> ContainerRequest<GenericImage> {
        let own = self.own_configuration.as_ref().map(|_| "own.conf");
        let configuration = format!("/etc/nats/{}", own.or(self.configuration).unwrap_or("nats.conf"));
        let mut request = request
            .with_cmd(["--config", &configuration, "--name", name])
            .with_env_var("NATS_STORE_KEY", quoted(&self.store_key));
        for (file, text) in CONFIGURATION {
            request = request.with_copy_to(format!("/etc/nats/{file}"), text.as_bytes().to_vec());
        }
        if let Some(text) = self.own_configuration {
            request = request.with_copy_to("/etc/nats/own.conf", text.into_bytes());
        }
        for (variable, user) in passwords() {
            request = request.with_env_var(variable, quoted(&user));
        }
        if let Some((certificate, key, authority)) = self.certificates {
            request = request
                .with_copy_to("/etc/nats/tls/tls.crt", certificate)
                .with_copy_to("/etc/nats/tls/tls.key", key)
                .with_copy_to("/etc/nats/tls/ca.crt", authority);
        }
        // A volume, as in every deployment: the file system of a container is several times slower. Without a name, it is removed
        // together with the container.
        let volume = if self.cluster.is_none() { self.name.clone() } else { None };
        request = request.with_mount(Mount::volume_mount(volume.unwrap_or_default(), "/data"));
        if let Some((network, servers)) = self.cluster {
            let routes: Vec<_> =
                servers.iter().map(|name| format!("\"nats-route://route:route@{name}:6222\"")).collect();
            request = request
                .with_container_name(name)
                .with_network(network)
                .with_env_var("NATS_ROUTES", format!("[{}]", routes.join(",")));
        } else if let Some(name) = self.name {
            request = request.with_container_name(name);
        }
        request
    }
}

impl Deref for Nats {
    type Target = Container;

    fn deref(&self) -> &Container {
        &self.container
    }
}

impl Access {
    fn server(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    fn monitoring_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.monitoring_port)
    }

    async fn connect(&self) -> Result<Client> {
        let mut options = ConnectOptions::new();
        if let Some(authority) = &self.authority {
            options = options.add_root_certificates(authority.clone()).require_tls(true);
        }
        connect_with(options, &nats_url("admin", &self.server())).await
    }
}

impl Probe for Access {
    fn answers(&self) -> BoxFuture<'_, Result<()>> {
        async {
            // It is healthy when it has recovered every stream and consumer.
            HttpClient::new(&self.monitoring_url()).get("/healthz").await?.expect(200)?;
            if self.admin {
                jetstream::new(self.connect().await?).query_account().await.context("JetStream does not answer")?;
            }
            Ok(())
        }
        .boxed()
    }
}

/// The variables that the configuration reads. The value of `NATS_USER_PASSWORD` is `user`.
fn passwords() -> impl Iterator<Item = (&'static str, String)> {
    let words = CONFIGURATION.iter().flat_map(|(_, text)| text.split([' ', ',', '\n']));
    let variables = words.filter_map(|word| word.strip_prefix('$'));
    variables.filter_map(|variable| {
        let user = variable.strip_prefix("NATS_")?.strip_suffix("_PASSWORD")?;
        Some((variable, user.to_lowercase()))
    })
}

/// The URLs of `user`, with its name as password, for these servers (comma-separated `host:port`).
pub fn nats_url(user: &str, servers: &str) -> String {
    servers.split(',').map(|server| format!("nats://{user}:{user}@{server}")).collect::<Vec<_>>().join(",")
}

/// Connects to one of these servers, comma-separated URLs with user and password.
///
/// `async_nats::connect` ignores user and password in a URL.
pub async fn connect(urls: &str) -> Result<Client> {
    connect_with(ConnectOptions::new(), urls).await
}

async fn connect_with(mut options: ConnectOptions, urls: &str) -> Result<Client> {
    let servers = urls.split(',').map(str::parse).collect::<Result<Vec<ServerAddr>, _>>()?;
    if let Some((user, password)) = servers.iter().find_map(|server| Some((server.username()?, server.password()?))) {
        options = options
            .user_and_password(user.to_owned(), password.to_owned())
            .custom_inbox_prefix(format!("_INBOX_{user}"));
    }
    Ok(options.connection_timeout(Duration::from_secs(2)).connect(servers).await?)
}

/// Quotes a value for the server's configuration, so that it is read as text.
fn quoted(text: &str) -> String {
    format!("\"{text}\"")
}
