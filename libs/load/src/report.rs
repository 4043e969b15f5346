//! Everything that was measured.

use crate::backlog::Backlog;
use crate::drive::Pace;
use crate::growth::Size;
use crate::machine::Machine;
use crate::point::Point;
use crate::routes::Route;

/// Everything that was measured.
#[derive(Debug)]
pub struct Report {
    pub(crate) machine: Option<Machine>,
    /// Pairs of connections and statements per second.
    pub(crate) yardstick: Vec<(u16, f64)>,
    pub(crate) points: Vec<Point>,
    /// The open loop at half of the rate of the closed loop.
    pub(crate) half: Option<Point>,
    /// POST tickets with 1, 2, … replicas.
    pub(crate) replicas: Vec<Point>,
    pub(crate) backlogs: Vec<Backlog>,
    /// The smallest first.
    pub(crate) growth: Vec<Size>,
}

impl Report {
    pub(crate) fn new(machine: Option<Machine>) -> Self {
        Self {
            machine,
            yardstick: Vec::new(),
            points: Vec::new(),
            half: None,
            replicas: Vec::new(),
            backlogs: Vec::new(),
            growth: Vec::new(),
        }
    }

    /// Requests that failed.
    pub(crate) fn failures(&self) -> u64 {
        self.all_points().flat_map(|point| &point.seen.failures).map(|(_, count)| count).sum()
    }

    pub(crate) fn all_points(&self) -> impl Iterator<Item = &Point> {
        let growth = self.growth.iter().flat_map(|size| &size.points);
        self.points.iter().chain(&self.half).chain(&self.replicas).chain(growth)
    }

    /// The routes that were measured, in their order.
    pub(crate) fn routes(&self) -> Vec<Route> {
        let mut routes: Vec<_> = self.points.iter().map(|point| point.plan.route).collect();
        routes.dedup();
        routes
    }

    /// The numbers of connections that were measured, in their order.
    pub(crate) fn connections(&self) -> Vec<u16> {
        let mut connections: Vec<_> = self.points.iter().map(|point| point.plan.connections).collect();
        connections.sort_unstable();
        connections.dedup();
        connections
    }

    pub(crate) fn point(&self, route: Route, connections: u16) -> Option<&Point> {
        self.points.iter().find(|point| (point.plan.route, point.plan.connections) == (route, connections))
    }

    /// The yardstick at this number of connections, or at the greatest that is smaller.
    pub(crate) fn yardstick_at(&self, connections: u16) -> Option<f64> {
        let measured = self.yardstick.iter().filter(|(measured, _)| *measured <= connections);
        measured.max_by_key(|(measured, _)| *measured).map(|(_, rate)| *rate)
    }

    /// The throughput of a closed loop, relative to the yardstick. That of an open loop says nothing about the service.
    pub(crate) fn ratio(&self, point: &Point) -> Option<f64> {
        let yardstick = self.yardstick_at(point.plan.connections)?;
        matches!(point.plan.pace, Pace::Closed).then(|| point.seen.rate / yardstick)
    }
}
