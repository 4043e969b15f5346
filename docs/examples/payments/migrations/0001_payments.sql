-- What payments knows about orders: written from the events of the orders service, and by nothing else.
create table order_replica (
    id      text collate "C" primary key,
    user_id text          not null,
    status  text          not null,
    price   numeric(14,4) not null,
    version bigint        not null
);

create table payments (
    id         text collate "C" primary key,
    order_id   text collate "C" not null,
    user_id    text not null,
    -- numbers the payments of an order from 0; all but the last are declined
    number     bigint not null,
    status     text not null default 'pending' check (status in ('pending', 'charged', 'declined')),
    -- the provider's name for the charge
    charge_id  text unique,
    created_at timestamptz not null default now(),
    unique (order_id, number),
    check ((status = 'charged') = (charge_id is not null))
);

-- An order is paid once: this index refuses a second payment while one is pending or charged.
create unique index payments_one_per_order on payments (order_id) where status <> 'declined';
