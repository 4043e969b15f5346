\set a random(0, 281474976710655)
\set b random(0, 281474976710655)
with new as (
    insert into tickets (id, title, price, user_id, version)
    values (lpad(to_hex(:a::bigint), 12, '0') || lpad(to_hex(:b::bigint), 12, '0'), 'Concert', 20.5, 'load', 0)
    returning id
)
select bus.append('TICKETS', 'ticket.created', id, 0,
                  '{"id":"' || id || '","version":0,"title":"Concert","price":20.5,"userId":"load"}', null)
from new;
