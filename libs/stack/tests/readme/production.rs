//! Runs all steps of "Production" in docs/operations.md, in one shell, against a Postgres with TLS.
//!
//! There is no cluster and no registry here. A wrapper of `kubectl` prints the objects instead of sending them, and a wrapper
//! of `docker` records what would be built and pushed. `infra/docker/build` is the real one, but nothing is compiled.

use crate::authority::Authority;
use crate::blocks::{block, outcome};
use crate::overlay::{Overlay, ROOT, text};
use crate::postgres::{PASSWORD, TlsPostgres};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use stack::services::SERVICES;
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use testkit::{JWT_KEY, Process, free_port};
use tokio::process::Command;

const KUBECTL: &str = r#"#!/bin/sh
PATH=${PATH#*:}
exec >>"$APPLIED"
echo ---
case "$1 $2" in
    "apply --kustomize") exec kubectl kustomize "$3" ;;
    "apply --filename") exec kubectl annotate --local --output yaml --filename "$3" applied=true ;;
    *) exec kubectl "$@" --dry-run=client --output yaml ;;
esac
"#;
const DOCKER: &str = "#!/bin/sh\necho \"$@\" >>\"$DOCKED\"\n";
const COMPILE: &str = "#!/bin/sh\n";

/// A checkout in which nothing is compiled, with the certificates that the steps ask for.
struct Checkout(PathBuf);

impl Checkout {
    async fn new(authority: &Authority) -> Result<Self> {
        let directory = std::env::temp_dir().join(format!("readme-{}", std::process::id()));
        let checkout = Self(directory.clone());
        std::fs::create_dir_all(directory.join("bin"))?;
        outcome(Command::new("cp").arg("-r").arg(format!("{ROOT}/infra")).arg(&directory)).await?;
        for (name, script) in [("bin/kubectl", KUBECTL), ("bin/docker", DOCKER), ("infra/docker/compile", COMPILE)] {
            std::fs::write(directory.join(name), script)?;
            std::fs::set_permissions(directory.join(name), PermissionsExt::from_mode(0o755))?;
        }
        std::fs::copy(&authority.file, directory.join("postgres-ca.crt"))?;
        std::fs::write(directory.join("ticketing.crt"), &authority.certificate)?;
        std::fs::write(directory.join("ticketing.key"), &authority.key)?;
        Ok(checkout)
    }
}

impl Drop for Checkout {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[tokio::test]
async fn production_steps_make_databases_and_all_secrets_that_services_need() -> Result<()> {
    let (authority, stranger) = (Authority::new()?, Authority::new()?);
    let checkout = Checkout::new(&authority).await?;
    let (directory, prod) = (&checkout.0, Overlay::render("prod")?);
    let postgres = TlsPostgres::start(directory, &authority).await?;

    let steps = block("# 1. roles and databases")?.replace("db.example.com:5432", &postgres.address);
    let path = format!("{}:{}", directory.join("bin").display(), std::env::var("PATH")?);
    let mut bash = Command::new("bash");
    bash.args(["-e", "-o", "pipefail", "-c", &steps]).current_dir(directory).env("PATH", path);
    bash.env("APPLIED", directory.join("applied.yaml")).env("DOCKED", directory.join("docked"));
    bash.env("PGPASSWORD", PASSWORD).env("JWT_KEY", JWT_KEY);
    outcome(bash.env("CARGO_TARGET_DIR", directory.join("target"))).await?;

    let applied: Vec<Value> = serde_saphyr::from_multiple(&std::fs::read_to_string(directory.join("applied.yaml"))?)?;
    let secrets = secrets(&applied)?;
    let keys: BTreeSet<_> = secrets.keys().cloned().collect();
    ensure!(keys == prod.documented, "made are {keys:?}, overlays/prod lists {:?}", prod.documented);
    let are_there = prod.objects.iter().all(|object| applied.contains(object));
    ensure!(are_there, "step 4 does not apply overlays/prod");
    images_have_the_tags_of(&prod, &std::fs::read_to_string(directory.join("docked"))?)?;

    for service in SERVICES.map(|service| service.name) {
        let owner = &secrets[&format!("{service}-database-owner/DATABASE_URL")];
        let wrong = migrate(service, owner, &stranger.file).await;
        ensure!(wrong.is_err(), "{service} trusts a Postgres whose authority it does not know");
        migrate(service, owner, &authority.file).await?;
        let env = [
            ("DATABASE_URL", secrets[&format!("{service}-database/DATABASE_URL")].clone()),
            ("PGSSLROOTCERT", authority.file.display().to_string()),
            ("JWT_KEY", secrets["jwt/JWT_KEY"].clone()),
            ("NATS_URL", format!("127.0.0.1:{}", free_port())),
        ];
        Process::spawn(Path::new(env!("CARGO_BIN_EXE_stack")), service, env)?.wait_ready().await?;
    }
    Ok(())
}

/// `name/key` and the value of every secret that was made.
fn secrets(applied: &[Value]) -> Result<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    for secret in applied.iter().filter(|object| object["kind"] == "Secret") {
        let metadata = &secret["metadata"];
        ensure!(metadata["namespace"] == "ticketing", "{metadata}");
        for (key, value) in secret["data"].as_object().context("a secret without data")? {
            let value = base64::Engine::decode(&base64::prelude::BASE64_STANDARD, text(value))?;
            ensure!(!value.is_empty(), "{key} of {metadata} is empty");
            found.insert(format!("{}/{key}", text(&metadata["name"])), String::from_utf8(value)?);
        }
    }
    Ok(found)
}

/// Checks that each image of a service was built and pushed, with its tag in the overlay.
fn images_have_the_tags_of(prod: &Overlay, docked: &str) -> Result<()> {
    for pod in prod.pods() {
        let image = text(&pod.container["image"]);
        if let Some(image) = image.strip_prefix("ticketing/") {
            let image = format!("registry.example.com/{image}");
            let line = |command| docked.lines().any(|line| line.starts_with(command) && line.contains(&image));
            ensure!(line("build") && line("push"), "{image} is not built or not pushed:\n{docked}");
        }
    }
    Ok(())
}

/// Runs `migrate` as the job does.
async fn migrate(service: &str, url: &str, authority: &Path) -> Result<String> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_stack"));
    command.args([service, "migrate"]).env("DATABASE_URL", url).env("DATABASE_ROLE", service).env("PATIENCE", "5s");
    outcome(command.env("PGSSLROOTCERT", authority)).await
}
