//! The system of `docker-compose.yml` sells tickets, and survives restarts and stops.
//!
//! With `IMAGES=built`, as in `.ci/run`, it uses and checks the images that `infra/docker/build` made. Otherwise it builds an
//! image of the binary that is compiled for tests anyway.

#![allow(clippy::disallowed_methods, reason = "tests look into tables, and publish what no relay would")]

mod frozen;
#[path = "../it/load.rs"]
#[allow(dead_code, reason = "other tests check more")]
mod load;
#[path = "../it/records.rs"]
#[allow(dead_code, reason = "other tests look at more of them")]
mod records;
#[path = "../it/settled.rs"]
#[allow(dead_code, reason = "other tests check more")]
mod settled;
#[path = "../it/small_disk.rs"]
mod small_disk;

use crate::load::Load;
use crate::records::Records;
use anyhow::{Context, Result, ensure};
use reqwest::Method;
use serde_json::{Value, json};
use stack::services::{ORDERS, SERVICES, TICKETS};
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;
use testkit::images::{self, Image};
use testkit::{Answer, Client, Reaper, announced, eventually_within, free_port, nats_url};
use tokio::task::spawn_blocking;

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

/// A compose project with its own ports: one for each variable of the file that is a port.
#[derive(Clone)]
struct Compose {
    command: Vec<String>,
    ports: [(&'static str, u16); 5],
}

/// Removes everything at the end, also after a test that fails or is killed.
struct Up {
    compose: Compose,
    changed: String,
    _reaper: Reaper,
}

impl Compose {
    /// Starts these services, or all, with the additional compose file `changes`.
    async fn up(name: &str, changes: &str, services: &[&str]) -> Result<Up> {
        tokio::try_join!(images::ensure(Image::Postgres), images::ensure(Image::Nats))?;
        let plugin =
            Command::new("docker").args(["compose", "version"]).output().is_ok_and(|tried| tried.status.success());
        let program: &[&str] = if plugin { &["docker", "compose"] } else { &["docker-compose"] };
        let project = format!("ticketing-test-{name}-{}", std::process::id());
        let file = format!("{ROOT}/docker-compose.yml");
        let changed = format!("{}/{project}.yml", env!("CARGO_TARGET_TMPDIR"));
        std::fs::write(&changed, changes)?;
        let options = ["--project-name", &project, "--file", &file, "--file", &changed];
        let command = program.iter().chain(&options).map(|&word| word.to_owned()).collect();
        let names = ["TICKETS_PORT", "ORDERS_PORT", "POSTGRES_PORT", "NATS_PORT", "NATS_MONITORING_PORT"];
        let compose = Self { command, ports: names.map(|name| (name, free_port())) };
        let down = compose.command.iter().map(String::as_str).chain(["down", "--volumes", "--timeout", "1"]);
        let up = Up { _reaper: Reaper::watch(down)?, compose: compose.clone(), changed: changed.clone() };
        let arguments: Vec<_> = ["up", "--detach", "--no-build"].iter().chain(services).copied().collect();
        announced("docker compose up", compose.run(&arguments)).await?;
        Ok(up)
    }

    async fn run(&self, arguments: &[&str]) -> Result<String> {
        let mut command = self.command(arguments);
        let what = format!("{command:?}");
        let output = spawn_blocking(move || command.output()).await?;
        let Output { status, stdout, stderr } =
            output.with_context(|| format!("cannot run {what}; is Compose installed?"))?;
        ensure!(status.success(), "{what}: {}", String::from_utf8_lossy(&stderr));
        Ok(String::from_utf8(stdout)?)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.command[0]);
        command.args(&self.command[1..]).args(arguments);
        command.envs(self.ports.iter().map(|(name, port)| (name, port.to_string())));
        command
    }

    /// The address of the port of this variable.
    fn address(&self, variable: &str) -> String {
        let port = self.ports.iter().find(|(name, _)| *name == variable).map_or(0, |(_, port)| *port);
        format!("127.0.0.1:{port}")
    }

    fn client(&self, variable: &str) -> Client {
        Client::new(&format!("http://{}", self.address(variable)))
    }

    /// The description of the container of a service by Docker.
    async fn inspect(&self, service: &str) -> Result<Value> {
        let id = self.run(&["ps", "--quiet", service]).await?.trim().to_owned();
        let output = tokio::process::Command::new("docker").args(["inspect", &id]).output().await?;
        let inspected: Value = serde_json::from_slice(&output.stdout)?;
        inspected.get(0).cloned().with_context(|| format!("{service} has no container"))
    }

    async fn healthy(&self, service: &str) -> Result<()> {
        eventually_within(Duration::from_mins(1), &format!("{service} to be healthy"), async || {
            let state = &self.inspect(service).await?["State"];
            ensure!(state["Health"]["Status"] == "healthy", "{state}");
            anyhow::Ok(())
        })
        .await
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        let down = self.compose.command(&["down", "--volumes", "--timeout", "5"]).output();
        if !down.is_ok_and(|output| output.status.success()) {
            testkit::say("could not take down what compose has started");
        }
        let _ = std::fs::remove_file(&self.changed);
    }
}

/// The compose file that sets the image of all services, unless they use the built ones.
async fn changed_images() -> Result<String> {
    if are_built() {
        return Ok("volumes: {nats: {}}".to_owned());
    }
    let image = "ticketing-test/service";
    let binary = Path::new(env!("CARGO_BIN_EXE_stack"));
    announced("making an image of the services", images::build_from(binary, image)).await?;
    let change = |name: &str, service: &str| {
        format!("  {name}: {{image: {image}, environment: {{STACK_SERVICE: {service}}}}}\n")
    };
    let of_service = |name: &str| change(&format!("{name}-migrate"), name) + &change(name, name);
    let changes = SERVICES.map(|service| of_service(service.name)).concat();
    Ok(format!("services:\n{}{changes}", change("provision", TICKETS.name)))
}

/// Whether the test uses the images that `infra/docker/build` made.
fn are_built() -> bool {
    std::env::var("IMAGES").is_ok_and(|images| images == "built")
}

#[tokio::test]
async fn restarts_of_every_container_of_compose_lose_nothing() -> Result<()> {
    let up = Compose::up("all", &changed_images().await?, &[]).await?;
    let compose = &up.compose;
    for service in ["postgres", "nats", "tickets", "orders"] {
        compose.healthy(service).await?;
    }
    the_services_are_closed(compose).await?;
    the_session_works(compose).await?;

    let database = |name: &str| format!("postgres://postgres:postgres@{}/{name}", compose.address("POSTGRES_PORT"));
    let nats = compose.address("NATS_PORT");
    let records = Records {
        nats_url: nats_url("admin", &nats),
        tickets_db: database(TICKETS.database),
        orders_db: database(ORDERS.database),
    };
    let clients = |variable| vec![compose.client(variable)];
    let load = Load::new(clients("TICKETS_PORT"), clients("ORDERS_PORT"), &nats).await?;
    let restarts = async {
        for service in ["tickets", "orders", "nats", "postgres", "tickets"] {
            tokio::time::sleep(Duration::from_secs(2)).await; // under load
            announced(&format!("restarting {service}"), compose.run(&["restart", service])).await?;
            compose.healthy(service).await?;
        }
        Ok(())
    };
    load.during(restarts).await?;
    records.settled().await?;
    load.was_told_the_truth(&records, 20).await?;

    // As after an update of the file: the tasks run again, and no data is lost.
    let before = records.tickets_rows().await?;
    compose.run(&["up", "--detach", "--no-build", "--force-recreate"]).await?;
    compose.healthy("tickets").await?;
    ensure!(records.tickets_rows().await? == before);
    records.settled().await
}

/// A service runs as an unprivileged user on a read-only file system, without ways to gain rights.
///
/// Its image is small and has no shell. The image of a test is not small.
async fn the_services_are_closed(compose: &Compose) -> Result<()> {
    for service in SERVICES.map(|service| service.name) {
        let container = compose.inspect(service).await?;
        let (config, host) = (&container["Config"], &container["HostConfig"]);
        ensure!(config["User"] == "65532:65532", "{config}");
        ensure!(host["ReadonlyRootfs"] == true && host["CapDrop"][0] == "ALL", "{host}");
        ensure!(host["SecurityOpt"][0] == "no-new-privileges:true", "{host}");

        let image = config["Image"].as_str().context("no image")?;
        let docker = async |arguments: &[&str]| tokio::process::Command::new("docker").args(arguments).output().await;
        let size = docker(&["image", "inspect", "--format", "{{.Size}}", image]).await?.stdout;
        let size: u64 = String::from_utf8(size)?.trim().parse()?;
        ensure!(size < 25_000_000 || !are_built(), "{image} has {size} bytes");
        let id = container["Id"].as_str().context("no id")?;
        let shell = docker(&["exec", id, "sh", "-c", "true"]).await?;
        let said = format!("{}{}", String::from_utf8_lossy(&shell.stdout), String::from_utf8_lossy(&shell.stderr));
        ensure!(!shell.status.success() && said.contains("executable file not found"), "{image} has a shell: {said}");
    }
    Ok(())
}

/// The session that `cargo up` prints works here too, and so does the token of the README.
async fn the_session_works(compose: &Compose) -> Result<()> {
    let [tickets, orders] = ["TICKETS_PORT", "ORDERS_PORT"].map(|port| format!("http://{}", compose.address(port)));
    let session = stack::session(&tickets, &orders);
    let output =
        tokio::process::Command::new("bash").args(["-ec", &session]).current_dir(Path::new(ROOT)).output().await?;
    let printed = String::from_utf8(output.stdout)?;
    ensure!(output.status.success(), "{printed}\n{}", String::from_utf8_lossy(&output.stderr));
    let last: Value = serde_json::from_str(printed.lines().last().unwrap_or_default()).context(printed.clone())?;
    ensure!(last[0]["status"] == "cancelled", "{printed}");

    let readme = std::fs::read_to_string(format!("{ROOT}/README.md"))?;
    let token =
        readme.lines().find_map(|line| line.trim().strip_prefix("ALICE=ey")).context("the README has no token")?;
    let create = compose.client("TICKETS_PORT").request(Method::POST, "/api/tickets").bearer_auth(format!("ey{token}"));
    let ticket = Answer::to(create.json(&json!({"title": "Concert", "price": 20}))).await?.expect(201)?;
    ensure!(ticket["userId"] == "alice", "{ticket}");
    Ok(())
}
