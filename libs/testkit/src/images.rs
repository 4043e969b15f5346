//! The container images: present, pulled, or, without a registry, built from Debian packages.

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
const DOCKERFILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../infra/docker/Dockerfile");
const BUILD: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../infra/images/build");

/// The time limit for a registry that cannot be reached. Docker itself would try for minutes.
const FIRST_SIGN_OF_A_REGISTRY: Duration = Duration::from_secs(12);
const NEXT_SIGN_OF_A_REGISTRY: Duration = Duration::from_mins(1);

/// One of the images of `infra/images/names`.
#[derive(Clone, Copy, Debug)]
pub enum Image {
    /// The database.
    Postgres,
    /// The broker.
    Nats,
    /// The monitoring system, with `promtool`.
    Prometheus,
}

impl Image {
    /// Its name in `infra/images`.
    pub fn key(self) -> &'static str {
        match self {
            Self::Postgres => "postgres",
            Self::Nats => "nats",
            Self::Prometheus => "prometheus",
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

/// Makes sure that the image is on this machine. Cheap after the first call; concurrent calls are safe.
pub async fn ensure(image: Image) -> Result<()> {
    static POSTGRES: OnceCell<()> = OnceCell::const_new();
    static NATS: OnceCell<()> = OnceCell::const_new();
    static PROMETHEUS: OnceCell<()> = OnceCell::const_new();
    let once = match image {
        Image::Postgres => &POSTGRES,
        Image::Nats => &NATS,
        Image::Prometheus => &PROMETHEUS,
    };
    once.get_or_try_init(|| provide(image)).await.copied()
}

/// Builds an image of a binary and its libraries, with the layout of `infra/docker/Dockerfile`.
///
/// The binary is `/service` in the image. Tests use a binary that is compiled anyway, instead of the static ones of
/// `infra/docker/build`.
pub async fn build_from(binary: &Path, image: &str) -> Result<()> {
    let root = std::env::temp_dir().join(format!("{}-{}", image.replace(['/', ':'], "-"), std::process::id()));
    let script = r#"
        mkdir -p "$2"
        cp "$1" "$2/service"
        for library in $(ldd "$1" | grep -o '/[^ ]*'); do cp --parents --dereference "$library" "$2"; done
        before=$(docker images --quiet --no-trunc "$3")
        after=$(docker build --quiet --file "$4" --target host --tag "$3" "$2")
        # That of an earlier compilation has no name any more. It stays if something runs it.
        if [ "${before:-$after}" != "$after" ]; then docker rmi "$before" || true; fi
    "#;
    let mut command = Command::new("sh");
    command.args(["-euc", script, "sh"]).arg(binary).arg(&root).args([image, DOCKERFILE]);
    let output = command.stdin(Stdio::null()).kill_on_drop(true).output().await;
    let _ = std::fs::remove_dir_all(&root);
    let output = output.context("cannot run sh")?;
    ensure!(output.status.success(), "cannot make {image}:\n{}", String::from_utf8_lossy(&output.stderr));
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
        // The bytes of a layer are many steps of one status: one line per status shows the progress.
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
    // The script waits for concurrent builds, and checks again before it builds.
    let status = Command::new(BUILD).arg(image.key()).stdin(Stdio::null()).kill_on_drop(true).status().await;
    let status = status.with_context(|| format!("cannot run {BUILD}"))?;
    ensure!(status.success(), "infra/images/build {} failed ({status}), see above; or {advice}", image.key());
    Ok(())
}
