//! Checks that the monitor of the component `monitoring` selects exactly the services, by a port that they have.

use crate::overlay::{Overlay, items, selects, text};
use serde_json::Value;
use stack::services::SERVICES;
use std::collections::BTreeSet;

pub fn check(monitor: &Value, overlays: &[Overlay], errors: &mut Vec<String>) {
    let spec = &monitor["spec"];
    let label = text(&spec["jobLabel"]);
    for overlay in overlays {
        let selected: Vec<_> = overlay.pods().filter(|pod| selects(&spec["selector"], pod.labels)).collect();
        let jobs: BTreeSet<_> = selected.iter().map(|pod| text(&pod.labels[label])).collect();
        let wanted = SERVICES.iter().map(|service| service.name).collect();
        if jobs != wanted {
            errors.push(format!("{}: PodMonitor finds the jobs {jobs:?}, not {wanted:?}", overlay.name));
        }
        for (pod, endpoint) in
            selected.iter().flat_map(|pod| items(&spec["podMetricsEndpoints"]).map(move |it| (pod, it)))
        {
            if !items(&pod.container["ports"]).any(|port| port["name"] == endpoint["port"]) {
                errors.push(format!("{}: {} has no port {} for PodMonitor", overlay.name, pod.name, endpoint["port"]));
            }
        }
    }
}
