-- Room in each page for the next versions of its rows: an update that changes no indexed column writes no index then. Applies to
-- pages that are written from now on.
set local lock_timeout = '2s';

alter table ticket_replica set (fillfactor = 90);
