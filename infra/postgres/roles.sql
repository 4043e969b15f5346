-- Databases and roles. Each service has a database, a role that owns it and migrates it, and a role that the service runs as,
-- with only the rights that `migrate` grants. Run it with psql as a superuser. Running it again changes only passwords.
-- The images of Postgres run it on a new volume, from /docker-entrypoint-initdb.d.

\set ON_ERROR_STOP on

-- Passwords come from the environment, so they are in no file, no list of processes and no log of the server. A missing one is
-- a syntax error below.
set log_statement = 'none';
set log_min_duration_statement = -1;
set log_min_error_statement = 'panic';
\getenv tickets_owner_password TICKETS_OWNER_PASSWORD
\getenv tickets_password TICKETS_PASSWORD
\getenv orders_owner_password ORDERS_OWNER_PASSWORD
\getenv orders_password ORDERS_PASSWORD

select format('create role %I login', name)
from unnest(array['tickets_owner', 'tickets', 'orders_owner', 'orders']) as name
where not exists (select from pg_roles where rolname = name) \gexec

alter role tickets_owner password :'tickets_owner_password';
alter role tickets password :'tickets_password';
alter role orders_owner password :'orders_owner_password';
alter role orders password :'orders_password';

select format('create database %I owner %I', name, name || '_owner')
from unnest(array['tickets', 'orders']) as name
where not exists (select from pg_database where datname = name) \gexec

-- By default every role may connect to every database and create temporary tables there.
revoke all on database tickets, orders from public;
grant connect on database tickets to tickets;
grant connect on database orders to orders;

-- Limits for sessions by hand: no lock is held for ever, and no statement runs for ever. Services set the same limits for each
-- of their sessions, so they also hold where the roles were created otherwise.
select format('alter role %I set %s = %L', name, setting, value)
from unnest(array['tickets', 'orders']) as name,
     (values ('statement_timeout', '8s'), ('lock_timeout', '5s'), ('idle_in_transaction_session_timeout', '10s'))
         as limits (setting, value) \gexec
