//! The objects of an overlay as `kubectl kustomize` renders them.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

pub const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

#[derive(Clone)]
pub struct Overlay {
    pub name: &'static str,
    pub objects: Vec<Value>,
    /// The secrets that must exist in the cluster, as comments list them: `name/key`.
    pub documented: BTreeSet<String>,
}

/// A template of pods. Each has one container.
pub struct Pod<'a> {
    pub name: &'a str,
    pub labels: &'a Value,
    pub owner: &'a Value,
    pub spec: &'a Value,
    pub container: &'a Value,
}

impl Overlay {
    pub fn render(name: &'static str) -> Result<Self> {
        let path = Path::new(ROOT).join("infra/k8s/overlays").join(name);
        let output = Command::new("kubectl").arg("kustomize").arg(&path).output().context("cannot run kubectl")?;
        ensure!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
        let objects = serde_saphyr::from_multiple(&String::from_utf8(output.stdout)?)?;
        Ok(Self { name, objects, documented: documented(name)? })
    }

    pub fn is_prod(&self) -> bool {
        self.name.starts_with("prod")
    }

    pub fn of<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a Value> {
        self.objects.iter().filter(move |object| object["kind"] == kind)
    }

    pub fn find<'a>(&'a self, kind: &'a str, name: &str) -> &'a Value {
        self.of(kind).find(|object| object["metadata"]["name"] == name).unwrap_or(&Value::Null)
    }

    pub fn pods(&self) -> impl Iterator<Item = Pod<'_>> {
        self.objects.iter().filter_map(|owner| {
            let (labels, spec) = (owner.pointer("/spec/template/metadata/labels")?, &owner["spec"]["template"]["spec"]);
            let name = text(&labels["app.kubernetes.io/name"]);
            Some(Pod { name, labels, owner, spec, container: &spec["containers"][0] })
        })
    }

    /// The pod behind a service, if the service has that port.
    pub fn behind(&self, service: &str, port: u64) -> Option<Pod<'_>> {
        let spec = &self.find("Service", service)["spec"];
        items(&spec["ports"]).find(|there| there["port"] == port)?;
        self.pods().find(|pod| covers(pod.labels, &spec["selector"]))
    }
}

/// The lines `#   name: KEY, KEY` of the kustomizations that need secrets.
fn documented(overlay: &str) -> Result<BTreeSet<String>> {
    let parts: &[_] = match overlay {
        "dev" => &[],
        "prod" => &["overlays/prod"],
        _ => &["overlays/prod", "components/nats-tls", "components/postgres-ca"],
    };
    let mut found = BTreeSet::new();
    for part in parts {
        let file = std::fs::read_to_string(format!("{ROOT}/infra/k8s/{part}/kustomization.yaml"))?;
        let secrets = file.lines().filter_map(|line| line.strip_prefix("#   ")?.split_once(": "));
        found.extend(secrets.flat_map(|(name, keys)| keys.split(", ").map(move |key| format!("{name}/{key}"))));
    }
    Ok(found)
}

pub fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

pub fn items(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// Whether the labels match `matchLabels` or the selector of a service.
pub fn covers(labels: &Value, wanted: &Value) -> bool {
    wanted.as_object().into_iter().flatten().all(|(key, value)| labels[key] == *value)
}

/// Whether a label selector matches. An empty one matches everything.
pub fn selects(selector: &Value, labels: &Value) -> bool {
    let matches = |expression: &Value| {
        assert_eq!(expression["operator"], "In", "the tests know no other operator: {expression}");
        items(&expression["values"]).any(|value| *value == labels[text(&expression["key"])])
    };
    covers(labels, &selector["matchLabels"]) && items(&selector["matchExpressions"]).all(matches)
}
