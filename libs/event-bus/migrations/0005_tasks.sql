-- Work with an effect outside of this database. A row is the intent, committed with the change that causes it; a worker
-- performs it and deletes the row together with what becomes of it.

create table bus.tasks (
    id          bigint generated always as identity primary key,
    -- what is to be done
    kind        text not null check (octet_length(kind) between 1 and 200),
    -- what it is done for. It becomes an idempotency key, for example in a header of HTTP.
    key         text not null
        constraint key_is_short_visible_ascii check (octet_length(key) between 1 and 200 and key collate "C" !~ '[^!-~]'),
    input       json not null
        constraint input_fits_into_memory check (octet_length(input::text) <= 1000000),
    traceparent text,
    -- pending: a worker performs it when it is due · dead: every attempt failed, a person decides
    status      text not null default 'pending' check (status in ('pending', 'dead')),
    -- when the next attempt may begin; during an attempt, when its lease ends
    due_at      timestamptz not null,
    -- attempts that have begun
    attempts    integer not null default 0,
    -- of the last attempt that failed
    error       text,
    created_at  timestamptz not null default now(),
    updated_at  timestamptz not null default now(),
    unique (kind, key)
);

create index tasks_due on bus.tasks (kind, due_at) where status = 'pending';

-- The row comes, changes twice and goes with every task.
alter table bus.tasks set (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 10000);

-- Begins the next attempt of tasks that are due: no other attempt begins before `lease`, in seconds, is over. Looks at those that
-- became due in the last `looks_back` seconds; null: at all. The settings leave one possible plan, because a table that empties
-- and fills has no true statistics.
create function bus.lease_tasks(wanted text, at_most bigint, lease double precision, looks_back double precision)
returns setof bus.tasks
language sql volatile
set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off
set enable_hashjoin = off set enable_mergejoin = off as $$
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
