//! What is deployed: the overlays as they are rendered, and the files that have to agree with them.
//! Needs kubectl, and no cluster. `infra/k8s/check` runs it, and checks the fields of the objects.

mod images;
mod network;
mod overlay;
mod references;
mod settings;

use crate::images::Files;
use crate::overlay::{Overlay, text};
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

fn overlays() -> Result<Vec<Overlay>> {
    ["dev", "prod", "prod-tls"].into_iter().map(Overlay::render).collect()
}

fn errors(files: &Files, overlays: &[Overlay]) -> Vec<String> {
    let mut all = Vec::new();
    for overlay in overlays {
        let mut errors = Vec::new();
        settings::check(overlay, &mut errors);
        references::check(overlay, &mut errors);
        network::check(overlay, &mut errors);
        all.extend(errors.iter().map(|error| format!("{}: {error}", overlay.name)));
    }
    images::check(files, overlays, &mut all);
    all
}

#[test]
fn manifests_are_complete_and_agree_with_each_other() -> Result<()> {
    let errors = errors(&Files::read()?, &overlays()?);
    ensure!(errors.is_empty(), "{errors:#?}");
    Ok(())
}

/// An overlay, an object, what is set in it (`null` removes it, an empty path the object), and a part of the error.
const MISTAKES: &str = r#"
dev | Deployment/orders-depl | metadata/namespace | "default" | metadata/namespace
dev | Deployment/orders-depl | POD/automountServiceAccountToken | null | automountServiceAccountToken
dev | Deployment/orders-depl | POD/securityContext/runAsNonRoot | false | runAsNonRoot
dev | Job/orders-migrate | POD/securityContext/runAsUser | null | runAsUser
dev | StatefulSet/nats | POD/securityContext/fsGroupChangePolicy | "Always" | fsGroupChangePolicy
dev | StatefulSet/nats | CONTAINER/securityContext/capabilities/drop | [] | capabilities
dev | Job/orders-migrate | CONTAINER/securityContext/readOnlyRootFilesystem | null | readOnlyRootFilesystem
dev | Job/orders-migrate | CONTAINER/resources/limits/memory | null | limits/memory
dev | Deployment/orders-depl | CONTAINER/readinessProbe/httpGet/path | "/healthz" | readinessProbe
dev | Deployment/orders-depl | CONTAINER/livenessProbe | null | livenessProbe
dev | StatefulSet/nats | CONTAINER/startupProbe | null | startupProbe
dev | Job/orders-migrate | spec/backoffLimit | null | backoffLimit
dev | Deployment/orders-depl | spec/strategy/rollingUpdate/maxUnavailable | 1 | maxUnavailable
dev | Deployment/orders-depl | POD/terminationGracePeriodSeconds | 25 | grace period 25
dev | Deployment/orders-depl | CONTAINER/lifecycle | null | grace period
dev | StatefulSet/nats | POD/terminationGracePeriodSeconds | 30 | grace period 30
dev | Service/nats-srv | spec/publishNotReadyAddresses | null | publishNotReadyAddresses
prod | Deployment/orders-depl | spec/replicas | 2 | replicas
prod | Deployment/orders-depl | CONTAINER/image | "ticketing/orders" | no version
prod | PodDisruptionBudget/nats | | null | PodDisruptionBudget
prod | HorizontalPodAutoscaler/orders | | null | HorizontalPodAutoscaler
prod | Ingress/ingress | spec/tls | null | tls
dev | Deployment/orders-depl | CONTAINER/env/1/name | "PASSWORD" | $(NATS_PASSWORD) is used before
dev | StatefulSet/nats | CONTAINER/args/3 | "$(NODE_NAME)" | $(NODE_NAME) is used before
dev | Deployment/orders-depl | CONTAINER/env/4/name | "NATS_URL" | NATS_URL is defined twice
dev | Service/orders-srv | spec/selector | {} | its selector matches
dev | Deployment/orders-depl | spec/selector/matchLabels | {"app.kubernetes.io/name": "tickets"} | its selector matches
dev | Service/orders-srv | spec/ports/0/targetPort | "web" | does not listen at 3000
dev | Deployment/orders-depl | CONTAINER/env/0/valueFrom/secretKeyRef/key | "URL" | orders-database
dev | ConfigMap/postgres-roles | | null | ConfigMap postgres-roles
prod | Deployment/orders-depl | CONTAINER/env/2/valueFrom/secretKeyRef/name | "nats" | is not there
prod | Ingress/ingress | spec/tls/0/secretName | "tls" | nothing uses it
dev | StatefulSet/nats | CONTAINER/env/3/name | "NATS_PASSWORD" | reads NATS_TICKETS_PASSWORD
dev | StatefulSet/postgres | CONTAINER/env/4/name | "ORDERS" | reads ORDERS_PASSWORD
dev | Deployment/orders-depl | CONTAINER/env/2/value | "nats://nats:4222" | nothing listens at nats:4222
dev | Ingress/ingress | spec/rules/0/http/paths/0/path | "/api/orders" | leads to the wrong place
prod | NetworkPolicy/default-deny | | null | no policy denies everything
prod | NetworkPolicy/nats | spec/ingress/0/from | null | Ingress policies allow ("anywhere", "nats", "TCP", 4222)
prod | NetworkPolicy/postgres | spec/egress/0/ports/0/port | 5433 | Egress policies deny ("orders", "anywhere"
prod | NetworkPolicy/nats-clients | spec/egress/0/ports | null | Egress policies allow ("orders", "nats", "", 0)
prod | NetworkPolicy/names | spec/podSelector | {"matchLabels": {"a": "b"}} | Egress policies deny ("nats", "kube-system/kube-dns"
"#;

/// The names of config maps end with a hash.
fn change(overlay: &mut Overlay, object: &str, path: &str, value: Value) -> Result<()> {
    let name = |it: &Value| format!("{}/{}", text(&it["kind"]), text(&it["metadata"]["name"]));
    let index = overlay.objects.iter().position(|it| name(it).starts_with(object)).context("no such object")?;
    let Some((parent, key)) = path.rsplit_once('/') else {
        overlay.objects.remove(index);
        return Ok(());
    };
    let parent = parent.replace("CONTAINER", "POD/containers/0").replace("POD", "spec/template/spec");
    let parent = overlay.objects[index].pointer_mut(&format!("/{parent}")).context("no such path")?;
    match parent {
        Value::Object(fields) if value.is_null() => drop(fields.remove(key).context("nothing to remove")?),
        Value::Array(items) => items[key.parse::<usize>()?] = value,
        _ => parent[key] = value,
    }
    Ok(())
}

#[test]
fn each_mistake_in_a_manifest_is_an_error() -> Result<()> {
    let (files, right) = (Files::read()?, overlays()?);
    for mistake in MISTAKES.lines().filter(|line| !line.is_empty()) {
        let columns: Vec<_> = mistake.splitn(5, '|').map(str::trim).collect();
        let [overlay, object, path, value, expected] = columns[..] else { bail!("{mistake}") };
        let mut wrong = right.clone();
        let overlay = wrong.iter_mut().find(|it| it.name == overlay).context("no such overlay")?;
        change(overlay, object, path, serde_json::from_str(value)?).context(mistake)?;
        let errors = errors(&files, &wrong);
        ensure!(errors.iter().any(|error| error.contains(expected)), "{mistake}: {errors:#?}");
    }
    Ok(())
}

#[test]
fn each_image_under_another_name_is_an_error() -> Result<()> {
    let (right, overlays) = (Files::read()?, overlays()?);
    let mistakes: [fn(&mut Files); 4] = [
        |files| files.compose["services"]["nats"]["image"] = json!("nats:2.14"),
        |files| files.skaffold["build"]["artifacts"][0]["image"] = json!("ticketing/ticket"),
        |files| files.names = files.names.replace("postgres:18", "postgres:17"),
        |files| files.skaffold["portForward"][0]["port"] = json!(3001),
    ];
    for (index, mistake) in mistakes.iter().enumerate() {
        let mut wrong = right.clone();
        mistake(&mut wrong);
        ensure!(!errors(&wrong, &overlays).is_empty(), "mistake {index} is not seen");
    }
    Ok(())
}
