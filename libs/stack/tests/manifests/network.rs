//! Checks that the network policies of production permit exactly the connections that are needed.

use crate::overlay::{Overlay, items, selects, text};
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// From, to, protocol, port. A pod of this system is its name, others are `namespace/pod`.
type Connection = (String, String, String, u64);

/// Any address outside of the cluster, such as Postgres.
const ANYWHERE: &str = "anywhere";

const DNS: &str = "kube-system/kube-dns";

pub fn check(overlay: &Overlay, errors: &mut Vec<String>) {
    let needed = needed(overlay, errors);
    if !overlay.is_prod() {
        return;
    }
    let deny = json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]});
    if !overlay.of("NetworkPolicy").any(|policy| policy["spec"] == deny) {
        errors.push("no policy denies everything".to_owned());
    }
    for [kind, rules, peers] in [["Egress", "egress", "to"], ["Ingress", "ingress", "from"]] {
        let is_bound = |(from, to, ..): &&Connection| {
            let bound = if kind == "Egress" { from } else { to };
            overlay.pods().any(|pod| pod.name == bound)
        };
        let needed: BTreeSet<_> = needed.iter().filter(is_bound).cloned().collect();
        let allowed = allowed(overlay, kind, rules, peers);
        errors.extend(needed.difference(&allowed).map(|it| format!("{kind} policies deny {it:?}")));
        errors.extend(allowed.difference(&needed).map(|it| format!("{kind} policies allow {it:?} needlessly")));
    }
}

/// The connections that the objects need: URLs in variables, backends of the ingress, ports with metrics; DNS for every pod.
fn needed(overlay: &Overlay, errors: &mut Vec<String>) -> BTreeSet<Connection> {
    let mut found = BTreeSet::new();
    let mut need = |from: &str, to: &str, protocol: &str, port| {
        _ = found.insert((from.to_owned(), to.to_owned(), protocol.to_owned(), port));
    };
    for pod in overlay.pods() {
        need(pod.name, DNS, "TCP", 53);
        need(pod.name, DNS, "UDP", 53);
        for variable in items(&pod.container["env"]) {
            if variable["name"] == "DATABASE_URL" {
                need(pod.name, ANYWHERE, "TCP", 5432);
            }
            for (host, port) in addresses(text(&variable["value"])) {
                // Each node of NATS has a name: nats-0.nats-srv.
                match overlay.behind(host.rsplit('.').next().unwrap_or_default(), port) {
                    Some(to) => need(pod.name, to.name, "TCP", port),
                    None => errors.push(format!("{}: nothing listens at {host}:{port}", pod.name)),
                }
            }
        }
        for port in items(&pod.container["ports"]).filter(|port| port["name"] == "http" || port["name"] == "monitor") {
            need("monitoring/*", pod.name, "TCP", port["containerPort"].as_u64().unwrap_or_default());
        }
    }
    let rules = overlay.of("Ingress").flat_map(|ingress| items(&ingress["spec"]["rules"]));
    for path in rules.flat_map(|rule| items(&rule["http"]["paths"])) {
        let service = &path["backend"]["service"];
        let port = service["port"]["number"].as_u64().unwrap_or_default();
        match overlay.behind(text(&service["name"]), port) {
            Some(to) if path["path"] == format!("/api/{}", to.name) => need("ingress-nginx/*", to.name, "TCP", port),
            _ => errors.push(format!("Ingress: {} leads to the wrong place", path["path"])),
        }
    }
    found
}

/// The `host:port` of every URL in a value.
fn addresses(value: &str) -> impl Iterator<Item = (&str, u64)> {
    value.split("://").skip(1).filter_map(|rest| {
        let authority = rest.split([',', '"', '/']).next()?.rsplit('@').next()?;
        let (host, port) = authority.split_once(':')?;
        Some((host, port.parse().ok()?))
    })
}

/// The connections that all policies permit. The port of a rule without ports is 0.
fn allowed(overlay: &Overlay, kind: &str, rules: &str, peers: &str) -> BTreeSet<Connection> {
    let mut found = BTreeSet::new();
    let policies = overlay.of("NetworkPolicy").map(|policy| &policy["spec"]);
    for policy in policies.filter(|policy| items(&policy["policyTypes"]).any(|it| it == kind)) {
        for pod in overlay.pods().filter(|pod| selects(&policy["podSelector"], pod.labels)) {
            for rule in items(&policy[rules]) {
                let every_port = rule.get("ports").is_none().then_some(rule);
                for port in items(&rule["ports"]).chain(every_port) {
                    let (protocol, number) = (text(&port["protocol"]), port["port"].as_u64().unwrap_or_default());
                    found.extend(names(overlay, &rule[peers]).into_iter().map(|peer| {
                        let pod = pod.name.to_owned();
                        let (from, to) = if kind == "Egress" { (pod, peer) } else { (peer, pod) };
                        (from, to, protocol.to_owned(), number)
                    }));
                }
            }
        }
    }
    found
}

/// The peers of `to` or `from`: pods of this system, pods of another namespace, or any address.
fn names(overlay: &Overlay, peers: &Value) -> Vec<String> {
    let mut found: Vec<_> = peers.is_null().then(|| ANYWHERE.to_owned()).into_iter().collect();
    for peer in items(peers) {
        let pod = &peer["podSelector"];
        if peer.get("ipBlock").is_some() {
            found.push(ANYWHERE.to_owned());
        } else if let Some(namespace) = peer.get("namespaceSelector") {
            let namespace = text(&namespace["matchLabels"]["kubernetes.io/metadata.name"]);
            found.push(format!("{namespace}/{}", pod["matchLabels"]["k8s-app"].as_str().unwrap_or("*")));
        } else {
            found.extend(overlay.pods().filter(|it| selects(pod, it.labels)).map(|it| it.name.to_owned()));
        }
    }
    found
}
