-- The rights of a service in the tables of the bus. By hand, as their owner: psql --set role=… --file grants.sql. A right
-- that is removed here is taken away from the previous release, which still serves: remove it one release later.
grant usage on schema bus to :"role";
grant select, insert, delete on bus.outbox to :"role";
grant select on sequence bus.outbox_id_seq to :"role";
grant select, insert, update (last_seq, stream_created_at, republishes, incarnation) on bus.relay to :"role";
grant select, insert, delete on bus.position to :"role";
grant update (floor) on bus.position to :"role";
grant select, insert, update, delete on bus.republish, bus.checkpoints, bus.recovery, bus.recovery_reads, bus.fills to :"role";
grant select, insert, update on bus.dead_letters, bus.read_positions to :"role";
grant select, insert, delete on bus.tasks to :"role";
grant update (status, due_at, attempts, error, updated_at) on bus.tasks to :"role";
-- to check whether the database is up to date, and which service owns it
grant select on bus._migrations, bus.service to :"role";
