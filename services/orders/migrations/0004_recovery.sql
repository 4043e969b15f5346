-- For a database that takes over orders from their stream.

-- A table that a backup reads cannot be changed, and later statements would wait behind this migration: it gives up soon,
-- and is tried again.
set local lock_timeout = '2s';

-- the payments of an order
create index payments_of_order on payments (order_id);
-- orders whose title is not known yet
create index orders_without_title on orders (ticket_id) where title = '';

-- Deletes orders that contradict the published orders `taken`, and returns their ids: they have the same reservation number; or the
-- published one holds the ticket, so that their events could release it. Only orders that are not published: their first event waits in
-- the outbox. A payment of such an order goes with it. A function, because the role of the service may not delete.
create function withdraw_orders(taken text[], tickets text[], statuses text[], reservations bigint[]) returns setof text
language sql volatile security definer set search_path = pg_catalog as $$
    with withdrawn as materialized (
        select distinct orders.id
        from unnest(tickets, statuses, reservations) as published (ticket_id, status, reservation)
        join public.orders on orders.ticket_id = published.ticket_id and orders.id <> all(taken)
        where (orders.reservation = published.reservation
               or published.status <> 'cancelled'
                  and (orders.status <> 'cancelled' or orders.reservation > published.reservation))
          and exists (select from bus.outbox
                      where (outbox.stream || '.' || outbox.aggregate_id) = 'ORDERS.' || orders.id and outbox.version = 0)
    ), without_payments as (
        delete from public.payments using withdrawn where payments.order_id = withdrawn.id
    )
    delete from public.orders using withdrawn where orders.id = withdrawn.id returning orders.id
$$;
revoke all on function withdraw_orders(text[], text[], text[], bigint[]) from public;
