-- For a database that takes over orders from their stream: the payments of an order, and the orders whose title is not known yet.

-- A table that a backup reads cannot be changed, and later statements would wait behind this migration: it gives up soon,
-- and is tried again.
set local lock_timeout = '2s';

create index payments_of_order on payments (order_id);
create index orders_without_title on orders (ticket_id) where title = '';
