create table orders (
    -- 24 hex digits; compared byte by byte, so that the order of ids is the order of creation in every locale
    id             text collate "C" primary key check (char_length(id) = 24),
    -- whoever the token named; opaque to us
    user_id        text          not null,
    status         text          not null check (status in ('created', 'awaiting:payment', 'complete', 'cancelled')),
    -- until when it must be paid
    expires_at     timestamptz   not null,
    -- what was ordered, as it was when it was ordered
    ticket_id      text collate "C" not null,
    title          text          not null,
    price          numeric(14,4) not null,
    ticket_version bigint        not null,
    -- numbers the orders of this ticket: 1, 2, 3 …
    reservation    bigint        not null check (reservation > 0),
    -- rises by one with every change of the status
    version        bigint        not null,
    created_at     timestamptz   not null default now(),
    updated_at     timestamptz   not null default now(),
    unique (ticket_id, reservation)
);

-- What keeps a ticket from being sold twice.
create unique index one_live_order_per_ticket on orders (ticket_id) where status <> 'cancelled';

-- for a user's list
create index orders_of_user on orders (user_id, id);

-- for the search for what has expired
create index orders_unpaid on orders (expires_at) where status = 'created';

-- What was paid, whoever took the payment. One that could not complete its order waits for somebody to pay it back.
create table payments (
    id         text collate "C" primary key,
    order_id   text collate "C" not null references orders (id),
    -- the payment provider's name for it
    stripe_id  text        not null,
    refund_due boolean     not null default false,
    created_at timestamptz not null default now()
);

create index payments_to_refund on payments (created_at) where refund_due;
