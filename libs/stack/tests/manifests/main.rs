//! The rendered overlays, and the files that must agree with them.
//!
//! Needs kubectl, and no cluster. `infra/k8s/check` runs it, and checks the fields of the objects.

mod files;
mod images;
mod monitoring;
mod network;
mod overlay;
mod references;
mod services;
mod settings;

use crate::files::Files;
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
    services::check(files, overlays, &mut all);
    monitoring::check(&files.monitor, overlays, &mut all);
    all
}

#[test]
fn manifests_are_complete_and_agree_with_each_other() -> Result<()> {
    let errors = errors(&Files::read()?, &overlays()?);
    ensure!(errors.is_empty(), "{errors:#?}");
    Ok(())
}

/// An overlay, an object, a path, its new value, and a part of the error.
///
/// `null` removes the value; an empty path removes the object.
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
dev | Ingress/ingress | spec/rules/0/http/paths/0/path | "/api/ticket" | Ingress: paths
dev | Deployment/orders-depl | metadata/name | "orders" | Deployments
dev | Deployment/orders-depl | CONTAINER/env/0/valueFrom/secretKeyRef/name | "tickets-database" | orders: DATABASE_URL
prod | Deployment/orders-depl | CONTAINER/env/2/valueFrom/secretKeyRef/name | "orders" | the secret of DATABASE_URL
dev | Deployment/orders-depl | CONTAINER/env/1/valueFrom/secretKeyRef/key | "ADMIN_PASSWORD" | orders: NATS_PASSWORD
dev | Deployment/orders-depl | CONTAINER/env/2/value | "nats://tickets:$(NATS_PASSWORD)@nats-srv:4222" | the user is orders
dev | Deployment/orders-depl | CONTAINER/env/4/value | "true" | orders: PROVISION
dev | Deployment/orders-depl | CONTAINER/image | "ticketing/tickets:1" | orders-srv: the image
dev | Job/orders-migrate | CONTAINER/env/1/value | "tickets" | orders-migrate: DATABASE_ROLE
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

/// A change, and a part of the error.
type Mistake = (fn(&mut Files), &'static str);

#[test]
fn each_file_that_differs_from_the_list_of_services_is_an_error() -> Result<()> {
    let (right, overlays) = (Files::read()?, overlays()?);
    let mistakes: [Mistake; 18] = [
        (|files| service(files, "tickets")["ports"] = json!(["127.0.0.1:${TICKETS_PORT:-3003}:3000"]), "tickets/ports"),
        (|files| service(files, "nats")["ports"][0] = json!("127.0.0.1:4222:4222"), "nats/ports"),
        (|files| service(files, "orders")["image"] = json!("ticketing/tickets"), "orders/image"),
        (|files| environment(files, "orders", "DATABASE_URL", "postgres://orders@postgres:5432/tickets"), "orders/env"),
        (
            |files| environment(files, "orders", "NATS_URL", "nats://admin:admin@nats:4222"),
            "orders/environment/NATS_URL",
        ),
        (|files| environment(files, "orders", "PROVISION", "true"), "orders/environment/PROVISION"),
        (|files| environment(files, "orders", "JWT_KEY", "key"), "orders/environment/JWT_KEY"),
        (|files| environment(files, "orders-migrate", "DATABASE_ROLE", "tickets"), "orders-migrate/env"),
        (|files| environment(files, "postgres", "ORDERS_PASSWORD", "orders"), "postgres/env"),
        (|files| environment(files, "nats", "NATS_ORDERS_PASSWORD", "orders"), "nats/env"),
        (|files| files.monitor["spec"]["jobLabel"] = json!("app"), "PodMonitor finds the jobs"),
        (|files| files.monitor["spec"]["selector"] = json!({}), "PodMonitor finds the jobs"),
        (|files| files.monitor["spec"]["podMetricsEndpoints"][0]["port"] = json!("web"), "has no port \"web\""),
        (|files| files.compose["services"]["payments"] = json!({}), "docker-compose.yml: services"),
        (|files| files.skaffold["portForward"][0]["localPort"] = json!(3003), "portForward"),
        (|files| files.roles = files.roles.replace("to orders;", "to tickets;"), "roles.sql"),
        (|files| files.users = files.users.replace("user: orders", "user: order"), "users.conf"),
        (|files| files.scripts[0].1 = files.scripts[0].1.replace("tickets orders", "tickets"), "infra/docker/compile"),
    ];
    for (mistake, expected) in mistakes {
        let mut wrong = right.clone();
        mistake(&mut wrong);
        let errors = errors(&wrong, &overlays);
        ensure!(errors.iter().any(|error| error.contains(expected)), "{expected} is not in {errors:#?}");
    }
    Ok(())
}

fn service<'a>(files: &'a mut Files, name: &str) -> &'a mut Value {
    &mut files.compose["services"][name]
}

fn environment(files: &mut Files, name: &str, variable: &str, value: &str) {
    service(files, name)["environment"][variable] = json!(value);
}
