//! The tables of a service and of its bus, and the rights of the service in them.
//!
//! A service that runs as the owner of the database migrates it by itself. In production the owner migrates beforehand
//! ([`migrate`]), and the service runs as a role with least privilege.

use crate::copy::Registered;
use crate::error::{Error, is_outage};
use crate::postgres;
use crate::retry::patiently;
use anyhow::{Context, bail, ensure};
use sqlx::error::DatabaseError;
use sqlx::migrate::{Migrate, MigrateError, Migrator};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, PgPool};
use std::time::Duration;
use tokio::time::timeout;

/// The rights of a service in the tables of the bus.
const GRANTS: &str = include_str!("../grants.sql");

/// The tables of a service and of its bus.
#[derive(Debug)]
pub struct Schema {
    /// The service that owns the tables.
    service: &'static str,
    /// The migrations of the bus, then those of the service.
    migrations: [Migrator; 2],
    /// In the same order.
    grants: [&'static str; 2],
    /// Tables that are replicas.
    replicas: Vec<Registered>,
}

impl Schema {
    /// The tables of `service`. A database with the tables of another service is refused.
    ///
    /// `grants` are all rights of the service's role in its tables: statements for psql, in which the role is
    /// `:"role"`.
    pub fn new(service: &'static str, migrations: Migrator, grants: &'static str) -> Self {
        Self {
            service,
            migrations: [sqlx::migrate!(), migrations].map(tolerant),
            grants: [GRANTS, grants],
            replicas: Vec::new(),
        }
    }

    /// The same, with a replica.
    #[must_use]
    pub(crate) fn with(mut self, replica: Registered) -> Self {
        self.replicas.push(replica);
        self
    }

    /// Whether it has a replica.
    pub fn has_replica(&self) -> bool {
        !self.replicas.is_empty()
    }

    pub(crate) fn replicas(&self) -> &[Registered] {
        &self.replicas
    }

    pub(crate) fn service(&self) -> &'static str {
        self.service
    }

    /// Migrates the tables if they are not up to date. Safe to call from several replicas at once.
    pub(crate) async fn prepare(&self, options: &PgConnectOptions) -> anyhow::Result<()> {
        let db = single(options.clone());
        let prepared = async {
            let lock = sqlx::query_scalar!("select pg_try_advisory_lock_shared(hashtext('migrate')) as \"free!\"");
            ensure!(lock.fetch_one(&db).await?, "another process is migrating the database");
            self.prepare_on(&db).await
        };
        let prepared = prepared.await;
        db.close().await;
        prepared
    }

    async fn prepare_on(&self, db: &PgPool) -> anyhow::Result<()> {
        self.belongs_here(db).await?;
        for migrations in &self.migrations {
            // Checked first, because the role of a service may not migrate.
            if !is_current(migrations, db).await? {
                migrations.run(db).await.map_err(advise)?;
            }
        }
        if self.owner(db).await?.is_none() {
            let claim = sqlx::query!("insert into bus.service (name) values ($1) on conflict do nothing", self.service);
            claim.execute(db).await.map_err(|error| advise(MigrateError::Execute(error)))?;
        }
        // Checked again: another service may have claimed the database at the same time.
        self.belongs_here(db).await
    }

    /// Refuses a database with the tables of another service.
    pub(crate) async fn belongs_here(&self, db: &PgPool) -> anyhow::Result<()> {
        let (ours, owner) = (self.service, self.owner(db).await?);
        match owner {
            Some(owner) if owner != ours => bail!(
                "the database holds the tables of the service {owner}, and this is {ours}: check database_url, and which \
                 image or binary is started as {ours}"
            ),
            _ => Ok(()),
        }
    }

    /// The service that owns the tables of the database, if there is one.
    async fn owner(&self, db: &PgPool) -> anyhow::Result<Option<String>> {
        match sqlx::query_scalar!("select name from bus.service").fetch_optional(db).await {
            Err(sqlx::Error::Database(error)) if is_missing(&*error) => Ok(None),
            owner => Ok(owner?),
        }
    }

    /// Gives `role` the rights of the service, and no others. The tables have to be up to date.
    async fn grant(&self, db: &PgPool, role: &str) -> anyhow::Result<()> {
        let role = format!("\"{}\"", role.replace('"', "\"\""));
        let grants = self.grants.concat().replace(":\"role\"", &role);
        let mut tx = db.begin().await?;
        for sql in [format!("revoke all on all tables in schema public, bus from {role}"), grants] {
            #[expect(clippy::disallowed_methods, reason = "a role cannot be a parameter of a prepared query")]
            sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut *tx).await?;
        }
        Ok(tx.commit().await?)
    }
}

/// Migrates the database at `url`, as the role of that URL, which has to own it.
///
/// Then `role`, if there is one, gets the rights of the service, and no others. Idempotent.
///
/// # Errors
/// Postgres was away for all of `patience`; or it refused a statement.
pub async fn migrate(url: &str, schema: &Schema, role: Option<&str>, patience: Duration) -> anyhow::Result<()> {
    let options = postgres::options(url, "migrate")?;
    let migrate = async || {
        // Without a pool, which would not report why it cannot connect.
        let there =
            timeout(postgres::OPEN, options.connect()).await.map_err(|_| Error::NoConnection(postgres::OPEN))?;
        there.context("cannot connect to Postgres")?.close().await?;
        let db = single(options.clone());
        let migrated = async {
            // Held until this connection closes: services also wait for the grants, and Postgres refuses concurrent
            // grants.
            sqlx::query!("select pg_advisory_lock(hashtext('migrate'))").execute(&db).await?;
            schema.prepare_on(&db).await?;
            match role {
                Some(role) => schema.grant(&db, role).await.with_context(|| format!("granting to {role}")),
                None => Ok(()),
            }
        };
        let migrated = migrated.await;
        db.close().await;
        migrated
    };
    patiently(patience, "migrating", is_outage, migrate).await
}

/// A pool of one connection, on which statements have no time limit. Close it also after an error: a migration that
/// fails keeps its advisory lock, which blocks all other migrations, until the connection closes.
fn single(options: PgConnectOptions) -> PgPool {
    let patient = options.options([("statement_timeout", "0"), ("lock_timeout", "0")]);
    PgPoolOptions::new().max_connections(1).acquire_timeout(postgres::OPEN).connect_lazy_with(patient)
}

/// Whether all `wanted` migrations are applied, with the same checksums.
async fn is_current(wanted: &Migrator, db: &PgPool) -> anyhow::Result<bool> {
    let applied = match db.acquire().await?.list_applied_migrations(&wanted.table_name).await {
        Ok(applied) => applied,
        Err(MigrateError::Execute(sqlx::Error::Database(error))) if is_missing(&*error) => return Ok(false),
        Err(error) => return Err(error.into()),
    };
    let is_applied = |wanted: &sqlx::migrate::Migration| {
        applied.iter().any(|applied| (applied.version, &applied.checksum) == (wanted.version, &wanted.checksum))
    };
    Ok(wanted.iter().all(is_applied))
}

/// Whether the table or the schema does not exist, or the role may not see it.
fn is_missing(error: &dyn DatabaseError) -> bool {
    error.code().is_some_and(|code| code.starts_with("42"))
}

fn advise(error: MigrateError) -> anyhow::Error {
    const INSUFFICIENT_PRIVILEGE: &str = "42501";
    if let MigrateError::VersionMismatch(_) = error {
        return anyhow::Error::new(error).context(
            "the database holds tables of other migrations: those of another service, or of a changed release; \
             check database_url",
        );
    }
    let refused = match &error {
        MigrateError::Execute(sqlx::Error::Database(cause))
        | MigrateError::ExecuteMigration(sqlx::Error::Database(cause), _) => {
            cause.code().as_deref() == Some(INSUFFICIENT_PRIVILEGE)
        }
        _ => false,
    };
    let error = anyhow::Error::new(error);
    if refused {
        error.context("the database is not up to date: run the service's command `migrate` as its owner")
    } else {
        error
    }
}

/// Accepts unknown migrations: in a rolling update the previous release may start after the new one has migrated.
fn tolerant(mut migrations: Migrator) -> Migrator {
    migrations.set_ignore_missing(true);
    migrations
}
