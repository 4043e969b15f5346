-- Headers of the application, and what an aggregate id may be, now that it is the service's own text.

-- A table that a backup reads cannot be changed, and later statements would wait behind this migration: it gives up soon,
-- and is tried again.
set local lock_timeout = '2s';

alter table bus.outbox
    -- {"name": "value"}; null: none
    add column headers json,
    -- It becomes a part of a header of NATS and of an index.
    add constraint aggregate_id_is_short_visible_ascii check (aggregate_id collate "C" ~ '^[!-~]{1,200}$');

-- bus.append with headers. The one without stays, for statements that have none.
create function bus.append(
    stream text, subject text, aggregate_id text, version bigint, payload text, traceparent text, headers json
) returns void language sql volatile as $$
    insert into bus.outbox (stream, subject, aggregate_id, version, payload, traceparent, headers)
    values (stream, subject, aggregate_id, version, payload, traceparent, headers)
$$;
