-- Events that could not be applied, kept whole for a person, and those that are still being retried.
create table bus.dead_letters (
    id           bigint generated always as identity primary key,
    stream       text   not null,
    consumer     text   not null,
    seq          bigint not null,
    -- a stream that was made anew counts from 1 again; the time of publishing tells its messages from the old ones
    published_at timestamptz not null,
    subject      text   not null,
    -- null where a message does not even look like an event of ours
    event_id     text,
    aggregate_id text,
    version      bigint,
    payload      bytea  not null,
    -- {"name": ["value", …]}; json, because jsonb refuses what a hostile header may hold
    headers      json   not null,
    error        text   not null,
    attempts     integer not null,
    -- retrying: will be delivered again · dead: waits for a person · superseded: a newer version of the same aggregate
    -- has been applied since, so nothing is missing
    status       text   not null check (status in ('retrying', 'dead', 'superseded')),
    created_at   timestamptz not null default now(),
    updated_at   timestamptz not null default now(),
    unique (consumer, stream, seq, published_at)
);

-- asked after every batch
create index dead_letters_open on bus.dead_letters (consumer, aggregate_id) where status <> 'superseded';
