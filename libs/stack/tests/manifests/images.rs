//! Checks that images have the same names wherever they are built, pulled or run.

use crate::files::Files;
use crate::overlay::{Overlay, items, text};
use serde_json::Value;
use std::collections::BTreeSet;

pub fn check(files: &Files, overlays: &[Overlay], errors: &mut Vec<String>) {
    let Files { compose, skaffold, names, .. } = files;
    let built = items(&skaffold["build"]["artifacts"]).map(|artifact| text(&artifact["image"]));
    let pulled = names.lines().filter_map(|line| line.split_once('=')).map(|(_, image)| image);
    let all: BTreeSet<_> = built.chain(pulled).collect();
    let services = compose["services"].as_object().into_iter().flat_map(|services| services.values());
    let mut users =
        vec![("docker-compose.yml", services.map(|service| text(&service["image"])).collect::<BTreeSet<_>>())];
    users.extend(overlays.iter().map(|it| (it.name, it.pods().map(|pod| text(&pod.container["image"])).collect())));
    for (user, images) in users {
        let found: BTreeSet<_> = images.into_iter().map(|image| untagged(image, &all)).collect();
        // In a cluster, monitoring is that of the cluster, and in production Postgres is yours.
        let is_absent = |image: &&str| match user {
            "docker-compose.yml" => false,
            "dev" => image.starts_with("prom/") || image.starts_with("grafana/"),
            _ => !image.starts_with("nats:") && !image.starts_with("ticketing/"),
        };
        let ours = |image: &&str| !is_absent(image);
        let wanted: BTreeSet<_> = all.iter().copied().filter(ours).collect();
        if found != wanted {
            errors.push(format!("{user} runs {found:?}, and {wanted:?} are built or pulled"));
        }
    }
    forwards(skaffold, overlays, errors);
}

/// The name of an image without its tag: the images of services have a different tag in each place.
fn untagged<'a>(image: &'a str, all: &BTreeSet<&str>) -> &'a str {
    image.split_once(':').map(|(name, _)| name).filter(|name| all.contains(name)).unwrap_or(image)
}

/// Checks that the services that skaffold forwards exist. Skaffold itself would only warn.
fn forwards(skaffold: &Value, overlays: &[Overlay], errors: &mut Vec<String>) {
    for forward in items(&skaffold["portForward"]) {
        let (service, port) = (text(&forward["resourceName"]), forward["port"].as_u64().unwrap_or_default());
        if forward["namespace"] != "ticketing" || !overlays.iter().any(|it| it.behind(service, port).is_some()) {
            errors.push(format!("skaffold.yaml: nothing listens at {service}:{port}"));
        }
    }
}
