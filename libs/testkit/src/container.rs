use crate::eventually::{eventually, eventually_within};
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

/// A server in a container, and its faults. Its address and its data survive all of them.
///
/// Removed, with data in unnamed volumes, when it is dropped or when this process dies.
#[derive(Debug)]
pub struct Container {
    /// None only while it is being dropped.
    running: Option<ContainerAsync<GenericImage>>,
    probe: Box<dyn Probe>,
    /// The port the server listens on inside.
    port: u16,
    _reaper: Reaper,
}

/// A client that checks whether the server responds.
pub(crate) trait Probe: Debug + Send + Sync + 'static {
    /// Connects and sends a request. Boxed, because the future is large and a part of every test's future.
    fn answers(&self) -> BoxFuture<'_, Result<()>>;
}

impl Container {
    /// Starts the image with its ports published on 127.0.0.1, and waits until it responds.
    ///
    /// `configure` adds options. `ports` are pairs of host and container port; the first is the address of the server.
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
        // Only for this machine: the password is public.
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
        // On a separate runtime: a cancelled request to Docker may still create a container, which would not be removed.
        // There the request completes even if this runtime shuts down. If this future was dropped, the container is
        // dropped too.
        let container = spawn_blocking(|| run_to_its_end(create)).await?;
        let container = container.with_context(|| format!("cannot start {name}:{tag}"))?;
        container.answers().await?;
        Ok(container)
    }

    /// Docker's id of the container.
    pub fn id(&self) -> &str {
        self.running().id()
    }

    /// The address of the server in Docker's network. May change when it is started again. Reachable on Linux only.
    ///
    /// It avoids the proxy of the published port, which needs about as much CPU as the server.
    pub async fn address(&self) -> Result<SocketAddr> {
        let docker = docker_client_instance().await?;
        let inspected = docker.inspect_container(self.id(), None::<InspectContainerOptions>).await?;
        let networks = inspected.network_settings.and_then(|settings| settings.networks).unwrap_or_default();
        // Empty while the container is stopped.
        let ip: Option<IpAddr> = networks.values().find_map(|network| network.ip_address.as_ref()?.parse().ok());
        Ok((ip.context("the container has no address of its own")?, self.port).into())
    }

    /// Stops the server gracefully, within ten seconds.
    pub async fn stop(&self) -> Result<()> {
        self.running().stop_with_timeout(Some(10)).await.context("cannot stop the container")
    }

    /// Kills the server (SIGKILL).
    pub async fn kill(&self) -> Result<()> {
        let sigkill = KillContainerOptionsBuilder::new().signal("SIGKILL").build();
        let docker = docker_client_instance().await?;
        docker.kill_container(self.id(), Some(sigkill)).await.context("cannot kill the container")
    }

    /// Starts the server after [`stop`](Self::stop) or [`kill`](Self::kill), and waits until it responds.
    pub async fn start_again(&self) -> Result<()> {
        self.running().start().await.context("cannot start the container again")?;
        self.answers().await
    }

    /// [`stop`](Self::stop) and [`start_again`](Self::start_again).
    pub async fn restart(&self) -> Result<()> {
        self.stop().await?;
        self.start_again().await
    }

    /// Freezes the server: connections stay open without any response, as when a network link is lost.
    pub async fn pause(&self) -> Result<()> {
        // On a busy machine the kernel may not freeze all threads in time; Docker has thawed them then.
        eventually("the container to be frozen", async || self.running().pause().await).await
    }

    /// Ends [`pause`](Self::pause) and waits until the server responds.
    pub async fn unpause(&self) -> Result<()> {
        self.running().unpause().await.context("cannot unpause the container")?;
        self.answers().await
    }

    /// The output of the server since it was first started.
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
            bail!("{error:#}. The end of its log:\n{tail}");
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
        // testcontainers removes it in the current runtime. That panics without a runtime, and in one that shuts down. A
        // thread with its own runtime always works.
        let removed = std::thread::spawn(move || run_to_its_end(async { Ok(container.rm().await?) }));
        if let Err(error) = removed.join().unwrap_or_else(|_| Err(anyhow!("panicked"))) {
            say(&format!("could not remove a container: {error:#}"));
        }
    }
}

/// Runs a future on its own runtime, independent of the runtime of the caller.
fn run_to_its_end<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)
}
