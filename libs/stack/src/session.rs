/// A session for bash and curl, with services at these addresses.
///
/// It creates and changes a ticket, orders it, shows that it is reserved, cancels, and shows that it is free. The events of
/// orders reach tickets with a lag, so the session waits before it shows the ticket.
pub fn session(tickets: &str, orders: &str) -> String {
    let (alice, bob) = (testkit::token("alice"), testkit::token("bob"));
    format!(
        r#"ALICE={alice}
BOB={bob}
call() {{ curl -sS -H "Authorization: Bearer $1" -H "Content-Type: application/json" "${{@:2}}"; echo; }}
id() {{ sed 's/^{{"id":"\([0-9a-f]*\)".*/\1/'; }}

TICKET=$(call $ALICE {tickets}/api/tickets -d '{{"title": "Concert", "price": 20}}' | id); echo $TICKET
call $ALICE -X PUT {tickets}/api/tickets/$TICKET -d '{{"title": "Concert", "price": 25.5}}'
ORDER=$(call $BOB {orders}/api/orders -d '{{"ticketId": "'$TICKET'"}}' | id); echo $ORDER
sleep 0.5; call $BOB {tickets}/api/tickets/$TICKET    # reserved: it has an orderId
call $BOB -X DELETE {orders}/api/orders/$ORDER
sleep 0.5; call $BOB {tickets}/api/tickets/$TICKET    # free again
call $BOB {orders}/api/orders
"#
    )
}
