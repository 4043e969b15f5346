use crate::client::Client;
use crate::eventually::{PATIENCE, eventually_within};
use crate::port::free_port;
use anyhow::{Context, Result, anyhow, bail, ensure};
use std::collections::VecDeque;
use std::ffi::OsString;
use std::fmt::{self, Debug, Display, Formatter};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// A service as a process. Killed when dropped, or when the process that started it dies.
#[derive(Debug)]
pub struct Process {
    name: String,
    port: u16,
    child: Child,
    log: Log,
    /// The tasks that read its output.
    readers: Vec<JoinHandle<()>>,
    /// Its standard input. The kernel closes it when this process ends for any reason; see [`end_with_parent`].
    _held: Option<ChildStdin>,
}

/// The signals for a process.
#[derive(Clone, Copy, Debug)]
pub enum Signal {
    /// SIGTERM: graceful shutdown.
    Terminate,
    /// SIGKILL: ends at once.
    Kill,
    /// SIGSTOP: frozen, connections stay open.
    Stop,
    /// SIGCONT: ends [`Stop`](Self::Stop).
    Continue,
}

/// Set for children whose standard input is a pipe that this process holds.
const HELD_BY_PARENT: &str = "PARENT_HOLDS_STDIN";

/// Lines of log that are kept: more than a test needs, and little memory for a long `cargo up`.
const LINES_KEPT: usize = 10_000;

impl Process {
    /// Starts the service `name` from its own binary, or from one that takes the name as its argument.
    ///
    /// `env` is added to the environment. The service listens on a free port of 127.0.0.1. Does not wait until it is ready: see
    /// [`wait_ready`](Self::wait_ready).
    pub fn spawn<K, V>(binary: &Path, name: &str, env: impl IntoIterator<Item = (K, V)>) -> Result<Self>
    where
        K: Into<OsString>,
        V: Into<OsString>,
    {
        Self::spawn_at(binary, name, free_port(), env, |_| {})
    }

    /// Does what [`spawn`](Self::spawn) does, on this port; `on_line` gets every line of the log.
    pub fn spawn_at<K, V>(
        binary: &Path,
        name: &str,
        port: u16,
        env: impl IntoIterator<Item = (K, V)>,
        on_line: impl Fn(&str) + Clone + Send + 'static,
    ) -> Result<Self>
    where
        K: Into<OsString>,
        V: Into<OsString>,
    {
        let is_its_own = binary.file_name().is_some_and(|file| file == name);
        let mut child = Command::new(PathBuf::from(binary))
            .args((!is_its_own).then_some(name))
            .envs(env.into_iter().map(|(key, value)| (key.into(), value.into())))
            .env("HTTP_ADDR", format!("127.0.0.1:{port}"))
            .env(HELD_BY_PARENT, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // Its own process group: Ctrl-C in the terminal must reach only this process, which stops its children in order.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start {} {name}", binary.display()))?;
        let log = Log::default();
        let stdout = log.follow(child.stdout.take().context("stdout is a pipe")?, on_line.clone());
        let stderr = log.follow(child.stderr.take().context("stderr is a pipe")?, on_line);
        // Taken out of the child, because Child::wait would close it.
        let held = child.stdin.take();
        Ok(Self { name: name.to_owned(), port, child, log, readers: vec![stdout, stderr], _held: held })
    }

    /// Its HTTP address, such as `http://127.0.0.1:20001`.
    pub fn address(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Its HTTP port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The id of the process. None after it has ended.
    pub fn id(&self) -> Option<u32> {
        self.child.id()
    }

    /// A client that is not signed in.
    pub fn client(&self) -> Client {
        Client::new(&self.address())
    }

    /// Waits until it is ready (`/readyz`). Fails at once, with the end of its log, if it ends.
    pub async fn wait_ready(&mut self) -> Result<()> {
        let client = self.client();
        let what = format!("{self} to be ready");
        let ready = eventually_within(PATIENCE, &what, async || client.get("/readyz").await?.expect(200));
        let outcome = tokio::select! {
            ready = ready => ready.map(drop),
            status = self.exited() => status.and_then(|status| bail!("it ended: {status}")),
        };
        outcome.map_err(|reason| anyhow!("{self}: {reason:#}. The end of its log:\n{}", self.last_lines(30)))
    }

    /// Its peak memory (resident set), in kB. Fails if it has ended.
    pub fn memory_peak(&self) -> Result<u64> {
        let pid = self.id().with_context(|| format!("{self} has ended"))?;
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
        Ok(peak.trim().trim_end_matches(" kB").parse()?)
    }

    /// Sends it a signal. Fails if it has ended already.
    pub async fn signal(&self, signal: Signal) -> Result<()> {
        let name = match signal {
            Signal::Terminate => "TERM",
            Signal::Kill => "KILL",
            Signal::Stop => "STOP",
            Signal::Continue => "CONT",
        };
        let pid = self.id().with_context(|| format!("{self} has ended"))?;
        let status = Command::from(kill(name, pid)).status().await.context("cannot run sh")?;
        ensure!(status.success(), "cannot send SIG{name} to {pid}");
        Ok(())
    }

    /// Waits until it has ended, without a time limit.
    pub async fn exited(&mut self) -> Result<ExitStatus> {
        let status = self.child.wait().await?;
        while let Some(mut reader) = self.readers.pop() {
            // Its last lines are still in the pipe. One of its children may keep the pipe open.
            let _ = timeout(Duration::from_secs(1), &mut reader).await;
        }
        Ok(status)
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Sends SIGTERM and waits until it has ended. Sends SIGKILL after `grace`.
    pub async fn stop(&mut self, grace: Duration) -> Result<ExitStatus> {
        if self.is_running() {
            self.signal(Signal::Terminate).await?;
        }
        if let Ok(status) = timeout(grace, self.exited()).await {
            return status;
        }
        self.child.kill().await?;
        self.exited().await
    }

    /// The last 10,000 lines of its standard output and error.
    pub fn logs(&self) -> String {
        self.last_lines(LINES_KEPT)
    }

    /// The last `count` lines of [`logs`](Self::logs).
    pub fn last_lines(&self, count: usize) -> String {
        let lines = self.log.0.lock().unwrap_or_else(PoisonError::into_inner);
        let skipped = lines.len().saturating_sub(count);
        lines.iter().skip(skipped).map(String::as_str).collect::<Vec<_>>().join("\n")
    }
}

impl Display for Process {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.name, self.address())
    }
}

#[derive(Clone, Debug, Default)]
struct Log(Arc<Mutex<VecDeque<String>>>);

impl Log {
    fn follow(
        &self,
        pipe: impl AsyncRead + Send + Unpin + 'static,
        on_line: impl Fn(&str) + Send + 'static,
    ) -> JoinHandle<()> {
        let log = self.clone();
        tokio::spawn(async move {
            let mut lines = BufReader::new(pipe).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                on_line(&line);
                let mut kept = log.0.lock().unwrap_or_else(PoisonError::into_inner);
                if kept.len() == LINES_KEPT {
                    kept.pop_front();
                }
                kept.push_back(line);
            }
        })
    }
}

/// Makes this process end when the process that [spawned](Process::spawn) it dies.
///
/// Call it first in the `main` of the spawned binary. It does nothing in a process that was started otherwise.
pub fn end_with_parent() {
    if std::env::var_os(HELD_BY_PARENT).is_none() {
        return;
    }
    std::thread::spawn(|| {
        // Nothing is written to it: this returns when the other end is closed, because its process has ended.
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        let _ = kill("TERM", std::process::id()).status();
    });
}

/// The shell's own `kill`: sending a signal from Rust is unsafe code, and `/bin/kill` is not on every machine.
fn kill(signal: &str, pid: u32) -> std::process::Command {
    let mut shell = std::process::Command::new("sh");
    shell.args(["-c", r#"kill -s "$0" "$1""#, signal, &pid.to_string()]);
    shell
}
