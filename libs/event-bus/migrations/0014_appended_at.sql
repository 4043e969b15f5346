-- When an event was appended, which the relay passes on in a header: readers measure their lag with it. A relay of the previous release
-- does not know the new column, and ignores it.

drop function bus.take_events(text, bigint, bigint, bigint, bigint);

-- Locks a stream for the caller's transaction, and returns its oldest events with ids above `above` and above the floor.
-- No row: another transaction holds the lock. A row without an id: no event waits.
create function bus.take_events(
    wanted text, above bigint, most_events bigint, most_bytes bigint, ahead bigint
) returns table (
    -- the position of the stream
    last_seq bigint, floor bigint,
    id bigint, subject text, event_id text, payload text, traceparent text, headers text, transaction bigint,
    -- whether the next `ahead` events contain one of the same transaction; whether more events wait
    continues boolean, more boolean,
    -- in microseconds since 1970
    appended_at bigint
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
               batch.transaction in (select behind.transaction from behind), coalesce(size.more, false),
               (extract(epoch from batch.created_at) * 1000000)::bigint
        from size left join batch on true;
end
$$;
