use crate::container::{Container, Probe};
use crate::images::Image;
use crate::port::free_port;
use anyhow::{Context, Result};
use async_nats::{ConnectOptions, jetstream};
use std::ops::Deref;
use std::time::Duration;
use testcontainers::core::Mount;
use testcontainers::{ContainerRequest, GenericImage, ImageExt};

const CONFIGURATION: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../infra/nats/nats.conf"));
const PORT: u16 = 4222;
const MONITORING_PORT: u16 = 8222;

/// NATS with JetStream, configured by `infra/nats/nats.conf`: a message is on disk before it is acknowledged.
#[derive(Debug)]
pub struct Nats {
    container: Container,
    port: u16,
    monitoring_port: u16,
}

impl Nats {
    /// A server of your own. Streams have fixed names, so every test needs one.
    pub async fn start() -> Result<Self> {
        Self::start_with(free_port(), free_port(), |request| request).await
    }

    /// A server under a fixed container name, whose data stays in the volume of the same name when it is removed.
    pub async fn start_named(name: &str, port: u16, monitoring_port: u16) -> Result<Self> {
        Self::start_with(port, monitoring_port, |request| {
            request.with_container_name(name).with_mount(Mount::volume_mount(name, "/data"))
        })
        .await
    }

    async fn start_with(
        port: u16,
        monitoring_port: u16,
        configure: impl FnOnce(ContainerRequest<GenericImage>) -> ContainerRequest<GenericImage>,
    ) -> Result<Self> {
        let probe = Probe::Nats(url(port), monitoring_url(monitoring_port));
        let ports = [(port, PORT), (monitoring_port, MONITORING_PORT)];
        let container = Container::start(Image::Nats, &ports, probe, |request| {
            let request = request
                .with_copy_to("/etc/nats/nats.conf", CONFIGURATION.as_bytes().to_vec())
                .with_cmd(["--config", "/etc/nats/nats.conf"]);
            configure(request)
        })
        .await?;
        Ok(Self { container, port, monitoring_port })
    }

    /// Where clients connect.
    pub fn url(&self) -> String {
        url(self.port)
    }

    /// Where the server tells about itself over HTTP (`/jsz`, `/connz`, `/healthz`).
    pub fn monitoring_url(&self) -> String {
        monitoring_url(self.monitoring_port)
    }
}

impl Deref for Nats {
    type Target = Container;

    fn deref(&self) -> &Container {
        &self.container
    }
}

fn url(port: u16) -> String {
    format!("nats://127.0.0.1:{port}")
}

fn monitoring_url(port: u16) -> String {
    format!("http://127.0.0.1:{port}")
}

pub(crate) async fn answers(url: &str, monitoring: &str) -> Result<()> {
    // It is healthy when it has recovered every stream and consumer.
    crate::Client::new(monitoring).get("/healthz").await?.expect(200)?;
    let nats = ConnectOptions::new().connection_timeout(Duration::from_secs(2)).connect(url).await?;
    jetstream::new(nats).query_account().await.context("JetStream does not answer")?;
    Ok(())
}
