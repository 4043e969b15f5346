//! Checks that every file that repeats the list of services agrees with `stack::services`.

use crate::files::Files;
use crate::overlay::{Overlay, items, text};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};
use stack::services::{HTTP_PORT, NATS_MONITORING_PORT, NATS_PORT, POSTGRES_PORT, SERVICES, Service};
use std::collections::BTreeSet;
use std::fmt::Debug;
use testkit::JWT_KEY;

pub fn check(files: &Files, overlays: &[Overlay], errors: &mut Vec<String>) {
    compose(&files.compose["services"], errors);
    skaffold(&files.skaffold, errors);
    roles(&files.roles, errors);
    let users: BTreeSet<_> = words_after(&files.users, "user:").collect();
    for service in SERVICES.iter().filter(|service| !users.contains(service.nats_user)) {
        errors.push(format!("users.conf: there is no user {}", service.nats_user));
    }
    for (path, script) in &files.scripts {
        let names = names().join(" ");
        let lists = [format!("for service in {names}; do"), format!("services=({names})\n")];
        if !lists.iter().any(|list| script.contains(list)) {
            errors.push(format!("{path}: it does not list the services {names}"));
        }
    }
    for overlay in overlays {
        let mut found = Vec::new();
        objects(overlay, &mut found);
        errors.extend(found.iter().map(|error| format!("{}: {error}", overlay.name)));
    }
}

fn names() -> [&'static str; 2] {
    SERVICES.map(|service| service.name)
}

fn equal<T: PartialEq + Debug + ?Sized>(what: &str, found: &T, wanted: &T, errors: &mut Vec<String>) {
    if found != wanted {
        errors.push(format!("{what} is {found:?}, and by stack::services it is {wanted:?}"));
    }
}

/// A variable of compose with its default.
fn or_default(variable: &str, default: &str) -> String {
    format!("${{{variable}:-{default}}}")
}

/// The variable with the password of a role or user, which is its name by default.
fn password(prefix: &str, user: &str) -> (String, String) {
    let variable = format!("{prefix}{}_PASSWORD", user.to_uppercase());
    let value = or_default(&variable, user);
    (variable, value)
}

fn compose(services: &Value, errors: &mut Vec<String>) {
    let mut same = |path: &str, wanted: Value| {
        let found = services.pointer(&format!("/{path}")).unwrap_or(&Value::Null);
        equal(&format!("docker-compose.yml: {path}"), &found.to_string(), &wanted.to_string(), errors);
    };
    for service in SERVICES {
        let Service { name, port, database, database_user, database_owner, nats_user, .. } = service;
        let migrate = format!("{name}-migrate");
        let ports = or_default(&format!("{}_PORT", name.to_uppercase()), &port.to_string());
        same(&format!("{name}/ports"), json!([format!("127.0.0.1:{ports}:{HTTP_PORT}")]));
        same(&format!("{name}/image"), json!(format!("ticketing/{name}")));
        same(&format!("{migrate}/image"), json!(format!("ticketing/{name}")));
        same(&format!("{migrate}/build/args/SERVICE"), json!(name));

        for (task, role) in [(*name, database_user), (migrate.as_str(), database_owner)] {
            let (variable, password) = password("", role);
            let url = format!("postgres://{role}:{password}@postgres:{POSTGRES_PORT}/{database}");
            same(&format!("{task}/environment/DATABASE_URL"), json!(url));
            same(&format!("postgres/environment/{variable}"), json!(password));
        }
        same(&format!("{migrate}/environment/DATABASE_ROLE"), json!(database_user));
        let (variable, password) = password("NATS_", nats_user);
        let url = format!("nats://{nats_user}:{password}@nats:{NATS_PORT}");
        same(&format!("{name}/environment/NATS_URL"), json!(url));
        same(&format!("nats/environment/{variable}"), json!(format!("\"{password}\"")));
        same(&format!("{name}/environment/JWT_KEY"), json!(or_default("JWT_KEY", JWT_KEY)));
        for (setting, value) in service.settings {
            same(&format!("{name}/environment/{setting}"), json!(value));
        }
    }
    let published =
        |variable: &str, port: u16| json!(format!("127.0.0.1:{}:{port}", or_default(variable, &port.to_string())));
    same("postgres/ports", json!([published("POSTGRES_PORT", POSTGRES_PORT)]));
    let monitoring = published("NATS_MONITORING_PORT", NATS_MONITORING_PORT);
    same("nats/ports", json!([published("NATS_PORT", NATS_PORT), monitoring]));

    let all = services.as_object().into_iter().flatten().map(|(name, _)| name.clone()).collect::<BTreeSet<_>>();
    let servers_and_tasks = ["postgres", "nats", "provision", "prometheus", "grafana"].map(str::to_owned);
    let ours = names().into_iter().flat_map(|name| [name.to_owned(), format!("{name}-migrate")]);
    equal("docker-compose.yml: services", &all, &ours.chain(servers_and_tasks).collect(), errors);
}

fn skaffold(skaffold: &Value, errors: &mut Vec<String>) {
    let artifacts: Vec<_> = items(&skaffold["build"]["artifacts"]).collect();
    let images = artifacts.iter().map(|artifact| text(&artifact["image"]).to_owned()).collect::<Vec<_>>();
    equal("skaffold.yaml: images", &images, &names().map(|name| format!("ticketing/{name}")).to_vec(), errors);
    for (artifact, name) in artifacts.iter().zip(names()) {
        let ignored = items(&artifact["custom"]["dependencies"]["ignore"]).map(|path| text(path).to_owned());
        let others = names().into_iter().filter(|other| *other != name).map(|other| format!("services/{other}"));
        let test_only = ["**/tests", "libs/load", "libs/stack", "libs/testkit"].map(str::to_owned);
        let wanted: Vec<_> = test_only.into_iter().chain(others).collect();
        equal(&format!("skaffold.yaml: what {name} ignores"), &ignored.collect(), &wanted, errors);
    }
    let forwards = items(&skaffold["portForward"]).map(|forward| {
        (text(&forward["resourceName"]).to_owned(), forward["port"].as_u64(), forward["localPort"].as_u64())
    });
    let forward = |name: &str, port: u16, local: u16| (format!("{name}-srv"), Some(port.into()), Some(local.into()));
    let services = SERVICES.map(|service| forward(service.name, HTTP_PORT, service.port));
    let servers = [NATS_PORT, NATS_MONITORING_PORT].map(|port| forward("nats", port, port));
    let wanted = services.into_iter().chain(servers).collect::<BTreeSet<_>>();
    equal("skaffold.yaml: portForward", &forwards.collect(), &wanted, errors);
}

fn roles(sql: &str, errors: &mut Vec<String>) {
    let found: BTreeSet<_> = words_after(sql, "\\getenv").map(str::to_owned).collect();
    let roles = SERVICES.iter().flat_map(|service| [service.database_owner, service.database_user]);
    let wanted = roles.map(|role| format!("{role}_password")).collect();
    equal("roles.sql: the passwords that it reads", &found, &wanted, errors);
    for Service { database, database_user, database_owner, .. } in SERVICES {
        equal("roles.sql: the owner of a database", *database_owner, &format!("{database}_owner"), errors);
        let grant = format!("grant connect on database {database} to {database_user};");
        if !sql.contains(&grant) {
            errors.push(format!("roles.sql: {grant} is missing"));
        }
    }
}

/// The second word of each line that begins with `first`.
fn words_after<'a>(text: &'a str, first: &'a str) -> impl Iterator<Item = &'a str> {
    text.lines().filter_map(move |line| line.trim().strip_prefix(first)?.split_whitespace().next())
}

fn objects(overlay: &Overlay, errors: &mut Vec<String>) {
    let deployments = overlay.of("Deployment").map(|it| text(&it["metadata"]["name"]).to_owned());
    let wanted = names().into_iter().map(|name| format!("{name}-depl")).collect::<BTreeSet<_>>();
    equal("Deployments", &deployments.collect(), &wanted, errors);
    let rules = overlay.of("Ingress").flat_map(|ingress| items(&ingress["spec"]["rules"]));
    let paths = rules.flat_map(|rule| items(&rule["http"]["paths"])).map(|path| text(&path["path"]).to_owned());
    let wanted = names().into_iter().map(|name| format!("/api/{name}")).collect::<BTreeSet<_>>();
    equal("Ingress: paths", &paths.collect(), &wanted, errors);

    for service in SERVICES {
        let Service { name, database, database_user, database_owner, nats_user, .. } = service;
        for (pod, role, secret) in [
            (name.to_string(), database_user, format!("{name}-database")),
            (format!("{name}-migrate"), database_owner, format!("{name}-database-owner")),
        ] {
            let reference = &variable(overlay, &pod, "DATABASE_URL")["valueFrom"]["secretKeyRef"];
            let url = format!("postgres://{role}:{role}@postgres-srv:{POSTGRES_PORT}/{database}");
            if overlay.is_prod() {
                equal(&format!("{pod}: the secret of DATABASE_URL"), text(&reference["name"]), &secret, errors);
            } else {
                equal(&format!("{pod}: DATABASE_URL"), &secret_value(overlay, reference), &url, errors);
            }
        }
        let role = text(&variable(overlay, &format!("{name}-migrate"), "DATABASE_ROLE")["value"]);
        equal(&format!("{name}-migrate: DATABASE_ROLE"), role, database_user, errors);
        let key = text(&variable(overlay, name, "NATS_PASSWORD")["valueFrom"]["secretKeyRef"]["key"]);
        equal(&format!("{name}: NATS_PASSWORD"), key, &format!("{}_PASSWORD", nats_user.to_uppercase()), errors);
        let url = text(&variable(overlay, name, "NATS_URL")["value"]);
        if !url.starts_with(&format!("nats://{nats_user}:$(NATS_PASSWORD)@")) {
            errors.push(format!("{name}: NATS_URL is {url}, and the user is {nats_user}"));
        }
        for (setting, value) in service.settings {
            equal(&format!("{name}: {setting}"), text(&variable(overlay, name, setting)["value"]), value, errors);
        }
        let pod = overlay.behind(&format!("{name}-srv"), HTTP_PORT.into());
        let image = pod.map(|pod| text(&pod.container["image"]).split(':').next().unwrap_or_default().to_owned());
        equal(&format!("{name}-srv: the image"), &image, &Some(format!("ticketing/{name}")), errors);
    }
}

/// A variable of the container of a pod.
fn variable<'a>(overlay: &'a Overlay, pod: &str, name: &str) -> &'a Value {
    let pod = overlay.objects.iter().find(|owner| {
        owner.pointer("/spec/template/metadata/labels/app.kubernetes.io~1name").is_some_and(|label| label == pod)
    });
    let env = pod.and_then(|pod| pod.pointer("/spec/template/spec/containers/0/env")).unwrap_or(&Value::Null);
    items(env).find(|variable| variable["name"] == name).unwrap_or(&Value::Null)
}

/// The secret and key of a `secretKeyRef`.
fn secret_value(overlay: &Overlay, reference: &Value) -> String {
    let data = &overlay.find("Secret", text(&reference["name"]))["data"][text(&reference["key"])];
    // A long value is wrapped.
    let value = BASE64_STANDARD.decode(text(data).split_whitespace().collect::<String>()).unwrap_or_default();
    String::from_utf8_lossy(&value).into_owned()
}
