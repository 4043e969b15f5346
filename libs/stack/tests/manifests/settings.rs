//! The settings that objects must have: least privilege, limits, probes, a graceful shutdown.

use crate::overlay::{Overlay, Pod, items, text};
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// A pattern for a setting that must exist, with any value.
const ANY: &str = "(any)";

pub fn check(overlay: &Overlay, errors: &mut Vec<String>) {
    for object in &overlay.objects {
        let (kind, name) = (text(&object["kind"]), text(&object["metadata"]["name"]));
        for pattern in patterns(kind, name, overlay.is_prod()) {
            compare(&format!("{kind} {name}"), &pattern, object, errors);
        }
    }
    for pod in overlay.pods() {
        shutdown(&pod, errors);
        interpolation(&pod, errors);
        let (kind, image) =
            (text(&pod.owner["kind"]), text(&pod.container["image"]).rsplit('/').next().unwrap_or_default());
        if overlay.is_prod() && (!image.contains(':') || image.ends_with(":latest")) {
            errors.push(format!("{}: the image {image} has no version", pod.name));
        }
        for (protection, kinds) in
            [("PodDisruptionBudget", "Deployment StatefulSet"), ("HorizontalPodAutoscaler", "Deployment")]
        {
            if overlay.is_prod() && kinds.contains(kind) && overlay.find(protection, pod.name).is_null() {
                errors.push(format!("{}: there is no {protection}", pod.name));
            }
        }
    }
}

/// The settings that an object of this kind and name must have.
fn patterns(kind: &str, name: &str, is_prod: bool) -> Vec<Value> {
    let probe = |path: &str| json!({"httpGet": {"path": path, "port": "http"}});
    let pod = json!({"spec": {"template": {"spec": {
        "automountServiceAccountToken": false,
        "enableServiceLinks": false,
        "securityContext": {
            "runAsNonRoot": true, "runAsUser": ANY, "runAsGroup": ANY, "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [{
            "imagePullPolicy": "IfNotPresent",
            "resources": {"requests": {"cpu": ANY, "memory": ANY}, "limits": {"cpu": ANY, "memory": ANY}},
            "securityContext": {
                "allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}, "readOnlyRootFilesystem": true,
            },
        }],
    }}}});
    let own = match (kind, name) {
        ("Namespace", _) => return Vec::new(),
        ("Job", _) => {
            json!({"spec": {"backoffLimit": ANY, "activeDeadlineSeconds": ANY}})
        }
        ("Deployment", _) => json!({"spec": {
            // An autoscaler sets the replicas.
            "replicas": null,
            "strategy": {"rollingUpdate": {"maxUnavailable": 0}},
            "template": {"spec": {"containers": [{
                "startupProbe": probe("/healthz"), "livenessProbe": probe("/healthz"), "readinessProbe": probe("/readyz"),
            }]}},
        }}),
        ("StatefulSet", _) => json!({"spec": {"template": {"spec": {
            // Postgres refuses the permissions that `Always` sets.
            "securityContext": {"fsGroup": ANY, "fsGroupChangePolicy": "OnRootMismatch"},
            "containers": [{"startupProbe": ANY, "livenessProbe": ANY, "readinessProbe": ANY}],
        }}}}),
        // Each node has its own address, also before it is ready.
        ("Service", "nats-srv") => json!({"spec": {"clusterIP": "None", "publishNotReadyAddresses": true}}),
        ("Ingress", _) if is_prod => json!({"spec": {"tls": ANY}}),
        _ => json!({}),
    };
    let pod = if own["spec"].get("template").is_some() || kind == "Job" { pod } else { json!({}) };
    vec![json!({"metadata": {"namespace": "ticketing"}}), pod, own]
}

/// Compares a value with a pattern: objects may have additional fields, lists must have the same length.
fn compare(path: &str, pattern: &Value, found: &Value, errors: &mut Vec<String>) {
    match (pattern, found) {
        (Value::Object(pattern), _) => {
            pattern.iter().for_each(|(key, value)| compare(&format!("{path}/{key}"), value, &found[key], errors));
        }
        (Value::Array(pattern), Value::Array(found)) if pattern.len() == found.len() => {
            pattern.iter().zip(found).for_each(|(pattern, found)| compare(path, pattern, found, errors));
        }
        _ if pattern == found || *pattern == ANY && !found.is_null() => {}
        _ => errors.push(format!("{path} is {found}, set it to {pattern}")),
    }
}

fn shutdown(pod: &Pod, errors: &mut Vec<String>) {
    let sleep = pod.container["lifecycle"]["preStop"]["sleep"]["seconds"].as_u64();
    let stop = items(&pod.container["env"]).find(|variable| variable["name"] == "STOP_GRACE");
    let stop = stop.and_then(|variable| text(&variable["value"]).strip_suffix('s')?.parse::<u64>().ok());
    let grace = pod.spec["terminationGracePeriodSeconds"].as_u64().unwrap_or(30);
    let enough = match text(&pod.owner["kind"]) {
        "Deployment" => sleep.zip(stop).is_some_and(|(sleep, stop)| grace > sleep + stop),
        // 30 s in which clients disconnect, and the time to close the store
        "StatefulSet" => grace >= 60,
        _ => true,
    };
    if !enough {
        let needed = format!("preStop {sleep:?}, STOP_GRACE {stop:?}");
        errors.push(format!("{}: the grace period {grace} s is too short ({needed})", pod.name));
    }
}

/// Checks that each `$(NAME)` is defined before its use: Kubernetes does not replace it otherwise.
fn interpolation(pod: &Pod, errors: &mut Vec<String>) {
    let mut known = BTreeSet::new();
    let variables = items(&pod.container["env"]).map(|variable| (text(&variable["name"]), text(&variable["value"])));
    for (name, value) in variables.chain(items(&pod.container["args"]).map(|argument| ("", text(argument)))) {
        for (used, _) in value.split("$(").skip(1).filter_map(|rest| rest.split_once(')')) {
            if !known.contains(used) {
                errors.push(format!("{}: $({used}) is used before it is defined", pod.name));
            }
        }
        if !known.insert(name) && !name.is_empty() {
            errors.push(format!("{}: {name} is defined twice", pod.name));
        }
    }
}
