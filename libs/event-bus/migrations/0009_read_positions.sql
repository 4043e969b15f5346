-- How far consumers have acknowledged, to notice that messages were deleted before: the server forgets it when it deletes them.
create table bus.read_positions (
    stream   text   not null,
    consumer text   not null,
    -- everything up to this message is acknowledged, or was reported as deleted; a little old
    seq      bigint not null,
    primary key (stream, consumer)
);
