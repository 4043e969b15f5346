//! The command `provision` with files of a directory.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use testkit::{Client, Nats};

use crate::tasks::{assert_fails, hello};

/// The directory that `TOPOLOGY` names. Removed when it is dropped.
struct Directory(PathBuf);

impl Directory {
    /// The built-in files, as Kubernetes mounts a `ConfigMap`: links, through a hidden link, into a hidden directory.
    fn new(name: &str) -> Self {
        let directory = std::env::temp_dir().join(format!("bootstrap-{}-{name}", std::process::id()));
        let data = directory.join("..2026_11_21");
        fs::create_dir_all(&data).unwrap();
        symlink("..2026_11_21", directory.join("..data")).unwrap();
        for file in fs::read_dir(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/jetstream"))).unwrap() {
            let file = file.unwrap();
            fs::copy(file.path(), data.join(file.file_name())).unwrap();
            symlink(Path::new("..data").join(file.file_name()), directory.join(file.file_name())).unwrap();
        }
        Self(directory)
    }

    fn set(&self, file: &str, option: &str, value: Value) {
        let path = self.0.join(file);
        let mut options: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        options[option] = value;
        fs::write(path, options.to_string()).unwrap();
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The streams and their consumers, as the server reports them.
async fn streams(nats: &Nats) -> Vec<Value> {
    let monitoring = Client::new(&nats.monitoring_url());
    let path = "/jsz?accounts=true&streams=true&consumers=true&config=true";
    let report = monitoring.get(path).await.unwrap().expect(200).unwrap();
    report["account_details"][0]["stream_detail"].as_array().unwrap().clone()
}

async fn stream(nats: &Nats, name: &str) -> Value {
    streams(nats).await.into_iter().find(|stream| stream["name"] == name).unwrap()
}

#[tokio::test]
async fn provision_uses_the_files_of_the_directory() {
    let nats = Nats::start().await.unwrap();
    let directory = Directory::new("limit");
    directory.set("TICKETS.stream.json", "max_bytes", json!(4096 * 1024));
    let url = nats.url_of("provisioner");
    let provision = |topology: &str| hello(&["provision"], &[("NATS_URL", &url), ("TOPOLOGY", topology)]);

    let output = provision(directory.0.to_str().unwrap());
    assert!(output.status.success(), "{output:?}");
    assert_eq!(stream(&nats, "TICKETS").await["config"]["max_bytes"], 4096 * 1024);
    assert_eq!(streams(&nats).await.len(), 4);

    // An empty variable counts as absent.
    let output = provision("");
    assert!(output.status.success(), "{output:?}");
    assert_eq!(stream(&nats, "TICKETS").await["config"]["max_bytes"], 2_147_483_648_u64);
}

#[test]
fn a_file_that_breaks_a_guarantee_is_refused_before_any_change() {
    let directory = Directory::new("refused");
    directory.set("ORDERS.tickets.consumer.json", "max_deliver", json!(5));
    let output = hello(&["provision", "--topology", directory.0.to_str().unwrap()], &[]);
    assert_fails(&output, 2, "ORDERS.tickets.consumer.json: max_deliver is 5: the server drops an event");
}

#[tokio::test]
async fn provision_applies_what_the_server_permits_and_then_fails() {
    let nats = Nats::start().await.unwrap();
    let url = nats.url_of("provisioner");
    let directory = Directory::new("unchangeable");
    let provision = || hello(&["provision", "--topology", directory.0.to_str().unwrap(), "--nats-url", &url], &[]);
    directory.set("EXPIRATION.orders.consumer.json", "deliver_policy", json!("new"));
    let output = provision();
    assert!(output.status.success(), "{output:?}");

    directory.set("EXPIRATION.orders.consumer.json", "deliver_policy", json!("all"));
    directory.set("EXPIRATION.orders.consumer.json", "max_ack_pending", json!(99));
    directory.set("TICKETS.orders.consumer.json", "max_ack_pending", json!(98));
    let output = provision();
    assert_fails(&output, 1, "consumer orders of EXPIRATION: deliver_policy stays");
    assert_fails(&output, 1, "`nats consumer rm EXPIRATION orders`");
    for (name, expected) in [("EXPIRATION", 99), ("TICKETS", 98)] {
        let stream = stream(&nats, name).await;
        assert_eq!(stream["consumer_detail"][0]["config"]["max_ack_pending"], expected, "{stream}");
    }
}
