//! The example `hello` as a process. `cargo test` builds it.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};

use serde_json::Value;

fn hello(options: &[&str]) -> Command {
    let tests = std::env::current_exe().unwrap();
    let program = tests.parent().unwrap().parent().unwrap().join("examples/hello");
    let mut command = Command::new(program);
    command.args(["--http-addr=127.0.0.1:0", "--log-format=json", "--database-url=postgres://u:hidden@127.0.0.1:1/x"]);
    command.args(options).env_remove("JWT_KEY").env_remove("RUST_LOG").stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Waits until the process serves, and returns its address.
fn address(lines: &mut impl Iterator<Item = std::io::Result<String>>) -> String {
    let serving = lines.map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap());
    let serving = serving.into_iter().find(|line| line["message"] == "serving").unwrap();
    serving["address"].as_str().unwrap().to_owned()
}

/// Begins a request that keeps the process from stopping, on a connection that must be held.
fn begin_endless_request(lines: &mut impl Iterator<Item = std::io::Result<String>>) -> TcpStream {
    let mut client = TcpStream::connect(address(lines)).unwrap();
    client.write_all(b"GET /never HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    assert!(lines.any(|line| line.unwrap().contains("never ends")));
    client
}

fn kill(child: &Child, signal: &str) {
    assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
}

#[test]
fn the_first_signal_stops_a_service_cleanly() {
    for signal in ["-TERM", "-INT"] {
        let mut child = hello(&["--jwt-key=key"]).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        address(&mut lines);
        kill(&child, signal);
        assert_eq!(child.wait().unwrap().code(), Some(0));
        assert!(lines.last().unwrap().unwrap().contains("stopped"));
    }
}

#[test]
fn a_second_signal_ends_a_service_at_once() {
    for (signal, code) in [("-TERM", 143), ("-INT", 130)] {
        let mut child = hello(&["--jwt-key=key"]).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let _client = begin_endless_request(&mut lines);
        kill(&child, signal);
        assert!(lines.any(|line| line.unwrap().contains("stopping")));
        kill(&child, signal);
        assert_eq!(child.wait().unwrap().code(), Some(code));
    }
}

#[test]
fn a_request_that_never_ends_makes_the_stop_fail() {
    let mut child = hello(&["--jwt-key=key", "--stop-grace=200ms"]).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let _client = begin_endless_request(&mut lines);
    kill(&child, "-TERM");
    assert_eq!(child.wait().unwrap().code(), Some(1));
}

#[test]
fn a_task_that_ends_by_itself_ends_the_process() {
    let output = hello(&["--jwt-key=key", "--broken"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8(output.stdout).unwrap().contains("background ended by itself"));
}

#[test]
fn an_empty_variable_counts_as_absent() {
    let mut command = hello(&["--broken"]);
    let empty = ["NATS_URL", "NATS_CLIENT_ID", "JWT_PUBLIC_KEY", "STOP_GRACE", "PROVISION", "RUST_LOG", "HTTP_ADDR"];
    let output = command.env("JWT_KEY", "key").envs(empty.map(|name| (name, ""))).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "it started: {}", String::from_utf8_lossy(&output.stderr));
    let output = hello(&[]).env("JWT_KEY", "").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn neither_help_nor_logs_hold_a_secret() {
    let secrets = ["JWT_KEY", "JWT_PUBLIC_KEY", "DATABASE_URL", "NATS_URL", "NATS_TOKEN"].map(|name| (name, "hidden"));
    for arguments in [&["--help"][..], &["migrate", "--help"], &["provision", "--help"]] {
        let output = hello(arguments).envs(secrets).output().unwrap();
        assert!(output.status.success());
        let help = String::from_utf8(output.stdout).unwrap();
        assert!(!help.contains("hidden"), "{help}");
        assert!(help.contains("A number without a unit is in seconds"), "{help}");
    }
    let output = hello(&["--broken"]).env("JWT_KEY", "hidden").env("NATS_URL", "nats://u:hidden@n").output().unwrap();
    let log = String::from_utf8(output.stdout).unwrap();
    assert!(log.contains("127.0.0.1:1/x") && !log.contains("hidden"), "{log}");
}

#[test]
fn a_wrong_option_is_explained() {
    for wrong in ["--log=a=b=c", "--stop-grace=soon", "--max-requests=0", "--http-addr=x"] {
        let mut child = hello(&["--jwt-key=key", wrong]).spawn().unwrap();
        let mut explained = String::new();
        child.stderr.take().unwrap().read_to_string(&mut explained).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(2));
        assert!(explained.contains(wrong.split('=').next().unwrap()), "{explained}");
    }
}
