//! On which terms a ticket can be ordered now.

use super::ticket;
use crate::order::Offer;
use contracts::{Id, Timestamp};
use event_bus::Statement;
use sqlx::PgConnection;
use std::collections::BTreeMap;
use std::time::Duration;

/// Finds the terms on which tickets can be ordered now, for the requests that order them.
///
/// The output is `None` if the ticket is not in the replica. Whether it is reserved is read from the orders, because the
/// replica lags behind them. Nothing is locked: see [`InsertOrders`](super::InsertOrders).
pub struct FindOffers {
    /// How long an order may stay unpaid.
    pub ttl: Duration,
}

impl Statement for FindOffers {
    type Item = Id;
    type Output = Option<Offer>;
    const APPENDS: bool = false;

    async fn execute(&self, db: &mut PgConnection, ids: &[Id]) -> anyhow::Result<Vec<Option<Offer>>> {
        let tickets: Vec<String> = ids.iter().map(Id::to_string).collect();
        let rows = sqlx::query!(
            r#"
            select id, title, price, version,
                   -- Not `exists`: with wrong statistics, that could be a scan of all live orders.
                   (select id from orders where ticket_id = ticket.id and status <> 'cancelled' limit 1) is not null
                       as "reserved!",
                   coalesce((select max(reservation) from orders where ticket_id = ticket.id), 0) + 1 as "reservation!",
                   date_trunc('milliseconds', now() + make_interval(secs => $2)) as "expires_at!"
            from ticket_replica as ticket where id = any($1)
            "#,
            &tickets,
            self.ttl.as_secs_f64(),
        );
        let rows = rows.fetch_all(db).await?.into_iter().map(|row| {
            let (ticket, expires_at) = (ticket(&row.id, row.title, row.price, row.version)?, Timestamp(row.expires_at));
            Ok((ticket.id, Offer { ticket, reserved: row.reserved, reservation: row.reservation, expires_at }))
        });
        let offers: BTreeMap<Id, Offer> = rows.collect::<anyhow::Result<_>>()?;
        Ok(ids.iter().map(|id| offers.get(id).cloned()).collect())
    }
}
