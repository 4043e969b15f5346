-- Lists are in order of creation. An id begins with the clock of the process that made it, and clocks jump, so Postgres
-- numbers the rows. The rows that exist are numbered in the order of their ids, which was the order of the list before.
--
-- The table is locked until the end of this migration: requests wait meanwhile. The release before inserts without the
-- column, and goes on working.
-- A table that a backup reads cannot be changed, and later statements would wait behind this migration: it gives up soon,
-- and is tried again.
set local lock_timeout = '2s';

alter table orders add column number bigint;
update orders set number = numbered.number
from (select id, row_number() over (order by id) as number from orders) as numbered
where orders.id = numbered.id;
alter table orders alter column number set not null;
alter table orders alter column number add generated always as identity;
select setval(pg_get_serial_sequence('orders', 'number'), count(*) + 1, false) from orders;

-- for a user's list
drop index orders_of_user;
create index orders_of_user on orders (user_id, number);
