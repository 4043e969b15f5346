-- The database comes back older than the stream that it publishes to: what is recovered, and how far.

-- A table that a backup reads cannot be changed, and later statements would wait behind this migration: it gives up soon,
-- and is tried again.
set local lock_timeout = '2s';

-- A recovery that is under way: the owner takes over events of its own stream. While a row exists, nothing is appended.
create table bus.recovery (
    stream     text   primary key,
    -- the position of the database that came back, and the end of the stream
    from_seq   bigint not null,
    until_seq  bigint not null,
    -- snapshots that were written into the tables, and unpublished events that were deleted because they contradict the stream
    taken_over bigint not null default 0,
    dropped    bigint not null default 0,
    -- when the newest event that was taken over was published, by the clock of the broker
    newest_at  timestamptz,
    -- whether the tables have all that the stream has; the events in bus.recovery_reads are applied again after that
    walked     boolean not null default false,
    begun_at   timestamptz not null default now()
);

-- The events of other streams that are applied again: their effects may have been lost. A row is deleted when all are applied.
create table bus.recovery_reads (
    stream    text   not null,
    consumer  text   not null,
    -- up to this message, they were applied before the backup
    after_seq bigint not null,
    -- up to this message, they were delivered before the recovery; null: not yet known
    until_seq bigint,
    -- how many messages were passed
    passed    bigint not null default 0,
    primary key (stream, consumer)
);

-- Positions that are older than `seq`: `between_seq` is at most two minutes older than `between_at`, and `before_seq` was kept two minutes
-- before. A database that has just come back has its old position here, even if new ones were written before the recovery began.
alter table bus.read_positions
    add column before_seq  bigint not null default 0,
    add column between_seq bigint not null default 0,
    add column between_at  timestamptz not null default now();
update bus.read_positions set before_seq = seq, between_seq = seq;

-- In which database this row was last seen by a relay: see bus.incarnation.
alter table bus.relay add column incarnation text;

-- Which database this is: the server, its timeline, which a fail-over changes, the database and a table in it, which a restore changes. A
-- restore of the files of a whole server may leave all of them.
create function bus.incarnation() returns text language sql stable set search_path = pg_catalog as $$
    select format('%s/%s/%s/%s', (select system_identifier from pg_control_system()),
                  left(pg_walfile_name(pg_current_wal_lsn()), 8),
                  (select oid from pg_database where datname = current_database()), 'bus.relay'::regclass::oid)
$$;

-- Fails while the database is being recovered, with a state that counts as an outage.
create function bus.require_recovered() returns void language plpgsql
-- as the owner: the release before has no rights on bus.recovery
security definer set search_path = pg_catalog as $$
begin
    if exists (select from bus.recovery) and current_setting('bus.recovering', true) is distinct from 'yes' then
        raise exception 'the database is older than the stream, and is being recovered' using errcode = 'cannot_connect_now';
    end if;
end
$$;

-- Whatever appends events waits: requests, handlers, background work of all replicas, and pages of a republish.
create function bus.refuse_while_recovering() returns trigger language plpgsql as $$
begin
    perform bus.require_recovered();
    return null;
end
$$;

create trigger refuse_while_recovering before insert on bus.outbox
    for each statement execute function bus.refuse_while_recovering();

-- As before, and performs nothing during a recovery: a task that is due may have been performed after the backup.
create or replace function bus.lease_tasks(wanted text, at_most bigint, lease double precision, looks_back double precision)
returns setof bus.tasks
language sql volatile
set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off
set enable_hashjoin = off set enable_mergejoin = off as $$
    select bus.require_recovered();
    with due as materialized (
        select id from bus.tasks
        where kind = wanted and status = 'pending' and due_at <= now()
              and due_at > coalesce(now() - make_interval(secs => looks_back), '-infinity')
        order by due_at limit at_most for update skip locked
    )
    update bus.tasks as task set due_at = now() + make_interval(secs => lease), attempts = task.attempts + 1, updated_at = now()
    from due where task.id = due.id
    returning task.*
$$;
