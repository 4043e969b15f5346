-- Events that are committed and not yet published. A row lives here for milliseconds: the relay deletes it once its
-- event is in the stream, so the table stays tiny unless NATS is away.
create table bus.outbox (
    id           bigint generated always as identity primary key,
    stream       text   not null,
    subject      text   not null,
    aggregate_id text   not null,
    version      bigint not null,
    payload      text   not null,
    traceparent  text,
    created_at   timestamptz not null default clock_timestamp(),
    -- one event for one version
    unique (aggregate_id, version)
);

create index outbox_by_stream on bus.outbox (stream, id);

-- The row comes and goes with every event; without this the table would bloat between vacuums under load.
alter table bus.outbox set (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 10000);

-- One row per stream that this service owns: the lock that makes one replica the relay, and its position.
create table bus.relay (
    stream   text primary key,
    -- the sequence of the last message that is known to be in the stream
    last_seq bigint not null default 0
);

-- How an event enters the outbox. A function, so that a statement that writes a row can append its event in the same
-- round trip:  with row as (insert into … returning 1) select bus.append(…) from row
create function bus.append(
    stream text, subject text, aggregate_id text, version bigint, payload text, traceparent text
) returns void language sql volatile as $$
    insert into bus.outbox (stream, subject, aggregate_id, version, payload, traceparent)
    values (stream, subject, aggregate_id, version, payload, traceparent)
$$;
