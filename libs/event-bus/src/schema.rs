//! The tables of a service in its database, those of the bus among them, and who may do what with them.
//!
//! A service that runs as the owner of the database migrates it by itself. In production the owner migrates beforehand
//! ([`migrate`]), and the service runs as a role with least privilege.

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

/// What the bus lets the role of a service do.
const GRANTS: &str = include_str!("../grants.sql");

/// The tables of a service and of its bus.
#[derive(Debug)]
pub struct Schema {
    /// Whose tables these are.
    service: &'static str,
    /// Those of the bus, then those of the service.
    migrations: [Migrator; 2],
    /// In the same order.
    grants: [&'static str; 2],
}

impl Schema {
    /// `service` is the service's name: a database that holds the tables of another one is refused. `grants` says what the
    /// role that the service runs as may do with its tables, and is all that it may do: statements for psql, in which the
    /// role is `:"role"`.
    pub fn new(service: &'static str, migrations: Migrator, grants: &'static str) -> Self {
        Self { service, migrations: [sqlx::migrate!(), migrations].map(tolerant), grants: [GRANTS, grants] }
    }

    /// Brings the tables up to date, if they are not. Replicas may do it at once.
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
            // Asked first, because the role of a service can do no more than ask.
            if !is_current(migrations, db).await? {
                migrations.run(db).await.map_err(advise)?;
            }
        }
        if self.owner(db).await?.is_none() {
            let claim = sqlx::query!("insert into bus.service (name) values ($1) on conflict do nothing", self.service);
            claim.execute(db).await.map_err(|error| advise(MigrateError::Execute(error)))?;
        }
        // Replicas may do this at once, and so may another service.
        self.belongs_here(db).await
    }

    /// Refuses a database that holds the tables of another service.
    async fn belongs_here(&self, db: &PgPool) -> anyhow::Result<()> {
        let (ours, owner) = (self.service, self.owner(db).await?);
        match owner {
            Some(owner) if owner != ours => bail!(
                "the database holds the tables of the service {owner}, and this is {ours}: check database_url, and which \
                 image or binary is started as {ours}"
            ),
            _ => Ok(()),
        }
    }

    /// The service whose tables the database holds, if that is known.
    async fn owner(&self, db: &PgPool) -> anyhow::Result<Option<String>> {
        match sqlx::query_scalar!("select name from bus.service").fetch_optional(db).await {
            Err(sqlx::Error::Database(error)) if is_missing(&*error) => Ok(None),
            owner => Ok(owner?),
        }
    }

    /// The tables have to be up to date.
    async fn grant(&self, db: &PgPool, role: &str) -> anyhow::Result<()> {
        let role = format!("\"{}\"", role.replace('"', "\"\""));
        let grants = self.grants.concat().replace(":\"role\"", &role);
        let mut tx = db.begin().await?;
        for sql in [format!("revoke all on all tables in schema public, bus from {role}"), grants] {
            #[expect(clippy::disallowed_methods, reason = "no query can be prepared that has a role in it")]
            sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut *tx).await?;
        }
        Ok(tx.commit().await?)
    }
}

/// Brings the database at `url` up to date, as the role of that URL, which has to own it. Then `role`, if there is one,
/// may do what the service does, and no more. Doing it again changes nothing.
///
/// # Errors
/// Postgres was away for all of `patience`; or it refused.
pub async fn migrate(url: &str, schema: &Schema, role: Option<&str>, patience: Duration) -> anyhow::Result<()> {
    let options = postgres::options(url, "migrate")?;
    let migrate = async || {
        // A pool would keep the reason to itself.
        let there =
            timeout(postgres::OPEN, options.connect()).await.map_err(|_| Error::NoConnection(postgres::OPEN))?;
        there.context("cannot connect to Postgres")?.close().await?;
        let db = single(options.clone());
        let migrated = async {
            // Held until this connection ends: services wait for the grants as well, and Postgres refuses concurrent
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

/// A single connection, on which a statement may take as long as it needs. To be closed however things end: a migration
/// that fails leaves its advisory lock behind, which blocks all other migrations.
fn single(options: PgConnectOptions) -> PgPool {
    let patient = options.options([("statement_timeout", "0"), ("lock_timeout", "0")]);
    PgPoolOptions::new().max_connections(1).acquire_timeout(postgres::OPEN).connect_lazy_with(patient)
}

/// Whether all of `wanted` have been applied, and are what was applied.
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

/// There is no such table, or no such schema, or none that we may see.
fn is_missing(error: &dyn DatabaseError) -> bool {
    error.code().is_some_and(|code| code.starts_with("42"))
}

fn advise(error: MigrateError) -> anyhow::Error {
    const INSUFFICIENT_PRIVILEGE: &str = "42501";
    if let MigrateError::VersionMismatch(_) = error {
        return anyhow::Error::new(error).context(
            "the database holds tables that other migrations have made, of another service or of a changed release: \
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

/// During a rolling update an older version of the service starts on a database that a newer one has migrated already.
fn tolerant(mut migrations: Migrator) -> Migrator {
    migrations.set_ignore_missing(true);
    migrations
}
