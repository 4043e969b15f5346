use crate::container::{Container, Probe};
use crate::images::Image;
use crate::port::free_port;
use anyhow::{Context, Result, ensure};
use futures::FutureExt;
use futures::future::BoxFuture;
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
use std::ops::Deref;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Weak};
use testcontainers::core::Mount;
use testcontainers::{ContainerRequest, GenericImage, ImageExt};
use tokio::sync::Mutex;

/// The superuser. The password of every role is its name: only this machine can reach the server.
const USER: &str = "postgres";
const PORT: u16 = 5432;

/// Creates the databases and the roles.
const ROLES: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../infra/postgres/roles.sql"));

/// One hash instead of 4096. These passwords are public, and the hashes take an unoptimised build 20 ms of CPU per connection:
/// services that open all their connections at the start would keep the machine busy.
const QUICK_LOGIN: &str = "-c scram_iterations=16";

/// Postgres as in production, with 300 connections and the extension `pg_stat_statements`.
///
/// Every commit is on disk before it is acknowledged. Databases and roles are those of `infra/postgres/roles.sql`.
#[derive(Debug)]
pub struct Postgres {
    container: Container,
    port: u16,
    databases: AtomicU32,
}

impl Postgres {
    /// Starts a server for one test that stops, kills or freezes it.
    pub async fn start() -> Result<Self> {
        Self::start_with(free_port(), |request| request).await
    }

    /// Starts a server with a fixed container name. Its data stays in the volume of the same name.
    pub async fn start_named(name: &str, port: u16) -> Result<Self> {
        Self::start_with(port, |request| {
            request.with_container_name(name).with_mount(Mount::volume_mount(name, "/var/lib/postgresql"))
        })
        .await
    }

    /// The server that the tests of this process share. It is removed when the last reference is dropped.
    ///
    /// Do not stop or freeze it: other tests use it.
    pub async fn shared() -> Result<Arc<Self>> {
        // A weak reference: Rust never drops the value of a static.
        static SHARED: Mutex<Weak<Postgres>> = Mutex::const_new(Weak::new());
        let mut shared = SHARED.lock().await;
        if let Some(postgres) = shared.upgrade() {
            return Ok(postgres);
        }
        let postgres = Arc::new(Self::start().await?);
        *shared = Arc::downgrade(&postgres);
        Ok(postgres)
    }

    async fn start_with(
        port: u16,
        configure: impl FnOnce(ContainerRequest<GenericImage>) -> ContainerRequest<GenericImage>,
    ) -> Result<Self> {
        let probe = Superuser { url: url(port, USER, USER) };
        let container = Container::start(Image::Postgres, &[(port, PORT)], probe, |request| {
            let mut request = request
                .with_env_var("POSTGRES_PASSWORD", USER)
                .with_env_var("POSTGRES_INITDB_ARGS", QUICK_LOGIN)
                .with_copy_to("/docker-entrypoint-initdb.d/roles.sql", ROLES.as_bytes().to_vec())
                .with_cmd(["-c", "max_connections=300", "-c", "shared_preload_libraries=pg_stat_statements"]);
            for (variable, password) in passwords() {
                request = request.with_env_var(variable, password);
            }
            configure(request)
        })
        .await?;
        Ok(Self { container, port, databases: AtomicU32::default() })
    }

    /// Creates an empty database with a unique name, and returns its URL. `hint` makes the name readable.
    pub async fn database(&self, hint: &str) -> Result<String> {
        let name = format!("{hint}_{}", self.databases.fetch_add(1, Ordering::Relaxed));
        self.execute(format!(r#"create database "{name}""#), hint).await?;
        Ok(url(self.port, USER, &name))
    }

    /// The URL of a database for this role of `roles.sql`, or for `postgres`, the superuser.
    pub fn url(&self, role: &str, database: &str) -> String {
        url(self.port, role, database)
    }

    async fn execute(&self, sql: String, name: &str) -> Result<()> {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
        ensure!(name.chars().all(plain), "{name:?} is not a plain name");
        let mut db = PgConnection::connect(&url(self.port, USER, USER)).await?;
        // The name was checked above.
        db.execute(AssertSqlSafe(sql.clone())).await.context(sql)?;
        Ok(db.close().await?)
    }
}

impl Deref for Postgres {
    type Target = Container;

    fn deref(&self) -> &Container {
        &self.container
    }
}

fn url(port: u16, role: &str, database: &str) -> String {
    format!("postgres://{role}:{role}@127.0.0.1:{port}/{database}")
}

/// The variables that `roles.sql` reads. The value of `SOME_ROLE_PASSWORD` is `some_role`.
fn passwords() -> impl Iterator<Item = (&'static str, String)> {
    let variables = ROLES.lines().filter_map(|line| Some(line.strip_prefix("\\getenv ")?.split_once(' ')?.1));
    variables.map(|variable| (variable, variable.trim_end_matches("_PASSWORD").to_lowercase()))
}

#[derive(Debug)]
struct Superuser {
    url: String,
}

impl Probe for Superuser {
    fn answers(&self) -> BoxFuture<'_, Result<()>> {
        async {
            let mut db = PgConnection::connect(&self.url).await?;
            db.execute("select 1").await?;
            Ok(db.close().await?)
        }
        .boxed()
    }
}
