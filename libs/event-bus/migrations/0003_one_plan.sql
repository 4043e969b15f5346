-- The statements of the relay have one possible plan, with any statistics, and never walk over rows that were published
-- before. A snapshot that is held open elsewhere (a backup, a report, a forgotten session) keeps the dead rows
-- of all tables, and a table that empties and fills has no true statistics.

-- A table that a backup reads cannot be changed, and later statements would wait behind this migration: it gives up soon,
-- and is tried again.
set local lock_timeout = '2s';

alter table bus.outbox
    -- The events of one transaction are published in one batch.
    add column transaction xid8 not null default pg_current_xact_id(),
    drop constraint outbox_pkey,
    -- what the relay asks for: a stream, from an id on
    add primary key (stream, id),
    drop constraint outbox_aggregate_id_version_key;

drop index bus.outbox_by_stream;

-- One event for one version. The first column is an expression, so that no statement of the relay can use this index. A
-- stream's name has no dot.
create unique index outbox_one_event_per_version on bus.outbox ((stream || '.' || aggregate_id), version);

-- How far each stream is published. The row in bus.relay is only locked: to update it would leave a dead version behind
-- for every batch, over which the next one has to walk. Here the newest row is at the end of the index.
create table bus.position (
    stream   text   not null,
    -- the sequence of the last message that is known to be in the stream
    last_seq bigint not null,
    -- The outbox holds no row with this id or a smaller one, and no transaction that is under way can add one.
    floor    bigint not null,
    primary key (stream, last_seq)
);

-- No relay of the release before registers in between.
lock table bus.relay in share row exclusive mode;
insert into bus.position (stream, last_seq, floor) select stream, last_seq, 0 from bus.relay;

-- bus.relay.last_seq sets a position: by hand, by the first relay of a stream, and by the release before this one, which
-- may relay at the same time.
create function bus.set_position() returns trigger language plpgsql
-- as the owner: the release before has no rights on bus.position
security definer set search_path = pg_catalog as $$
declare
    known bigint;
begin
    select coalesce(max(position.floor), 0) into known from bus.position where position.stream = new.stream;
    delete from bus.position where position.stream = new.stream;
    insert into bus.position (stream, last_seq, floor) values (new.stream, new.last_seq, known);
    return null;
end
$$;

create trigger set_position after insert or update of last_seq on bus.relay
    for each row execute function bus.set_position();

-- Makes the caller's transaction the relay of a stream, and returns its position. No row: another transaction is.
-- A function of two statements, because the second one must see what the holder before has committed.
create function bus.lock_stream(wanted text) returns table (last_seq bigint, floor bigint) language plpgsql volatile as $$
begin
    perform 1 from bus.relay where relay.stream = wanted for update skip locked;
    if found then
        return query
            select position.last_seq, position.floor from bus.position
            where position.stream = wanted order by position.last_seq desc limit 1;
        if not found then
            raise exception 'bus.position has no row for the stream %: update bus.relay to set one', wanted;
        end if;
    end if;
end
$$;

-- Closes the records of failed attempts that the events just applied make pointless: their own, and those of older
-- versions of the same aggregates. An event's own record is known by the position of its message: two messages may carry
-- the same id. The settings leave one possible plan, a lookup in dead_letters_open for each event.
create function bus.supersede(
    from_stream text, by_consumer text, aggregates text[], versions bigint[], seqs bigint[]
) returns void language sql volatile
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
    update bus.dead_letters as letter set status = 'superseded', updated_at = now()
    from unnest(aggregates, versions, seqs) as applied (aggregate_id, version, seq)
    where letter.consumer = by_consumer and letter.stream = from_stream
      and letter.aggregate_id = applied.aggregate_id and letter.status <> 'superseded'
      and (letter.version < applied.version
           or letter.version = applied.version and letter.seq = applied.seq and letter.status = 'retrying')
$$;

-- Which service's tables this database holds: another service must not add its own. One row.
create table bus.service (
    only_row boolean primary key default true check (only_row),
    name     text not null
);
