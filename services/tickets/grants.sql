-- The rights of the service in its tables. By hand, as their owner: psql --set role=tickets --file grants.sql. A right that is
-- removed here is taken away from the previous release, which still serves: remove it one release later.
grant select, insert, update on tickets to :"role";
-- to check whether the database is up to date
grant select on _sqlx_migrations to :"role";
