-- What the service does with its tables. By hand: psql --set role=tickets --file grants.sql, as their owner.
grant select, insert, update on tickets to :"role";
-- is the database up to date?
grant select on _sqlx_migrations to :"role";
