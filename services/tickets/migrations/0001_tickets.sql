create table tickets (
    -- 24 hex digits; compared byte by byte, so that the order of ids is the order of creation in every locale
    id         text collate "C" primary key check (char_length(id) = 24),
    title      text          not null check (title <> ''),
    price      numeric(14,4) not null check (price > 0),
    -- whoever the token named; opaque to us
    user_id    text          not null,
    -- rises by one with every saved change
    version    bigint        not null,
    -- the order that holds the ticket, if one does
    order_id   text collate "C",
    created_at timestamptz   not null default now(),
    updated_at timestamptz   not null default now()
);

-- for the list, which shows what can be bought
create index tickets_unreserved on tickets (id) where order_id is null;
