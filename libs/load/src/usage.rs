//! What processes use: CPU, memory, bytes written. Read from `/proc`, so on Linux only.

use anyhow::{Context, Result};
use std::collections::HashMap;
use std::fs;
use std::iter::Sum;
use std::ops::Sub;
use std::time::Duration;
use testkit::Container;
use tokio::process::Command;

/// The unit of times in `/proc/<pid>/stat`: Linux shows 100 ticks per second on every architecture.
const TICK: Duration = Duration::from_millis(10);

/// What processes have used since they started.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    /// CPU, of user and kernel.
    pub cpu: Duration,
    /// Bytes that were passed to `write` and its relatives. None if this user may not read it.
    ///
    /// Postgres writes only files in this way. NATS writes its sockets in this way too. `write_bytes`, the bytes for storage, is
    /// no alternative: it counts whole folios, which have up to 2 MB, for every write into them.
    pub written: Option<u64>,
}

impl Usage {
    /// That of a process and its children, children that have ended included. None if `/proc` does not show it.
    pub fn of(root: u32) -> Option<Self> {
        let processes = all_processes().ok()?;
        let children = processes.iter().filter(|(_, process)| process.parent == root);
        Some(
            [Self::of_process(root, processes.get(&root)?)]
                .into_iter()
                .chain(children.map(|(pid, child)| Self::of_process(*pid, child)))
                .sum(),
        )
    }

    /// That of a process without its children.
    pub fn of_alone(pid: u32) -> Option<Self> {
        let mut process = process(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)?;
        process.ticks -= process.ticks_of_ended;
        Some(Self::of_process(pid, &process))
    }

    fn of_process(pid: u32, process: &Process) -> Self {
        Self { cpu: TICK * u32::try_from(process.ticks).unwrap_or(u32::MAX), written: written(pid) }
    }
}

impl Sum for Usage {
    fn sum<I: Iterator<Item = Self>>(usages: I) -> Self {
        let none = Self { cpu: Duration::ZERO, written: Some(0) };
        usages.fold(none, |sum, usage| Self {
            cpu: sum.cpu + usage.cpu,
            written: sum.written.zip(usage.written).map(|(sum, usage)| sum + usage),
        })
    }
}

impl Sub for Usage {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        let written = self.written.zip(before.written).map(|(now, before)| now.saturating_sub(before));
        Self { cpu: self.cpu.saturating_sub(before.cpu), written }
    }
}

/// Makes the peak memory of a process start from what it has now. Only Linux can; elsewhere the peak is that since its start.
pub fn reset_memory_peak(pid: u32) {
    let _ = fs::write(format!("/proc/{pid}/clear_refs"), "5");
}

/// The id of the first process of a container. None where Docker runs in a virtual machine.
pub async fn main_process(container: &Container) -> Result<Option<u32>> {
    let mut docker = Command::new("docker");
    docker.args(["inspect", "--format", "{{.State.Pid}}", container.id()]);
    let output = docker.output().await.context("cannot run docker")?;
    let pid: u32 = String::from_utf8_lossy(&output.stdout).trim().parse().context("docker inspect shows no process")?;
    Ok(Usage::of(pid).map(|_| pid))
}

struct Process {
    parent: u32,
    /// Of the process, and of its children that have ended.
    ticks: u64,
    ticks_of_ended: u64,
}

fn all_processes() -> std::io::Result<HashMap<u32, Process>> {
    let names = fs::read_dir("/proc")?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    // A process may end while it is read.
    Ok(names.filter_map(|pid| Some((pid, process(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)?))).collect())
}

/// Reads `pid (name) state parent …`. The name may contain spaces and parentheses.
fn process(stat: &str) -> Option<Process> {
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = |fields: &[&str]| fields.iter().filter_map(|field| field.parse::<u64>().ok()).sum();
    let (ticks, ticks_of_ended) = (ticks(fields.get(11..15)?), ticks(fields.get(13..15)?));
    Some(Process { parent: fields.get(1)?.parse().ok()?, ticks, ticks_of_ended })
}

fn written(pid: u32) -> Option<u64> {
    let io = fs::read_to_string(format!("/proc/{pid}/io")).ok()?;
    io.lines().find_map(|line| line.strip_prefix("wchar: "))?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_with_a_strange_name_is_read() {
        let stat = "7 (a) b) S 3 7 7 0 -1 4194304 100 0 0 0 11 22 33 44 20 0 1 0 5 6 7";
        let process = process(stat).unwrap();
        assert_eq!((process.parent, process.ticks, process.ticks_of_ended), (3, 110, 77));
    }
}
