-- What the service does with its tables. By hand: psql --set role=tickets --file grants.sql, as their owner. What is
-- taken out of here is taken away from the release before, which still serves then: leave it in for one release.
grant select, insert, update on tickets to :"role";
-- is the database up to date?
grant select on _sqlx_migrations to :"role";
