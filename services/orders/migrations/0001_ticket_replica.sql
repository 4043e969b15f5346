-- What orders knows about tickets: a copy of the tickets service's table as its events tell it, never written by anyone
-- else. It can be thrown away and rebuilt from the stream.
create table ticket_replica (
    id       text collate "C" primary key,
    title    text          not null,
    price    numeric(14,4) not null,
    user_id  text          not null,
    version  bigint        not null,
    order_id text collate "C"
);
