use anyhow::{Context, Result, bail};
use std::fs::{File, TryLockError};
use std::io::{Read, Seek, Write};

/// A lock between processes of this machine. The kernel releases it when the process ends.
#[derive(Debug)]
pub struct Lock(#[expect(dead_code, reason = "it is held, not used")] File);

impl Lock {
    /// Takes the lock of this name. Fails if another process holds it, and names that process.
    ///
    /// The lock is for the machine, not for a checkout, as are the names of containers and volumes.
    pub fn take(name: &str) -> Result<Self> {
        let path = std::env::temp_dir().join(format!("{name}.lock"));
        let file = File::options().create(true).truncate(false).read(true).write(true).open(&path);
        let mut file = file.with_context(|| format!("cannot open {}", path.display()))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut pid = String::new();
                file.read_to_string(&mut pid)?;
                let pid = pid.trim();
                bail!("it is already running, as process {pid}; end that first: Ctrl-C in its terminal, or kill {pid}");
            }
            Err(TryLockError::Error(error)) => return Err(error).context(format!("cannot lock {}", path.display())),
        }
        file.set_len(0)?;
        file.rewind()?;
        writeln!(file, "{}", std::process::id())?;
        Ok(Self(file))
    }
}
