//! A system that is ready to be measured, one point after another.

use crate::drive::{Load, Pace};
use crate::http::Target;
use crate::lag::Prober;
use crate::point::{Costs, Plan, Point, Rest};
use crate::records::{Records, USER};
use crate::routes::{Ids, Requests, Route};
use crate::system::System;
use crate::tally::Tally;
use crate::usage::{self, Usage};
use anyhow::Result;
use futures::future::try_join_all;
use stack::services::{ORDERS, TICKETS};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use testkit::Process;

/// Free tickets to prepare for orders: per connection and second, and in total per second. More than a service can order.
const ORDERS_OF_A_CONNECTION: u64 = 3_000;
const MOST_ORDERS: u64 = 20_000;

/// A system, its databases, and the tickets that it began with.
pub struct Bench {
    /// The system.
    pub system: System,
    /// Its databases.
    pub records: Records,
    /// The first processes of the containers of Postgres and NATS. None where `/proc` does not show them.
    servers: Option<(u32, u32)>,
    /// The number of tickets that requests read and change.
    changed: u64,
    /// The tickets that are not ordered yet.
    free: Range<u64>,
}

/// The usage of all processes at one moment.
struct Snapshot {
    tickets: Usage,
    orders: Usage,
    postgres: Usage,
    nats: Usage,
    generator: Usage,
}

impl Bench {
    /// Starts a system with this many tickets. `binary` runs the services.
    pub async fn start(binary: &Path, tickets: u64) -> Result<Self> {
        let system = System::start(binary).await?;
        let (tickets_url, orders_url) = (system.superuser_url(&TICKETS), system.superuser_url(&ORDERS));
        let mut records = Records::open(&tickets_url, &orders_url, &system.nats.monitoring_url()).await?;
        let postgres = usage::main_process(&system.postgres).await?;
        let servers = postgres.zip(usage::main_process(&system.nats).await?);
        records.fill(tickets).await?;
        records.vacuum().await?;
        Ok(Self { system, records, servers, changed: tickets, free: tickets..tickets })
    }

    /// Fills in tickets until requests read and change this many. Only for a bench without orders.
    pub async fn grow(&mut self, tickets: u64) -> Result<()> {
        self.changed = tickets.max(self.changed);
        self.records.fill(tickets.saturating_sub(self.records.filled())).await?;
        self.records.vacuum().await
    }

    /// Measures one point, then waits until the system is at rest.
    pub async fn measure(&mut self, plan: Plan) -> Result<Point> {
        if plan.route == Route::Orders {
            self.fill_free(&plan).await?;
        }
        let targets = self.targets(plan.route).await?;
        let probed = plan.route.changes_tickets().then(|| Prober::start(self.system.superuser_url(&ORDERS)));
        let (prober, sampler) = probed.unzip();
        let requests = Arc::new(Requests::new(plan.route, Ids::Numbered(self.changed), self.free.clone()));
        let (from, until) = plan.window();
        let load = Load { targets, requests: requests.clone(), tally: Tally::new(from, until), sampler };
        self.processes().filter_map(Process::id).for_each(usage::reset_memory_peak);
        let (seen, before, after) = plan.run(load, || self.snapshot()).await?;
        let costs = before.zip(after).map(|(before, after)| self.costs(seen.responses, &before, &after));
        self.free.start = requests.next_free();
        let events = self.records.outbox().await?;
        let drain = self.records.drained().await?;
        let lag = match prober {
            Some(prober) => Some(prober.finish().await?),
            None => None,
        };
        Ok(Point { plan, seen, costs, lag, rest: Some(Rest { events, drain }) })
    }

    /// Makes sure that there are enough tickets to order.
    async fn fill_free(&mut self, plan: &Plan) -> Result<()> {
        let seconds = (plan.warm_up + plan.measured).as_secs() + 1;
        let rate = match plan.pace {
            Pace::Closed => (u64::from(plan.connections) * ORDERS_OF_A_CONNECTION).min(MOST_ORDERS),
            Pace::Open(rate) => rate.into(),
        };
        let missing = (rate * seconds).saturating_sub(self.free.end - self.free.start);
        if missing > 0 {
            let end = self.records.fill(missing).await?.end;
            self.free.end = end;
            self.records.vacuum().await?;
        }
        Ok(())
    }

    async fn targets(&self, route: Route) -> Result<Vec<Arc<Target>>> {
        let replicas = if route == Route::Orders { &self.system.orders } else { &self.system.tickets };
        let token = testkit::token(USER);
        let targets = replicas.iter().map(|replica| {
            let (address, token) = (format!("127.0.0.1:{}", replica.port()), &token);
            async move { Target::new(&address, token).await.map(Arc::new) }
        });
        try_join_all(targets).await
    }

    fn processes(&self) -> impl Iterator<Item = &Process> {
        self.system.tickets.iter().chain(&self.system.orders)
    }

    fn snapshot(&self) -> Option<Snapshot> {
        let (postgres, nats) = self.servers?;
        Some(Snapshot {
            tickets: sum(&self.system.tickets)?,
            orders: sum(&self.system.orders)?,
            postgres: Usage::of(postgres)?,
            nats: Usage::of(nats)?,
            generator: Usage::of_alone(std::process::id())?,
        })
    }

    fn costs(&self, requests: u64, before: &Snapshot, after: &Snapshot) -> Costs {
        Costs {
            requests,
            tickets: after.tickets - before.tickets,
            orders: after.orders - before.orders,
            postgres: after.postgres - before.postgres,
            nats: after.nats - before.nats,
            generator: after.generator - before.generator,
            tickets_memory: largest_peak(&self.system.tickets),
            orders_memory: largest_peak(&self.system.orders),
        }
    }
}

fn sum(processes: &[Process]) -> Option<Usage> {
    processes.iter().map(|process| Usage::of(process.id()?)).sum()
}

fn largest_peak(processes: &[Process]) -> u64 {
    processes.iter().filter_map(|process| process.memory_peak().ok()).max().unwrap_or_default()
}
