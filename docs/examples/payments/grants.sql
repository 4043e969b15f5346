-- The rights of the service in its tables.
grant select, insert, update on order_replica to :"role";
grant select, insert, update (status, charge_id) on payments to :"role";
grant select on _sqlx_migrations to :"role";
