use crate::eventually::eventually_within;
use crate::images::{self, Image};
use crate::progress::say;
use crate::reaper::Reaper;
use anyhow::{Context, Result, anyhow, bail};
use futures::TryStreamExt;
use futures::future::BoxFuture;
use std::fmt::Debug;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;
use testcontainers::bollard::models::PortBinding;
use testcontainers::bollard::query_parameters::{
    InspectContainerOptions, KillContainerOptionsBuilder, LogsOptionsBuilder,
};
use testcontainers::core::ContainerPort;
use testcontainers::core::client::docker_client_instance;
use testcontainers::runners::AsyncRunner;
use testcontainers::{ContainerAsync, ContainerRequest, GenericImage, ImageExt};
use tokio::task::spawn_blocking;

const READY_WITHIN: Duration = Duration::from_mins(1);

/// A running server and the faults it can suffer. Its address and its data stay the same through all of them.
///
/// Removed, with the data that has no name, when it is dropped or when this process dies.
#[derive(Debug)]
pub struct Container {
    /// None only while it is being dropped.
    running: Option<ContainerAsync<GenericImage>>,
    probe: Box<dyn Probe>,
    /// The port the server listens on inside.
    port: u16,
    _reaper: Reaper,
}

/// A client of the server, which finds out whether the server answers.
pub(crate) trait Probe: Debug + Send + Sync + 'static {
    /// Connects and asks something. Boxed, because a client that connects is large, and this is part of every test's
    /// future.
    fn answers(&self) -> BoxFuture<'_, Result<()>>;
}

impl Container {
    /// Starts the image with what `configure` adds, its ports published on 127.0.0.1, and waits until it answers.
    /// `ports` are pairs of host and container port; the first is the one the server is known by.
    pub(crate) async fn start(
        image: Image,
        ports: &[(u16, u16)],
        probe: impl Probe,
        configure: impl FnOnce(ContainerRequest<GenericImage>) -> ContainerRequest<GenericImage>,
    ) -> Result<Self> {
        images::ensure(image).await?;
        let (name, tag) = image.name();
        let mut request = configure(GenericImage::new(name, tag).into());
        for &(outside, inside) in ports {
            request = request.with_mapped_port(outside, ContainerPort::Tcp(inside));
        }
        // Only for this machine: the password is known to everybody.
        let request = request.with_host_config_modifier(|host| {
            let bindings = host.port_bindings.iter_mut().flat_map(|ports| ports.values_mut()).flatten().flatten();
            bindings.for_each(|binding: &mut PortBinding| binding.host_ip = Some("127.0.0.1".to_owned()));
        });
        let port = ports.first().context("a server has a port")?.1;
        let create = async move {
            let running = request.start().await?;
            let reaper = Reaper::watch(["docker", "rm", "--force", "--volumes", running.id()])?;
            Ok(Self { running: Some(running), probe: Box::new(probe), port, _reaper: reaper })
        };
        // On a runtime of its own: a request to Docker that is cancelled may still create a container, which nothing
        // would remove. There it is completed, also when this runtime shuts down, and the container is dropped if this
        // future was.
        let container = spawn_blocking(|| run_to_its_end(create)).await?;
        let container = container.with_context(|| format!("cannot start {name}:{tag}"))?;
        container.answers().await?;
        Ok(container)
    }

    /// Docker's id of the container.
    pub fn id(&self) -> &str {
        self.running().id()
    }

    /// Where the server listens in Docker's network: around the proxy in front of the published port, which takes
    /// about as much CPU as the server. May change when it is started again. Reachable on Linux only.
    pub async fn address(&self) -> Result<SocketAddr> {
        let docker = docker_client_instance().await?;
        let inspected = docker.inspect_container(self.id(), None::<InspectContainerOptions>).await?;
        let networks = inspected.network_settings.and_then(|settings| settings.networks).unwrap_or_default();
        // Empty while the container is stopped.
        let ip: Option<IpAddr> = networks.values().find_map(|network| network.ip_address.as_ref()?.parse().ok());
        Ok((ip.context("the container has no address of its own")?, self.port).into())
    }

    /// Ends the server as an operator would: it may finish what it does, for up to ten seconds.
    pub async fn stop(&self) -> Result<()> {
        self.running().stop_with_timeout(Some(10)).await.context("cannot stop the container")
    }

    /// Ends the server at once (SIGKILL).
    pub async fn kill(&self) -> Result<()> {
        let sigkill = KillContainerOptionsBuilder::new().signal("SIGKILL").build();
        let docker = docker_client_instance().await?;
        docker.kill_container(self.id(), Some(sigkill)).await.context("cannot kill the container")
    }

    /// Starts the server after [`stop`](Self::stop) or [`kill`](Self::kill), and waits until it answers.
    pub async fn start_again(&self) -> Result<()> {
        self.running().start().await.context("cannot start the container again")?;
        self.answers().await
    }

    /// [`stop`](Self::stop) and [`start_again`](Self::start_again).
    pub async fn restart(&self) -> Result<()> {
        self.stop().await?;
        self.start_again().await
    }

    /// Freezes the server: connections stay open and nothing answers, as behind a network that lost its link.
    pub async fn pause(&self) -> Result<()> {
        self.running().pause().await.context("cannot pause the container")
    }

    /// Ends [`pause`](Self::pause) and waits until the server answers.
    pub async fn unpause(&self) -> Result<()> {
        self.running().unpause().await.context("cannot unpause the container")?;
        self.answers().await
    }

    /// Everything the server has printed since it was first started.
    pub async fn logs(&self) -> Result<String> {
        let both = LogsOptionsBuilder::new().stdout(true).stderr(true).build();
        let lines: Vec<_> = docker_client_instance().await?.logs(self.id(), Some(both)).try_collect().await?;
        Ok(lines.iter().map(ToString::to_string).collect())
    }

    async fn answers(&self) -> Result<()> {
        let what = format!("{:?} to answer", self.probe);
        let answered = eventually_within(READY_WITHIN, &what, async || match self.probe.answers().await {
            Err(_) if !self.running().is_running().await? => Ok(Err(anyhow!("the server ended"))),
            answer => answer.map(Ok),
        });
        if let Err(error) = answered.await.flatten() {
            let logs = self.logs().await.unwrap_or_default();
            let lines: Vec<_> = logs.lines().collect();
            let tail = lines[lines.len().saturating_sub(20)..].join("\n");
            bail!("{error:#}. The server said last:\n{tail}");
        }
        Ok(())
    }

    fn running(&self) -> &ContainerAsync<GenericImage> {
        self.running.as_ref().expect("only a drop takes it")
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let Some(container) = self.running.take() else { return };
        // testcontainers removes it in the current runtime, which panics outside of one and in one that shuts down. A
        // thread with a runtime of its own works everywhere.
        let removed = std::thread::spawn(move || run_to_its_end(async { Ok(container.rm().await?) }));
        if let Err(error) = removed.join().unwrap_or_else(|_| Err(anyhow!("panicked"))) {
            say(&format!("could not remove a container: {error:#}"));
        }
    }
}

/// On a runtime of its own, whatever happens to the one it is called from.
fn run_to_its_end<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)
}
