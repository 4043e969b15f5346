//! The container images: present, pulled, or built here from Debian packages where no registry can be reached.

use crate::progress::{announced, say};
use anyhow::{Context, Result, bail, ensure};
use futures::StreamExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;
use testcontainers::bollard::Docker;
use testcontainers::bollard::errors::Error as DockerError;
use testcontainers::bollard::query_parameters::CreateImageOptionsBuilder;
use testcontainers::core::client::docker_client_instance;
use tokio::process::Command;
use tokio::sync::OnceCell;
use tokio::time::timeout;

const NAMES: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../infra/images/names"));
const BUILD_SERVICES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../infra/docker/build");
const BUILD: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../infra/images/build");

/// A registry that cannot be reached must not hold up anybody: Docker itself would try for minutes.
const FIRST_SIGN_OF_A_REGISTRY: Duration = Duration::from_secs(12);
const NEXT_SIGN_OF_A_REGISTRY: Duration = Duration::from_mins(1);

/// One of the images of `infra/images/names`.
#[derive(Clone, Copy, Debug)]
pub enum Image {
    /// The database.
    Postgres,
    /// The broker.
    Nats,
}

impl Image {
    /// What `infra/images` calls it.
    pub fn key(self) -> &'static str {
        match self {
            Self::Postgres => "postgres",
            Self::Nats => "nats",
        }
    }

    /// Name and tag, such as `postgres` and `18`.
    pub fn name(self) -> (&'static str, &'static str) {
        NAMES
            .lines()
            .filter_map(|line| line.split_once('='))
            .find(|(key, _)| *key == self.key())
            .and_then(|(_, name)| name.trim().rsplit_once(':'))
            .expect("infra/images/names has a line key=name:tag for every image")
    }
}

/// Makes sure that the image is on this machine. Cheap after the first time; safe to do at once from anywhere.
pub async fn ensure(image: Image) -> Result<()> {
    static POSTGRES: OnceCell<()> = OnceCell::const_new();
    static NATS: OnceCell<()> = OnceCell::const_new();
    let once = match image {
        Image::Postgres => &POSTGRES,
        Image::Nats => &NATS,
    };
    once.get_or_try_init(|| provide(image)).await.copied()
}

/// Compiles the services as they are now, and makes `ticketing/tickets` and `ticketing/orders` of them: a matter of seconds
/// where little has changed, and of many minutes the first time.
pub async fn build_services() -> Result<()> {
    let output = Command::new(BUILD_SERVICES).stdin(Stdio::null()).kill_on_drop(true).output().await;
    let output = output.with_context(|| format!("cannot run {BUILD_SERVICES}"))?;
    ensure!(output.status.success(), "infra/docker/build failed:\n{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

async fn provide(image: Image) -> Result<()> {
    let (name, tag) = image.name();
    let full = format!("{name}:{tag}");
    let no_docker = "cannot talk to Docker; is it installed and running, and are you allowed to use it?";
    let docker = docker_client_instance().await.context(no_docker)?;
    match docker.inspect_image(&full).await {
        Ok(_) => return Ok(()),
        Err(DockerError::DockerResponseServerError { status_code: 404, .. }) => {}
        Err(error) => return Err(error).context(no_docker),
    }
    let pulled = announced(&format!("image {full} is not here, pulling it"), pull(&docker, name, tag)).await;
    match pulled {
        Ok(()) => Ok(()),
        Err(reason) => {
            say(&format!("cannot pull {full} ({reason:#}), building it with infra/images/build {}", image.key()));
            build(image, &full).await
        }
    }
}

async fn pull(docker: &Docker, name: &str, tag: &str) -> Result<()> {
    let options = CreateImageOptionsBuilder::new().from_image(name).tag(tag).build();
    let mut steps = std::pin::pin!(docker.create_image(Some(options), None, None));
    let mut patience = FIRST_SIGN_OF_A_REGISTRY;
    let mut last = String::new();
    while let Some(step) = timeout(patience, steps.next()).await.context("the registry does not answer")? {
        let status = step?.status.unwrap_or_default();
        // Bytes of a layer arrive as many steps of one status: a line for each status is enough to see it go on.
        if status != last {
            say(&format!("{name}:{tag}: {status}"));
            last = status;
        }
        patience = NEXT_SIGN_OF_A_REGISTRY;
    }
    Ok(())
}

async fn build(image: Image, full: &str) -> Result<()> {
    let advice = format!("bring the image {full} to this machine (docker pull or docker load) and try again");
    if !Path::new(BUILD).exists() {
        bail!("{BUILD} is not there; {advice}");
    }
    // The script waits for others that build, and looks again before it builds.
    let status = Command::new(BUILD).arg(image.key()).stdin(Stdio::null()).kill_on_drop(true).status().await;
    let status = status.with_context(|| format!("cannot run {BUILD}"))?;
    ensure!(status.success(), "infra/images/build {} failed ({status}), see above; or {advice}", image.key());
    Ok(())
}
