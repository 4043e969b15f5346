use crate::client::{Answer, Client};
use crate::container::{Container, Probe};
use crate::images::{self, Image};
use crate::port::free_port;
use anyhow::{Context, Result, ensure};
use futures::FutureExt;
use futures::future::BoxFuture;
use reqwest::{Method, Url};
use serde_json::Value;
use std::ops::Deref;
use std::path::Path;
use std::process::Stdio;
use testcontainers::ImageExt;
use tokio::process::Command;

/// Prometheus, for tests of alerts and dashboards.
///
/// It is in the network of this machine, because services of tests listen on 127.0.0.1: on Linux only.
#[derive(Debug)]
pub struct Prometheus {
    container: Container,
    client: Client,
}

impl Prometheus {
    /// Starts a server with this configuration, which finds the rules at `/etc/prometheus/rules.yaml`.
    pub async fn start(configuration: &str, rules: &str) -> Result<Self> {
        let port = free_port();
        let client = Client::new(&format!("http://127.0.0.1:{port}"));
        let container = Container::start(Image::Prometheus, &[(port, port)], Server(client.clone()), |request| {
            request
                .with_network("host")
                .with_copy_to("/etc/prometheus/prometheus.yml", configuration.as_bytes().to_vec())
                .with_copy_to("/etc/prometheus/rules.yaml", rules.as_bytes().to_vec())
                .with_cmd([
                    "--config.file=/etc/prometheus/prometheus.yml".to_owned(),
                    "--storage.tsdb.path=/prometheus".to_owned(),
                    format!("--web.listen-address=127.0.0.1:{port}"),
                ])
        })
        .await?;
        Ok(Self { container, client })
    }

    /// The series of an instant query, each with its labels (`metric`) and `value`: a time and a number as text.
    pub async fn query(&self, query: &str) -> Result<Vec<Value>> {
        let url = Url::parse_with_params("http://localhost/api/v1/query", [("query", query)])?;
        let path = format!("{}?{}", url.path(), url.query().unwrap_or_default());
        let body = Answer::to(self.client.request(Method::GET, &path)).await?.expect(200).context(query.to_owned())?;
        Ok(body["data"]["result"].as_array().with_context(|| format!("no vector: {body}"))?.clone())
    }
}

/// Runs `promtool` on the files in `directory`, which it finds at `/files`. Returns what it prints.
pub async fn promtool(directory: &Path, arguments: &[&str]) -> Result<String> {
    images::ensure(Image::Prometheus).await?;
    let (name, tag) = Image::Prometheus.name();
    let mount = format!("{}:/files:ro", directory.display());
    let mut command = Command::new("docker");
    command.args(["run", "--rm", "--network=none", "--volume", &mount, "--entrypoint=promtool"]);
    let command = command.arg(format!("{name}:{tag}")).args(arguments).stdin(Stdio::null()).kill_on_drop(true);
    let output = command.output().await.context("cannot run docker")?;
    let printed = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned()).concat();
    ensure!(output.status.success(), "promtool {arguments:?}: {printed}");
    Ok(printed)
}

impl Deref for Prometheus {
    type Target = Container;

    fn deref(&self) -> &Container {
        &self.container
    }
}

#[derive(Debug)]
struct Server(Client);

impl Probe for Server {
    fn answers(&self) -> BoxFuture<'_, Result<()>> {
        async {
            self.0.get("/-/ready").await?.expect(200)?;
            Ok(())
        }
        .boxed()
    }
}
