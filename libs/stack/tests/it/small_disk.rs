//! A volume in memory that a test can fill.

use anyhow::{Result, ensure};
use testkit::Reaper;
use testkit::images::Image;
use tokio::process::Command;

/// In megabytes: more than the free space that `infra/nats/frozen.sh` requires.
const SIZE: u32 = 128;

/// A Docker volume in memory.
///
/// Docker deletes its content when no container uses it, so a sleeping container keeps it. Drop it after its users.
pub struct SmallDisk {
    /// The volume's name.
    pub volume: String,
    holder: String,
    remove: String,
    _reaper: Reaper,
}

impl SmallDisk {
    pub async fn new(volume: String) -> Result<Self> {
        Self::with_megabytes(SIZE, volume).await
    }

    pub async fn with_megabytes(size: u32, volume: String) -> Result<Self> {
        testkit::images::ensure(Image::Nats).await?;
        let size = format!("o=size={size}m");
        docker(&["volume", "create", "--opt", "type=tmpfs", "--opt", "device=tmpfs", "--opt", &size, &volume]).await?;
        let (name, tag) = Image::Nats.name();
        let (mount, image) = (format!("{volume}:/data"), format!("{name}:{tag}"));
        let holder = docker(&["run", "--detach", "--volume", &mount, "--entrypoint", "sleep", &image, "3600"]).await?;
        let remove = format!("docker rm --force {holder} && docker volume rm {volume}");
        let reaper = Reaper::watch(["sh", "-c", &remove])?;
        Ok(Self { volume, holder, remove, _reaper: reaper })
    }

    /// Fills the volume completely.
    pub async fn fill(&self) -> Result<()> {
        self.run("dd if=/dev/zero of=/data/filler bs=4096; test $(df -P /data | awk 'END { print $4 }') -eq 0").await
    }

    /// Frees the space that [`fill`](Self::fill) took.
    pub async fn free(&self) -> Result<()> {
        self.run("rm /data/filler").await
    }

    async fn run(&self, script: &str) -> Result<()> {
        docker(&["exec", &self.holder, "sh", "-c", script]).await.map(drop)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let removed = std::process::Command::new("sh").args(["-c", &self.remove]).output();
        if !removed.is_ok_and(|output| output.status.success()) {
            testkit::say(&format!("could not remove the volume {}", self.volume));
        }
    }
}

/// Runs docker and returns its output.
pub async fn docker(arguments: &[&str]) -> Result<String> {
    let output = Command::new("docker").args(arguments).output().await?;
    ensure!(output.status.success(), "docker {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}
