use anyhow::{Context, Result};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

/// Runs a command when this process ends without destructors: Ctrl-C, SIGKILL, abort.
///
/// It is a shell that waits for the end of its standard input. Only this process holds the other end.
#[derive(Debug)]
pub struct Reaper(Child);

impl Reaper {
    /// Drop it after the object that `command` removes was removed.
    pub fn watch<'a>(command: impl IntoIterator<Item = &'a str>) -> Result<Self> {
        let shell = Command::new("sh")
            .args(["-c", "cat; exec \"$@\"", "reaper"])
            .args(command)
            // Its own process group: Ctrl-C in the terminal must end this process, but not the one that cleans up.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        Ok(Self(shell.context("cannot start sh")?))
    }
}

impl Drop for Reaper {
    fn drop(&mut self) {
        // The object that the command removes was removed already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
