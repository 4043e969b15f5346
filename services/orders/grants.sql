-- The rights of the service in its tables. By hand, as their owner: psql --set role=orders --file grants.sql. A right that is
-- removed here is taken away from the previous release, which still serves: remove it one release later.
grant select, insert, update on orders, ticket_replica to :"role";
-- A rebuild of the copy deletes rows that the tickets service does not have.
grant delete on ticket_replica to :"role";
-- Only the refund of a payment changes.
grant select, insert, update (refund_due) on payments to :"role";
-- A database that is recovered withdraws orders that contradict what was published.
grant execute on function withdraw_orders(text[], text[], text[], bigint[]) to :"role";
-- to check whether the database is up to date
grant select on _sqlx_migrations to :"role";
