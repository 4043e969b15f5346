-- Databases and roles: for each service a database, the role that owns it and migrates, and the role that it runs as, which
-- can do what `migrate` grants it and nothing more. For psql, as a superuser; doing it again changes nothing but passwords.
-- The images of Postgres run it on a new volume, from /docker-entrypoint-initdb.d.

\set ON_ERROR_STOP on

-- Passwords are those of the environment, so that they are in no file and in no list of processes; and in no log of the server.
-- One that is missing is a syntax error below.
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

-- By default everybody may connect to every database, and fill its disk with temporary tables.
revoke all on database tickets, orders from public;
grant connect on database tickets to tickets;
grant connect on database orders to orders;

-- What a session that was forgotten, or written by hand, cannot do: hold a lock for ever, or keep a processor busy. Services
-- set the same for every session of theirs, also where somebody else has made the roles.
select format('alter role %I set %s = %L', name, setting, value)
from unnest(array['tickets', 'orders']) as name,
     (values ('statement_timeout', '8s'), ('lock_timeout', '5s'), ('idle_in_transaction_session_timeout', '10s'))
         as limits (setting, value) \gexec
