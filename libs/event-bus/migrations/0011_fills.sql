-- Replicas that fetch the current state from the owner of a stream.

-- What a reader fetches, oldest request first. A row stays for a day after its end, so that a command can report the outcome.
create table bus.fills (
    id         bigint generated always as identity primary key,
    stream     text   not null,
    consumer   text   not null,
    -- why, for the log
    reason     text   not null,
    -- whether rows become exactly those of the owner; otherwise only what is missing or older is written
    exact      boolean not null,
    -- the last aggregate that was looked at; text is compared byte by byte
    cursor     text collate "C" not null default '',
    -- how many aggregates the owner has, about; how many were looked at; how many were written, where known; how many the handler
    -- could not apply
    total      bigint,
    passed     bigint not null default 0,
    written    bigint not null default 0,
    failed     bigint not null default 0,
    requested_at timestamptz not null default now(),
    -- when a service has begun
    begun_at   timestamptz,
    finished_at timestamptz
);

-- A second request is the same as one that has not begun. One that has begun does not include it: it has passed some aggregates.
create unique index fills_not_begun on bus.fills (stream, consumer, exact) where begun_at is null;

create function bus.request_fill(wanted text, reader text, why text, exactly boolean) returns bigint
language sql volatile as $$
    delete from bus.fills
    where fills.stream = wanted and fills.consumer = reader and fills.finished_at < now() - interval '1 day';
    insert into bus.fills (stream, consumer, reason, exact) values (wanted, reader, why, exactly)
    on conflict (stream, consumer, exact) where begun_at is null do update set reason = excluded.reason
    returning fills.id
$$;
