-- Headers of the application, and checks of what an event may be: one that NATS refuses would block its stream.

-- A table that a backup reads cannot be changed, and later statements would wait behind this migration: it gives up soon,
-- and is tried again.
set local lock_timeout = '2s';

-- Whether headers can travel: {"name": "value"}, names of letters, digits and hyphens that neither NATS nor the bus uses,
-- values without control characters. The same rules as those of the library.
create function bus.are_headers(headers json) returns boolean language sql immutable as $$
    select case when json_typeof(headers) = 'object' then not exists (
        select 1 from json_each(headers) as header (name, value)
        where json_typeof(value) <> 'string'
           or name !~ '^[A-Za-z0-9-]{1,200}$' or name ~* '^(nats-.*|traceparent)$'
           or octet_length(value #>> '{}') > 1000 or (value #>> '{}') ~ '[\u0001-\u001f\u007f-\u009f]'
    ) else false end
$$;

alter table bus.outbox
    -- {"name": "value"}; null: none
    add column headers json,
    -- Not valid: rows that are waiting are not checked. A pattern that searches for what is not allowed is far cheaper than
    -- one that has a count.
    add constraint version_counts_from_zero check (version >= 0) not valid,
    add constraint subject_is_visible_ascii 
        check (octet_length(subject) between 1 and 200 and subject collate "C" !~ '[^!-)+-=?-~]') not valid,
    -- It becomes a part of a header of NATS and of an index.
    add constraint aggregate_id_is_short_visible_ascii 
        check (octet_length(aggregate_id) between 1 and 200 and aggregate_id collate "C" !~ '[^!-~]') not valid,
    add constraint traceparent_is_visible_ascii 
        check (octet_length(traceparent) between 1 and 100 and traceparent collate "C" !~ '[^!-~]') not valid,
    add constraint headers_can_travel check (headers is null or bus.are_headers(headers)) not valid,
    -- A message of NATS may have a megabyte.
    add constraint event_fits_into_a_message
        check (octet_length(payload) <= 1000000 and coalesce(octet_length(headers::text), 0) <= 16000) not valid;

-- bus.append with headers. The one without stays, for statements that have none.
create function bus.append(
    stream text, subject text, aggregate_id text, version bigint, payload text, traceparent text, headers json
) returns void language sql volatile as $$
    insert into bus.outbox (stream, subject, aggregate_id, version, payload, traceparent, headers)
    values (stream, subject, aggregate_id, version, payload, traceparent, headers)
$$;
