-- The last thing that was heard of the orders of a ticket: the number of the reservation, and the version of its order.
-- Only a greater pair changes anything; the pair that a ticket begins with is smaller than any.
alter table tickets
    add column reservation   bigint not null default 0,
    add column order_version bigint not null default -1;
