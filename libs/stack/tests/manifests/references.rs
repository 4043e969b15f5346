//! Checks that everything that objects refer to exists: pods, ports, secrets, config maps, variables.

use crate::overlay::{Overlay, covers, items, selects, text};
use serde_json::Value;
use std::collections::BTreeSet;

pub fn check(overlay: &Overlay, errors: &mut Vec<String>) {
    selectors(overlay, errors);
    keys(overlay, errors);
    variables(overlay, errors);
}

/// Checks that each selector matches the pods of one owner, which have the service's ports.
fn selectors(overlay: &Overlay, errors: &mut Vec<String>) {
    for object in overlay.objects.iter().filter(|object| object["spec"].get("selector").is_some()) {
        let (kind, selector) = (&object["kind"], &object["spec"]["selector"]);
        let matches = |labels| if kind == "Service" { covers(labels, selector) } else { selects(selector, labels) };
        let pods: Vec<_> = overlay.pods().filter(|pod| matches(pod.labels)).collect();
        let name = format!("{} {}", text(kind), text(&object["metadata"]["name"]));
        let [pod] = &pods[..] else {
            errors.push(format!("{name}: its selector matches {} kinds of pods, not one", pods.len()));
            continue;
        };
        if object["spec"].get("template").is_some() && pod.owner != object {
            errors.push(format!("{name}: its selector matches {}", pod.name));
        }
        for port in items(&object["spec"]["ports"]) {
            let fits = |there: &Value| there["name"] == port["targetPort"] && there["containerPort"] == port["port"];
            if !items(&pod.container["ports"]).any(fits) {
                errors.push(format!("{name}: {} does not listen at {}", pod.name, port["port"]));
            }
        }
    }
}

/// Checks that every key that is used exists, and that every key is used: `kind name/key`.
fn keys(overlay: &Overlay, errors: &mut Vec<String>) {
    let (mut there, mut used) = (BTreeSet::new(), BTreeSet::new());
    for object in overlay.of("Secret").chain(overlay.of("ConfigMap")) {
        let name = format!("{} {}", text(&object["kind"]), text(&object["metadata"]["name"]));
        there.extend(object["data"].as_object().into_iter().flatten().map(|(key, _)| format!("{name}/{key}")));
    }
    // No secret of production is in a file.
    if overlay.is_prod() && overlay.of("Secret").count() > 0 {
        errors.push("a secret is in the files".to_owned());
    }
    there.extend(overlay.documented.iter().map(|key| format!("Secret {key}")));
    overlay.objects.iter().for_each(|object| used_keys(object, &there, &mut used));
    errors.extend(used.difference(&there).map(|key| format!("{key} is used, and is not there")));
    errors.extend(there.difference(&used).map(|key| format!("{key} is there, and nothing uses it")));
}

/// All references in an object, at any depth. A reference without a key uses all keys.
fn used_keys(value: &Value, there: &BTreeSet<String>, used: &mut BTreeSet<String>) {
    items(value).for_each(|value| used_keys(value, there, used));
    for (field, inner) in value.as_object().into_iter().flatten() {
        let (kind, name, source) = match field.as_str() {
            "secretKeyRef" => ("Secret", &inner["name"], inner),
            "secretName" => ("Secret", inner, value),
            "configMapKeyRef" | "configMap" => ("ConfigMap", &inner["name"], inner),
            _ => {
                used_keys(inner, there, used);
                continue;
            }
        };
        let name = format!("{kind} {}/", text(name));
        let named: Vec<_> = items(&source["items"]).map(|item| &item["key"]).chain(source.get("key")).collect();
        used.extend(named.iter().map(|key| name.clone() + text(key)));
        if named.is_empty() {
            let all: Vec<_> = there.iter().filter(|key| key.starts_with(&name)).cloned().collect();
            used.extend(if all.is_empty() { vec![name] } else { all });
        }
    }
}

/// Checks that the environment of a server has the variables that its configuration files read.
fn variables(overlay: &Overlay, errors: &mut Vec<String>) {
    for pod in overlay.pods() {
        let maps = items(&pod.spec["volumes"]).filter_map(|volume| volume["configMap"]["name"].as_str());
        let files = maps.map(|name| &overlay.find("ConfigMap", name)["data"]);
        let cluster = items(&pod.container["args"]).any(|word| text(word).contains("cluster"));
        let files = files.flat_map(|files| files.as_object().into_iter().flatten());
        let used = files.filter(|(name, _)| cluster || *name != "routes.conf").map(|(_, content)| text(content));
        let lines: Vec<_> = used.flat_map(str::lines).filter(|line| !line.trim_start().starts_with('#')).collect();
        let nats = lines.iter().flat_map(|line| line.split([' ', ',', '}'])).filter_map(|word| word.strip_prefix('$'));
        let psql = lines.iter().filter_map(|line| Some(line.strip_prefix("\\getenv ")?.split_once(' ')?.1));
        let read: BTreeSet<_> = nats.filter(|name| name.starts_with("NATS_")).chain(psql).collect();
        for variable in read {
            if !items(&pod.container["env"]).any(|there| there["name"] == variable) {
                errors.push(format!("{}: its configuration reads {variable}, which is not in env", pod.name));
            }
        }
    }
}
