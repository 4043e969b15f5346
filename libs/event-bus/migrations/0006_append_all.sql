-- bus.append for the events of several rows that are written by one statement: the arrays have one element for each event,
-- and are appended in their order.
create function bus.append_all(
    stream text, subjects text[], aggregate_ids text[], versions bigint[], payloads text[], traceparents text[],
    headers text[]
) returns void language sql volatile as $$
    insert into bus.outbox (stream, subject, aggregate_id, version, payload, traceparent, headers)
    select stream, subject, aggregate_id, version, payload, traceparent, header::json
    from unnest(subjects, aggregate_ids, versions, payloads, traceparents, headers) with ordinality
         as events (subject, aggregate_id, version, payload, traceparent, header, number)
    order by number
$$;
