//! The alerts and the dashboard of `infra/monitoring`, in a real Prometheus that scrapes both services.

use crate::metrics::documented;
use crate::system::System;
use anyhow::{Context, Result, ensure};
use futures::future::join_all;
use serde_json::{Value, json};
use sqlx::{Connection, Executor, PgConnection};
use std::collections::BTreeSet;
use std::convert::Infallible;
use std::path::Path;
use std::time::Duration;
use testkit::{Client, Prometheus, Signal, eventually, eventually_within, promtool};
use tokio::time::{MissedTickBehavior, interval};

const DIRECTORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../infra/monitoring");
const CONFIGURATION: &str = include_str!("../../../../infra/monitoring/prometheus.yaml");
const RULES: &str = include_str!("../../../../infra/monitoring/rules.yaml");
const DASHBOARD: &str = include_str!("../../../../infra/monitoring/dashboard.json");
const RUNBOOK: &str = include_str!("../../../../docs/runbook.md");

/// Parts of queries that have no data here, and why.
const WITHOUT_DATA: [(&str, &str); 2] = [
    ("event_bus_tasks_total", "neither service has durable tasks"),
    (r#"http_route="none", http_response_status_code="503""#, "no request is refused: there is no overload"),
];

/// The windows of the rules, and the one that this test uses instead of each.
const WINDOWS: [&str; 3] = ["[5m]", "[15m]", "[1h]"];
const WINDOW: &str = "[8s]";

fn rules() -> Result<Value> {
    Ok(serde_saphyr::from_str(RULES)?)
}

fn items(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// The rules, with short windows and nearly without `for`. Thresholds are those of the file.
fn quick_rules() -> Result<String> {
    let mut rules = rules()?;
    for rule in rules["groups"][0]["rules"].as_array_mut().context("there are rules")? {
        let quick = WINDOWS.iter().fold(text(&rule["expr"]).to_owned(), |expr, window| expr.replace(window, WINDOW));
        rule["expr"] = json!(quick);
        rule["for"] = json!("1s");
    }
    // JSON is YAML.
    Ok(rules.to_string())
}

/// The configuration of compose, for these services, and scrapes every second.
fn configuration(system: &System) -> Result<String> {
    let mut configuration: Value = serde_saphyr::from_str(CONFIGURATION)?;
    configuration["global"] = json!({"scrape_interval": "1s", "evaluation_interval": "1s"});
    for job in configuration["scrape_configs"].as_array_mut().context("there are jobs")? {
        let replicas = if job["job_name"] == "tickets" { &system.tickets } else { &system.orders };
        let targets: Vec<_> = replicas.iter().map(|replica| format!("127.0.0.1:{}", replica.port())).collect();
        let job = job.as_object_mut().context("a job")?;
        job.remove("dns_sd_configs").context("compose finds its services by name")?;
        job.insert("static_configs".to_owned(), json!([{"targets": targets}]));
    }
    Ok(configuration.to_string())
}

/// The queries of the dashboard, for both services and with this window.
fn queries() -> Result<Vec<String>> {
    let dashboard: Value = serde_json::from_str(DASHBOARD)?;
    let queries = items(&dashboard["panels"]).flat_map(|panel| items(&panel["targets"]));
    Ok(queries.map(|it| text(&it["expr"]).replace("$job", ".+").replace("[$__rate_interval]", "[30s]")).collect())
}

#[tokio::test]
async fn promtool_accepts_the_rules_and_each_alert_fires_and_ends_in_their_tests() -> Result<()> {
    let directory = Path::new(DIRECTORY);
    let checked = promtool(directory, &["check", "rules", "/files/rules.yaml"]).await?;
    ensure!(checked.contains("SUCCESS"), "{checked}");
    promtool(directory, &["check", "config", "--syntax-only", "/files/prometheus.yaml"]).await?;
    promtool(directory, &["test", "rules", "/files/rules_test.yaml"]).await?;

    let tests: Value = serde_saphyr::from_str(include_str!("../../../../infra/monitoring/rules_test.yaml"))?;
    for rule in items(&rules()?["groups"][0]["rules"]) {
        let checks = || items(&tests["tests"]).flat_map(|test| items(&test["alert_rule_test"]));
        let of_rule: Vec<_> = checks().filter(|check| check["alertname"] == rule["alert"]).collect();
        let fires = of_rule.iter().filter(|check| check.get("exp_alerts").is_some()).count();
        // Before, after, and the two tests without any alert.
        ensure!(fires >= 1 && of_rule.len() >= fires + 4, "{}: {of_rule:#?}", rule["alert"]);
    }
    Ok(())
}

#[test]
fn each_alert_has_an_entry_in_the_runbook_and_each_entry_an_alert() -> Result<()> {
    let rules = rules()?;
    let rules: Vec<_> = items(&rules["groups"][0]["rules"]).collect();
    let entries: Vec<_> = RUNBOOK.split("\n## ").skip(1).filter_map(|entry| entry.split_once('\n')).collect();
    let (alerts, headings): (Vec<_>, Vec<_>) = (
        rules.iter().map(|rule| text(&rule["alert"])).collect(),
        entries.iter().map(|(heading, _)| *heading).collect(),
    );
    ensure!(alerts == headings, "the rules have {alerts:?}, and the runbook {headings:?}");
    for (heading, entry) in entries {
        let parts: Vec<_> = entry.lines().filter_map(|line| line.strip_prefix("- **")?.split_once(":**")).collect();
        let parts: Vec<_> = parts.iter().map(|(part, _)| *part).collect();
        ensure!(parts == ["Meaning", "Users notice", "Look at", "Do"], "{heading}: {parts:?}");
    }
    for rule in rules {
        let (alert, annotations) = (text(&rule["alert"]), &rule["annotations"]);
        let anchor = format!("docs/runbook.md#{}", alert.to_lowercase());
        ensure!(annotations["runbook_url"] == anchor, "{alert}: {annotations}");
        ensure!(text(&annotations["description"]).contains("$value"), "{alert}: no measured value in {annotations}");
        ensure!(["warning", "critical"].contains(&text(&rule["labels"]["severity"])), "{alert}: {}", rule["labels"]);
    }
    Ok(())
}

#[test]
fn rules_and_dashboard_use_only_documented_metrics() -> Result<()> {
    let rules = rules()?;
    let rules = items(&rules["groups"][0]["rules"]).map(|rule| text(&rule["expr"]).to_owned());
    let documented = documented();
    let mut used = BTreeSet::new();
    for query in rules.chain(queries()?) {
        for word in query.split(|c: char| !c.is_ascii_alphanumeric() && c != '_') {
            let family = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| word.strip_suffix(suffix));
            let is_metric = ["event_bus_", "http_server_", "orders_", "tickets_", "process_"];
            if is_metric.iter().any(|prefix| word.starts_with(prefix)) {
                let name = family.unwrap_or(word);
                ensure!(documented.contains(name), "{name} is no metric, in {query}");
                used.insert(name.to_owned());
            }
        }
    }
    let unused: Vec<_> = documented.iter().filter(|name| !used.contains(**name) && **name != "build_info").collect();
    ensure!(unused.iter().all(|name| name.starts_with("process_")), "on no panel: {unused:?}");
    Ok(())
}

#[test]
fn each_panel_has_a_place_a_unit_and_the_data_source_of_the_variable() -> Result<()> {
    let dashboard: Value = serde_json::from_str(DASHBOARD)?;
    let (mut ids, mut places) = (BTreeSet::new(), BTreeSet::new());
    for panel in items(&dashboard["panels"]) {
        let title = text(&panel["title"]);
        let place = &panel["gridPos"];
        ensure!(!title.is_empty() && ids.insert(panel["id"].as_u64()), "{title}: no title, or the id of another one");
        let right = place["x"].as_u64().zip(place["w"].as_u64()).map_or(25, |(x, width)| x + width);
        ensure!(right <= 24 && places.insert((place["y"].as_u64(), place["x"].as_u64())), "{title} is at {place}");
        if panel["type"] != "row" {
            ensure!(panel["datasource"]["uid"] == "${datasource}", "{title}: {}", panel["datasource"]);
            ensure!(!text(&panel["fieldConfig"]["defaults"]["unit"]).is_empty(), "{title} has no unit");
            ensure!(items(&panel["targets"]).count() > 0, "{title} shows nothing");
        }
    }
    Ok(())
}

/// A seller and a buyer, until they are dropped. Their requests may fail.
async fn traffic(tickets: &Client, orders: &Client) -> Infallible {
    let mut ticks = interval(Duration::from_millis(400));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let _ = sell(tickets, orders).await;
    }
}

async fn sell(tickets: &Client, orders: &Client) -> Result<()> {
    let concert = json!({"title": "Concert", "price": 20});
    let ticket = tickets.post("/api/tickets", concert.clone()).await?.expect(201)?;
    tickets.put(&format!("/api/tickets/{}", text(&ticket["id"])), concert).await?.expect(200)?;
    let body = json!({"ticketId": ticket["id"]});
    let order = orders.post("/api/orders", body.clone()).await?.expect(201)?;
    orders.post("/api/orders", body).await?.expect(400)?;
    orders.get(&format!("/api/orders/{}", text(&order["id"]))).await?.expect(200)?;
    Ok(())
}

/// Waits until all these alerts fire.
async fn fire(prometheus: &Prometheus, alerts: &[&str]) -> Result<()> {
    become_so(prometheus, &format!("{alerts:?} to fire"), |firing| alerts.iter().all(|alert| firing.contains(*alert)))
        .await
}

/// Waits until none of these alerts fires.
async fn end(prometheus: &Prometheus, alerts: &[&str]) -> Result<()> {
    become_so(prometheus, &format!("{alerts:?} to end"), |firing| !alerts.iter().any(|alert| firing.contains(*alert)))
        .await
}

/// Waits until the alerts that fire are as expected.
async fn become_so(prometheus: &Prometheus, what: &str, is_so: impl Fn(&BTreeSet<String>) -> bool) -> Result<()> {
    eventually_within(Duration::from_secs(40), what, async || {
        let series = prometheus.query(r#"ALERTS{alertstate="firing"}"#).await?;
        let firing = series.iter().map(|series| text(&series["metric"]["alertname"]).to_owned()).collect();
        ensure!(is_so(&firing), "firing: {firing:?}");
        anyhow::Ok(())
    })
    .await
}

/// Waits until each query of the dashboard has a number, except those `WITHOUT_DATA`.
async fn have_data(prometheus: &Prometheus) -> Result<()> {
    let queries = queries()?;
    ensure!(queries.len() > 40, "{} queries", queries.len());
    eventually("data for each query", async || {
        let mut wrong = Vec::new();
        for query in &queries {
            let series = prometheus.query(query).await?;
            let has_number = series.iter().any(|series| series["value"][1] != "NaN");
            let is_expected = !WITHOUT_DATA.iter().any(|(part, _)| query.contains(part));
            if has_number != is_expected {
                wrong.push((query, series));
            }
        }
        ensure!(wrong.is_empty(), "{wrong:#?}");
        anyhow::Ok(())
    })
    .await
}

async fn faults(system: &mut System, prometheus: &Prometheus) -> Result<()> {
    eventually_within(Duration::from_secs(40), "both services to be scraped, without an alert", async || {
        let up = prometheus.query(r#"up == 1 unless on () ALERTS{alertstate="firing"}"#).await?;
        ensure!(up.len() == 2, "{up:?}");
        anyhow::Ok(())
    })
    .await?;
    system.publish("ticket.created", json!({"hello": "world"})).await?;
    let ticket = system.tickets(1).await?.remove(0);
    let order = system.order(0, "other", &ticket).await?;
    system.buyer(0, "other").delete(&format!("/api/orders/{order}")).await?.expect(204)?;
    system.publish("payment.created", json!({"id": order, "orderId": order, "stripeId": "pi"})).await?;
    // It ends by itself, soon.
    fire(prometheus, &["RefundsDue"]).await?;
    fire(prometheus, &["DeadLetters"]).await?;

    system.nats.pause().await?;
    let port = system.orders[0].port();
    system.orders[0].signal(Signal::Kill).await?;
    fire(prometheus, &["ServiceDown", "ReplicaDown"]).await?;
    system.orders[0] = system.respawn(port)?;
    system.orders[0].wait_ready().await?;
    fire(prometheus, &["OutboxOld", "NotPublishing"]).await?;
    system.nats.unpause().await?;
    PgConnection::connect(&system.orders_db).await?.execute("delete from bus.dead_letters").await?;
    // Also those of the next fault: while NATS was away, orders of unknown tickets were 503; and a service that starts has not
    // seen Postgres yet.
    become_so(prometheus, "all alerts to end", BTreeSet::is_empty).await?;

    system.postgres.pause().await?;
    fire(prometheus, &["DatabaseAway", "ErrorRateHigh"]).await?;
    system.postgres.unpause().await?;
    end(prometheus, &["DatabaseAway", "ErrorRateHigh"]).await?;
    have_data(prometheus).await
}

#[tokio::test]
async fn alerts_fire_and_end_and_each_query_of_the_dashboard_has_data() -> Result<()> {
    let mut system = System::start_with(1, 1, "1s").await?;
    let prometheus = Prometheus::start(&configuration(&system)?, &quick_rules()?).await?;
    let tickets = system.tickets[0].client().signed_in("seller");
    let orders = system.orders[0].client().signed_in("buyer");
    // Several, because a request takes seconds while Postgres is away.
    let users = join_all((0..4).map(|_| traffic(&tickets, &orders)));
    tokio::select! {
        _ = users => unreachable!("users do not end"),
        outcome = faults(&mut system, &prometheus) => outcome,
    }
}
