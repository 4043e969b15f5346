-- What the service does with its tables. By hand: psql --set role=orders --file grants.sql, as their owner.
grant select, insert, update on orders, ticket_replica to :"role";
-- A payment is what it is.
grant select, insert, update (refund_due) on payments to :"role";
-- is the database up to date?
grant select on _sqlx_migrations to :"role";
