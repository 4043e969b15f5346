-- The trigger of migration 10 without a call of another function: it is executed by every statement that appends events.

-- The trigger reads the table as the role that appends. A role may not have its rights of this release yet.
grant select on bus.recovery to public;

create or replace function bus.refuse_while_recovering() returns trigger language plpgsql as $$
begin
    if exists (select from bus.recovery) then
        perform bus.require_recovered();
    end if;
    return null;
end
$$;
