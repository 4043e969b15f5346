//! The files beside the overlays that must agree with them.

use crate::overlay::ROOT;
use anyhow::{Context, Result};
use serde_json::Value;
use std::path::Path;

#[derive(Clone)]
pub struct Files {
    pub compose: Value,
    pub skaffold: Value,
    /// `infra/images/names`
    pub names: String,
    /// `infra/postgres/roles.sql`
    pub roles: String,
    /// `infra/nats/users.conf`
    pub users: String,
    /// `infra/k8s/components/monitoring/pod-monitor.yaml`, which is in no overlay.
    pub monitor: Value,
    /// Scripts that list the services, each with its path.
    pub scripts: [(&'static str, String); 3],
}

impl Files {
    pub fn read() -> Result<Self> {
        let read = |name| std::fs::read_to_string(Path::new(ROOT).join(name)).context(name);
        let script = |name| Ok::<_, anyhow::Error>((name, read(name)?));
        Ok(Self {
            compose: serde_saphyr::from_str(&read("docker-compose.yml")?)?,
            skaffold: serde_saphyr::from_str(&read("skaffold.yaml")?)?,
            monitor: serde_saphyr::from_str(&read("infra/k8s/components/monitoring/pod-monitor.yaml")?)?,
            names: read("infra/images/names")?,
            roles: read("infra/postgres/roles.sql")?,
            users: read("infra/nats/users.conf")?,
            scripts: [script("infra/docker/compile")?, script("infra/docker/build")?, script("infra/k8s/try")?],
        })
    }
}
