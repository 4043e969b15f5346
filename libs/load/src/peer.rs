//! The same load on another service with the HTTP interface of tickets. Nothing is started, and only the client measures.

use crate::drive::{Load, Pace};
use crate::http::{Connection, Target};
use crate::markdown::cells::line;
use crate::options::Options;
use crate::point::{Plan, Point};
use crate::progress::print;
use crate::report::Report;
use crate::routes::{Ids, Requests, Route, ticket_id};
use crate::tally::Tally;
use anyhow::{Context, Result, ensure};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use hyper::StatusCode;
use std::sync::Arc;
use testkit::say;

/// Tickets that are created before the first point.
const TICKETS: usize = 1_000;

/// Measures the service at this URL, as the user of `token`.
pub async fn measure(options: &Options, url: &str, token: &str) -> Result<Report> {
    let target = Arc::new(target(url, token).await?);
    let ids = Arc::new(create_tickets(&target).await.with_context(|| format!("cannot create tickets at {url}"))?);
    if options.routes.contains(&Route::Orders) {
        say("orders are left out: they need the replica of another service");
    }
    let mut report = Report::new(None);
    for &route in options.routes.iter().filter(|&&route| route != Route::Orders) {
        for &connections in &options.connections {
            let plan = Plan::new(options, route, connections, options.rate.map_or(Pace::Closed, Pace::Open));
            let (from, until) = plan.window();
            let requests = Arc::new(Requests::new(route, Ids::Given(ids.clone()), 0..0));
            let load = Load { targets: vec![target.clone()], requests, tally: Tally::new(from, until), sampler: None };
            let (seen, (), ()) = plan.run(load, || ()).await?;
            let point = Point { plan, seen, costs: None, lag: None, rest: None };
            print(&line(&point));
            report.points.push(point);
        }
    }
    Ok(report)
}

/// The token is sent as `Authorization` and as the session cookies of the course.
async fn target(url: &str, token: &str) -> Result<Target> {
    let authority = url.strip_prefix("http://").context("the URL must begin with http://")?.trim_end_matches('/');
    ensure!(!authority.contains('/'), "the URL must have no path: the routes are /api/tickets…");
    let authority = if authority.contains(':') { authority.to_owned() } else { format!("{authority}:80") };
    let cookie = BASE64_STANDARD.encode(serde_json::json!({ "jwt": token }).to_string());
    Target::new(&authority, token).await?.with_cookie(&cookie)
}

async fn create_tickets(target: &Arc<Target>) -> Result<Vec<String>> {
    let mut connection = Connection::open(target).await?;
    let requests = Requests::new(Route::Post, Ids::Numbered(0), 0..0);
    let mut ids = Vec::new();
    while ids.len() < TICKETS {
        let call = requests.next().context("there is always a ticket to create")?;
        let (status, body) = connection.send(call, true).await?;
        let text = String::from_utf8_lossy(&body);
        ensure!(status == StatusCode::CREATED, "POST /api/tickets: {status}: {text}");
        ids.push(ticket_id(&text).with_context(|| format!("no id in {text}"))?.to_owned());
    }
    Ok(ids)
}
