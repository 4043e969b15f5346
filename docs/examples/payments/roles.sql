-- The database of payments, the role that owns and migrates it, and the role that the service runs as. For development:
-- choose other passwords.
create role payments_owner login password 'payments_owner';
create role payments login password 'payments';
create database payments owner payments_owner;
revoke all on database payments from public;
grant connect on database payments to payments;
