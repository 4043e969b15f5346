//! Each image contains the service it is named after.
//!
//! Skaffold caches images by build command and sources, not by name: with one command for two images, its second run deploys
//! one of them twice. Nothing is compiled here.

use anyhow::{Context, Result, ensure};
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

/// Runs `infra/docker/build` in a repository where nothing is compiled, and docker prints its arguments.
struct Build(PathBuf);

impl Build {
    fn new(name: &str) -> Result<Self> {
        let root = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", std::process::id()));
        fs::create_dir_all(root.join("infra/docker"))?;
        fs::copy(Path::new(ROOT).join("infra/docker/build"), root.join("infra/docker/build"))?;
        for (file, script) in [("infra/docker/compile", "#!/bin/sh\n"), ("docker", "#!/bin/sh\necho docker \"$@\"\n")] {
            fs::write(root.join(file), script)?;
            fs::set_permissions(root.join(file), fs::Permissions::from_mode(0o755))?;
        }
        Ok(Self(root))
    }

    fn run(&self, command: &str, image: &str) -> Result<Output> {
        let path = format!("{}:{}", self.0.display(), std::env::var("PATH")?);
        let command = command.replacen("infra/docker/build", "bash infra/docker/build", 1);
        let mut shell = Command::new("sh");
        shell.args(["-c", &command]).current_dir(&self.0).env("PATH", path).env_remove("CARGO_TARGET_DIR");
        shell.env("IMAGE", image).env("PUSH_IMAGE", "true").output().context("cannot run sh")
    }
}

impl Drop for Build {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The build commands of every artifact, and of every profile that pushes.
fn build_commands() -> Result<Vec<String>> {
    let skaffold = fs::read_to_string(Path::new(ROOT).join("skaffold.yaml"))?;
    let fields = skaffold.lines().map(|line| line.trim().trim_start_matches("- "));
    let values = fields.filter_map(|field| field.split_once(": ").map(|(_, value)| value.to_owned()));
    Ok(values.filter(|value| value.starts_with("infra/docker/build")).collect())
}

#[test]
fn each_artifact_and_profile_of_skaffold_has_its_own_build_command() -> Result<()> {
    let commands = build_commands()?;
    let different: BTreeSet<_> = commands.iter().collect();
    ensure!(commands.len() == 4, "two images, for development and for production: {commands:?}");
    ensure!(different.len() == 4, "skaffold takes one image for those that have one command: {commands:?}");
    Ok(())
}

#[test]
fn an_image_contains_the_service_it_is_named_after() -> Result<()> {
    let build = Build::new("named")?;
    for command in build_commands()? {
        let service = command.rsplit(' ').next().unwrap_or_default().to_owned();
        for registry in ["ticketing/", "localhost:5000/ticketing_", "registry.example.com/team/"] {
            for tag in ["", ":0.1.0", "@sha256:0123"] {
                let image = format!("{registry}{service}{tag}");
                let output = build.run(&command, &image)?;
                let printed = String::from_utf8(output.stdout)?;
                ensure!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
                let (built, pushed) = printed.trim().split_once('\n').context(printed.clone())?;
                ensure!(built.ends_with(&format!("--tag {image} target/images/{service}")), "{command}: {built}");
                ensure!(pushed == format!("docker push {image}"), "{command}: {pushed}");
            }
        }
    }
    Ok(())
}

#[test]
fn an_image_named_after_another_service_is_refused() -> Result<()> {
    let build = Build::new("misnamed")?;
    for (command, image) in [
        ("infra/docker/build tickets", "localhost:5000/ticketing_orders:1"),
        ("infra/docker/build tickets orders", "ticketing/orders"),
        ("infra/docker/build", "localhost:5000/ticketing"),
        ("infra/docker/build payments", "ticketing/payments"),
    ] {
        let output = build.run(command, image)?;
        let said = String::from_utf8(output.stderr)?;
        ensure!(!output.status.success() && output.stdout.is_empty(), "{image} was made by {command}");
        ensure!(said.starts_with("infra/docker/build: "), "{said}");
    }
    Ok(())
}
