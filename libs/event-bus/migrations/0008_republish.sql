-- The broker comes back with less: which stream a position belongs to, and what the owner publishes again.

-- A table that a backup reads cannot be changed, and later statements would wait behind this migration: it gives up soon,
-- and is tried again.
set local lock_timeout = '2s';

alter table bus.relay
    -- When the stream was created, by the clock of the broker: a stream that is deleted and created again is a new stream. Null:
    -- the next relay takes over what the broker says.
    add column stream_created_at timestamptz,
    -- whether the service publishes snapshots of its tables on request
    add column republishes boolean not null default false;

-- Snapshots that are to be published again, oldest request first. A row is deleted together with its last page.
create table bus.republish (
    id         bigint generated always as identity primary key,
    stream     text   not null,
    -- why, for the log
    reason     text   not null,
    -- only aggregates that have changed since; null: all
    since      timestamptz,
    -- only these aggregates, in ascending order; null: all
    ids        text[],
    -- not before the stream has reached this position
    after_seq  bigint not null default 0,
    -- seconds after that position was reached: what was published before it must have left the deduplication window
    delay      double precision not null default 0,
    -- the last aggregate that was looked at; text is compared byte by byte
    cursor     text collate "C" not null default '',
    -- the last aggregate that is looked at; known when the request has begun
    until      text collate "C",
    -- how many aggregates there are, about; how many were looked at; how many events were appended
    total      bigint,
    passed     bigint not null default 0,
    appended   bigint not null default 0,
    requested_at timestamptz not null default now(),
    -- when a service has seen it
    begun_at   timestamptz
);

-- Positions at which everything was published: all later messages announce changes after `changed_after`, by the clock of this
-- database. Not true of snapshots that are published again, so there is none while a request exists.
create table bus.checkpoints (
    stream        text   not null,
    last_seq      bigint not null,
    changed_after timestamptz not null,
    primary key (stream, last_seq)
);

-- Requests to publish the current snapshots of a stream again. Requests for the same position that this one includes are deleted:
-- the new one begins from the beginning.
create function bus.request_republish(
    wanted text, why text, changed_since timestamptz, only_ids text[], not_before bigint, later double precision
) returns bigint language plpgsql volatile as $$
declare
    request bigint;
begin
    -- The lock of the relay: no relay writes a checkpoint at the same time.
    perform 1 from bus.relay where relay.stream = wanted for update;
    delete from bus.checkpoints where checkpoints.stream = wanted;
    if only_ids is null then
        delete from bus.republish
        where republish.stream = wanted and republish.after_seq = not_before
          and (changed_since is null or republish.ids is null and republish.since >= changed_since);
    end if;
    insert into bus.republish (stream, reason, since, ids, after_seq, delay)
    values (wanted, why, changed_since, only_ids, not_before, later)
    returning republish.id into request;
    return request;
end
$$;

-- How many events of a stream wait, at most `at_most`. The settings leave one possible plan, for the reason that migration 3 gives.
create function bus.waiting_events(wanted text, at_most bigint) returns bigint language sql stable
set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off as $$
    select count(*) from (
        select 1 from bus.outbox
        where outbox.stream = wanted
          and outbox.id > (select coalesce(max(position.floor), 0) from bus.position where position.stream = wanted)
        order by outbox.id limit at_most
    ) as waiting
$$;

-- The caller holds the lock of the stream, and has found no event that waits: the stream ends at `seq`. At most one checkpoint in
-- five minutes, for seven days.
create function bus.checkpoint(wanted text, seq bigint) returns void language plpgsql volatile as $$
begin
    if exists (select from bus.republish where republish.stream = wanted)
       -- The last page of a request may have been appended since.
       or bus.waiting_events(wanted, 1) > 0
       or exists (select from bus.checkpoints where checkpoints.stream = wanted and checkpoints.last_seq <> seq
                  and checkpoints.changed_after > now() - interval '5 minutes') then
        return;
    end if;
    delete from bus.checkpoints
    where checkpoints.stream = wanted and checkpoints.changed_after < now() - interval '7 days';
    insert into bus.checkpoints (stream, last_seq, changed_after) values (wanted, seq, now())
    on conflict (stream, last_seq) do update set changed_after = excluded.changed_after;
end
$$;
