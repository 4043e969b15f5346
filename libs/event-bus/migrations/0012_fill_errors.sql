-- Why a request to fill a replica makes no progress, for the command that waits for it.

-- A table that a backup reads cannot be changed, and later statements would wait behind this migration: it gives up soon,
-- and is tried again.
set local lock_timeout = '2s';

-- the error of the last attempt; null: the last page was committed, or no process has begun
alter table bus.fills add column error text;
