-- A step of the relay that publishes takes two round trips: `begin; select … from bus.take_events(…)`, and, after the events are published,
-- `select bus.move_on(…); commit`. The settings leave one possible plan, for the reason that migration 3 gives.

-- Locks a stream for the caller's transaction, and returns its oldest events with ids above `above` and above the floor.
-- No row: another transaction holds the lock. A row without an id: no event waits.
create function bus.take_events(
    wanted text, above bigint, most_events bigint, most_bytes bigint, ahead bigint
) returns table (
    -- the position of the stream
    last_seq bigint, floor bigint,
    id bigint, subject text, event_id text, payload text, traceparent text, headers text, transaction bigint,
    -- whether the next `ahead` events contain one of the same transaction; whether more events wait
    continues boolean, more boolean
) language plpgsql volatile
set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off as $$
#variable_conflict use_column
declare
    reached bus.position;
begin
    perform 1 from bus.relay where relay.stream = wanted for update skip locked;
    if not found then
        return;
    end if;
    -- A statement of its own, like the next one: it must see what the relay before has committed.
    select * into reached from bus.position as newest
    where newest.stream = wanted order by newest.last_seq desc limit 1;
    if not found then
        raise exception 'bus.position has no row for the stream %: update bus.relay to set one', wanted;
    end if;
    return query
        with measured as (
            select *, sum(octet_length(oldest.payload) + coalesce(octet_length(oldest.headers::text), 0))
                          over (order by oldest.id) as bytes,
                   row_number() over (order by oldest.id) as number, count(*) over () as waiting
            from (
                select * from bus.outbox
                where outbox.stream = wanted and outbox.id > greatest(above, reached.floor)
                order by outbox.id limit most_events + 1
            ) as oldest
        ), batch as materialized (
            select * from measured where number = 1 or bytes <= most_bytes and number <= most_events
        ), size as materialized (
            select max(id) as last, count(*) < max(waiting) as more from batch
        ), behind as materialized (
            select next.transaction from (
                select outbox.transaction from bus.outbox
                where outbox.stream = wanted and outbox.id > (select last from size)
                order by outbox.id limit case when (select more from size) then ahead else 0 end
            ) as next
        )
        select reached.last_seq, reached.floor, batch.id, batch.subject,
               batch.aggregate_id || '-' || batch.version, batch.payload, batch.traceparent, batch.headers::text,
               batch.transaction::text::bigint,
               batch.transaction in (select behind.transaction from behind), coalesce(size.more, false)
        from size left join batch on true;
end
$$;

-- Deletes published events, and moves the position of their stream from `from_seq` to `to_seq`. `ids` are in ascending order.
create function bus.move_on(wanted text, from_seq bigint, to_seq bigint, proven bigint, ids bigint[]) returns void
language plpgsql volatile
set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off as $$
begin
    -- The range bounds the scan. The ids are needed too: a row of the range may have been committed since.
    delete from bus.outbox
    where stream = wanted and id between ids[1] and ids[cardinality(ids)] and id = any(ids);
    delete from bus.position where stream = wanted and last_seq = from_seq;
    insert into bus.position (stream, last_seq, floor) values (wanted, to_seq, proven);
    -- Relays of the release before migration 3 may run during an update, and read at most 4096 messages to catch up. More
    -- frequent updates would leave more dead row versions.
    if from_seq / 2000 <> to_seq / 2000 then
        update bus.relay set last_seq = to_seq where stream = wanted;
    end if;
end
$$;

-- The functions with which events enter the outbox also set a variable of the transaction, which the library reads when it commits:
-- only then does it wake the relays.
create or replace function bus.append(
    stream text, subject text, aggregate_id text, version bigint, payload text, traceparent text
) returns void language sql volatile as $$
    insert into bus.outbox (stream, subject, aggregate_id, version, payload, traceparent)
    values (stream, subject, aggregate_id, version, payload, traceparent);
    select set_config('bus.appended', 'yes', true)
$$;

create or replace function bus.append(
    stream text, subject text, aggregate_id text, version bigint, payload text, traceparent text, headers json
) returns void language sql volatile as $$
    insert into bus.outbox (stream, subject, aggregate_id, version, payload, traceparent, headers)
    values (stream, subject, aggregate_id, version, payload, traceparent, headers);
    select set_config('bus.appended', 'yes', true)
$$;

create or replace function bus.append_all(
    stream text, subjects text[], aggregate_ids text[], versions bigint[], payloads text[], traceparents text[],
    headers text[]
) returns void language sql volatile as $$
    insert into bus.outbox (stream, subject, aggregate_id, version, payload, traceparent, headers)
    select stream, subject, aggregate_id, version, payload, traceparent, header::json
    from unnest(subjects, aggregate_ids, versions, payloads, traceparents, headers) with ordinality
         as events (subject, aggregate_id, version, payload, traceparent, header, number)
    order by number;
    select set_config('bus.appended', 'yes', true)
$$;
