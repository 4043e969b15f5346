-- What a service does with the tables of the bus. By hand: psql --set role=… --file grants.sql, as their owner. What is
-- taken out of here is taken away from the release before, which still serves then: leave it in for one release.
grant usage on schema bus to :"role";
grant select, insert, delete on bus.outbox to :"role";
grant select on sequence bus.outbox_id_seq to :"role";
grant select, insert, update (last_seq) on bus.relay to :"role";
grant select, insert, delete on bus.position to :"role";
grant update (floor) on bus.position to :"role";
grant select, insert, update on bus.dead_letters to :"role";
grant select, insert, delete on bus.tasks to :"role";
grant update (status, due_at, attempts, error, updated_at) on bus.tasks to :"role";
-- is the database up to date, and ours?
grant select on bus._migrations, bus.service to :"role";
