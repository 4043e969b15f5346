//! A managed Postgres: with TLS, without roles and databases of this system.

use crate::authority::Authority;
use crate::blocks::outcome;
use anyhow::Result;
use std::path::Path;
use std::time::Duration;
use testkit::images::{self, Image};
use testkit::{Reaper, eventually_within, free_port};
use tokio::process::Command;

pub const PASSWORD: &str = "of-the-superuser";

const READY_WITHIN: Duration = Duration::from_mins(1);

pub struct TlsPostgres {
    /// `host:port`
    pub address: String,
    id: String,
    _reaper: Reaper,
}

/// Makes the server refuse connections that are not encrypted.
const ENCRYPT: &str = r#"
cp /docker-entrypoint-initdb.d/server.crt /docker-entrypoint-initdb.d/server.key "$PGDATA"
chmod 600 "$PGDATA/server.key"
echo "ssl = on" >>"$PGDATA/postgresql.conf"
sed -i "s/^host all all all/hostssl all all all/" "$PGDATA/pg_hba.conf"
"#;

impl TlsPostgres {
    pub async fn start(directory: &Path, authority: &Authority) -> Result<Self> {
        images::ensure(Image::Postgres).await?;
        let init = directory.join("init");
        std::fs::create_dir_all(&init)?;
        std::fs::write(init.join("encrypt.sh"), ENCRYPT)?;
        std::fs::write(init.join("server.crt"), &authority.certificate)?;
        std::fs::write(init.join("server.key"), &authority.key)?;
        let (name, tag) = Image::Postgres.name();
        let address = format!("127.0.0.1:{}", free_port());
        let mut docker = Command::new("docker");
        docker.args(["run", "--detach", "--publish", &format!("{address}:5432")]);
        docker.args(["--volume", &format!("{}:/docker-entrypoint-initdb.d:ro", init.display())]);
        docker.args(["--env", &format!("POSTGRES_PASSWORD={PASSWORD}"), &format!("{name}:{tag}")]);
        let id = outcome(&mut docker).await?.trim().to_owned();
        let reaper = Reaper::watch(["docker", "rm", "--force", "--volumes", &id])?;
        let postgres = Self { address, id, _reaper: reaper };
        let ready = ["exec", &postgres.id, "pg_isready", "--quiet", "--host=127.0.0.1"];
        eventually_within(READY_WITHIN, "Postgres to answer", async || {
            outcome(Command::new("docker").args(ready)).await
        })
        .await?;
        Ok(postgres)
    }
}

impl Drop for TlsPostgres {
    fn drop(&mut self) {
        let remove = ["rm", "--force", "--volumes", &self.id];
        let _ = std::process::Command::new("docker").args(remove).output();
    }
}
