//! The subcommands of a service.

use std::process::{Command, Output};

use testkit::{Postgres, free_port};

pub fn hello(arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    let tests = std::env::current_exe().unwrap();
    let program = tests.parent().unwrap().parent().unwrap().join("examples/hello");
    let mut command = Command::new(program);
    for variable in ["DATABASE_URL", "NATS_URL", "JWT_KEY", "RUST_LOG", "TOPOLOGY"] {
        command.env_remove(variable);
    }
    command.args(arguments).envs(variables.iter().copied()).output().unwrap()
}

pub fn text(output: &[u8]) -> String {
    String::from_utf8_lossy(output).into_owned()
}

/// It failed, and said why.
pub fn assert_fails(output: &Output, code: i32, reason: &str) {
    assert_eq!(output.status.code(), Some(code), "{output:?}");
    let said = text(&output.stdout) + &text(&output.stderr);
    assert!(said.contains(reason), "{said}");
}

#[tokio::test]
async fn migrate_needs_only_the_database_and_is_idempotent() {
    let postgres = Postgres::shared().await.unwrap();
    let url = postgres.database("tasks").await.unwrap();
    for _ in 0..2 {
        let output = hello(&["migrate"], &[("DATABASE_URL", &url), ("DATABASE_ROLE", "tickets"), ("NATS_URL", "")]);
        assert!(output.status.success(), "{output:?}");
    }
    let refused = hello(&["migrate", "--database-role", "nobody \"; drop"], &[("DATABASE_URL", &url)]);
    assert_fails(&refused, 1, "granting to nobody");
}

#[tokio::test]
async fn migrate_waits_for_postgres_until_its_patience_ends() {
    let url = format!("postgres://127.0.0.1:{}/none", free_port());
    let begun = std::time::Instant::now();
    let output = hello(&["migrate", "--database-url", &url, "--patience", "1s"], &[]);
    assert_fails(&output, 1, "refused");
    assert!(begun.elapsed().as_secs_f32() >= 1.0, "it gave up at once");

    let postgres = Postgres::shared().await.unwrap();
    let wrong = postgres.url("postgres", "there_is_none");
    assert_fails(&hello(&["migrate", "--database-url", &wrong, "--patience", "10m"], &[]), 1, "does not exist");
}

#[test]
fn provision_reports_the_server_it_waited_for() {
    let url = format!("127.0.0.1:{}", free_port());
    let output = hello(&["provision", "--nats-url", &url, "--patience", "1s"], &[]);
    assert_fails(&output, 1, "NATS is not connected");
    let output = hello(&["provision", "--nats-url", &url, "--nats-ca", "/none"], &[]);
    assert_fails(&output, 1, "nats.authority: there is no file /none");
}

#[tokio::test]
async fn health_checks_the_service_at_the_address() {
    let nobody = format!("127.0.0.1:{}", free_port());
    assert_fails(&hello(&["health"], &[("HTTP_ADDR", &nobody)]), 1, "nothing answers");

    // Without Postgres a service is alive and not ready.
    let running = crate::server::start(axum::Router::new()).await;
    let port = running.address.port().to_string();
    let ask = move |host: &str| hello(&["health", "--http-addr", &format!("{host}:{port}")], &[]);
    let asked = tokio::task::spawn_blocking(move || [ask("127.0.0.1"), ask("0.0.0.0")]).await.unwrap();
    for output in asked {
        assert_fails(&output, 1, "is not ready: HTTP/1.1 503");
    }
}

#[test]
fn republish_needs_to_know_what() {
    let url = [("DATABASE_URL", "postgres://127.0.0.1:1/none")];
    for arguments in [vec!["republish"], vec!["republish", "--all", "--since", "2h"], vec!["republish", "--id"]] {
        assert_fails(&hello(&arguments, &url), 2, "--id");
    }
}

#[tokio::test]
async fn republish_without_a_stream_of_the_service_fails() {
    let postgres = Postgres::shared().await.unwrap();
    let url = postgres.database("tasks").await.unwrap();
    assert!(hello(&["migrate"], &[("DATABASE_URL", &url)]).status.success());
    let refused = hello(&["republish", "--all"], &[("DATABASE_URL", &url)]);
    assert_fails(&refused, 1, "no stream of this database can be republished");
}

#[test]
fn an_unknown_subcommand_fails_and_help_lists_the_known_ones() {
    assert_fails(&hello(&["upgrade"], &[]), 2, "unrecognized subcommand");
    let help = text(&hello(&["--help"], &[]).stdout);
    assert!(help.starts_with("Greets"), "{help}");
    for task in ["migrate", "provision", "republish", "recover", "health"] {
        assert!(help.contains(task), "{help}");
    }
    // It has no replica.
    for task in ["verify", "rebuild"] {
        assert!(!help.contains(task), "{help}");
        assert_fails(&hello(&[task], &[("DATABASE_URL", "postgres://127.0.0.1:1/none")]), 1, "has no replica");
    }
}
