//! The ways to authenticate, each at a server that accepts no other, and a JetStream domain.

use crate::documents::Id;
use crate::harness::{Harness, append};
use crate::subscribing::Recorder;
use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use event_bus::{Authentication, Bus, NatsSettings};
use nkeys::KeyPair;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, IsCa};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::Duration;
use testkit::{Client, Nats, NatsSetup};

/// A file that is removed when it is dropped.
struct File(PathBuf);

impl File {
    fn new(content: &str) -> Self {
        let file = std::env::temp_dir().join(format!("event-bus-{}-{}", std::process::id(), Id::generate()));
        std::fs::write(&file, content).unwrap();
        Self(file)
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// What is not configured by a test.
fn server(text: &str) -> NatsSetup {
    let text = format!("http: 8222\njetstream {{ store_dir: /data }}\n{text}\n");
    NatsSetup { own_configuration: Some(text), ..NatsSetup::default() }
}

fn authenticated_by(authentication: Authentication) -> NatsSettings {
    NatsSettings { authentication: Some(authentication), ..NatsSettings::default() }
}

/// A bus that connects as `settings` say carries events. One that connects as `others` say does not connect.
async fn only_these_connect(setup: NatsSetup, settings: NatsSettings, others: NatsSettings) {
    let mut harness = Harness::start_with(setup, settings).await;
    events_arrive(&mut harness).await;
    let others = NatsSettings { url: harness.nats.server(), ..others };
    let refused = event_bus::provision(&others, &harness.topology, Duration::from_secs(3)).await;
    assert!(refused.is_err(), "the server accepts {others:?}");
}

/// Creates the streams, publishes events and applies them.
async fn events_arrive(harness: &mut Harness) -> Bus {
    let bus = harness.relay_through(&harness.nats.server()).await;
    let recorder = Recorder::default();
    harness.tasks.spawn(bus.clone().subscribe("reader", recorder.clone(), harness.stop.clone()));
    let event_ids = append(&bus, Id::generate(), 0..3).await;
    recorder.has(&event_ids).await;
    bus
}

#[tokio::test]
async fn a_bus_connects_with_a_token() {
    let settings = authenticated_by(Authentication::Token("secret".to_owned()));
    let others = authenticated_by(Authentication::Token("another".to_owned()));
    only_these_connect(server(r#"authorization { token: "secret" }"#), settings, others).await;
}

#[tokio::test]
async fn a_bus_connects_with_an_nkey() {
    let user = KeyPair::new_user();
    let seed = File::new(&format!("{}\n", user.seed().unwrap()));
    let other = File::new(&KeyPair::new_user().seed().unwrap());
    let text = format!("authorization {{ users: [{{ nkey: {} }}] }}", user.public_key());
    let settings = authenticated_by(Authentication::NkeySeed(seed.0.clone()));
    only_these_connect(server(&text), settings, authenticated_by(Authentication::NkeySeed(other.0.clone()))).await;
}

#[tokio::test]
async fn a_bus_connects_with_a_client_certificate() {
    let mut params = CertificateParams::default();
    params.distinguished_name = name("authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, rcgen::KeyPair::generate().unwrap()).unwrap();
    let signed = |hosts: &[String], common_name: &str| {
        let mut params = CertificateParams::new(hosts).unwrap();
        params.distinguished_name = name(common_name);
        let key = rcgen::KeyPair::generate().unwrap();
        (params.signed_by(&key, &authority).unwrap().pem(), key.serialize_pem())
    };
    let (certificate, key) = signed(&["127.0.0.1".to_owned()], "server");
    let (client, client_key) = signed(&[], "test");
    let [authority, client, client_key] = [authority.pem(), client, client_key].map(|pem| File::new(&pem));
    let text = r#"
        tls {
            cert_file: /etc/nats/tls/tls.crt, key_file: /etc/nats/tls/tls.key, ca_file: /etc/nats/tls/ca.crt
            verify_and_map: true
        }
        authorization { users: [{ user: "CN=test" }] }
    "#;
    let certificates = Some((certificate.into(), key.into(), authority.0.clone()));
    let others = NatsSettings { authority: Some(authority.0.clone()), ..NatsSettings::default() };
    let settings = NatsSettings { certificate: Some((client.0.clone(), client_key.0.clone())), ..others.clone() };
    only_these_connect(NatsSetup { certificates, ..server(text) }, settings, others).await;
}

fn name(common_name: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common_name);
    name
}

#[tokio::test]
async fn a_bus_connects_with_a_credentials_file() {
    let (operator, account, user) = (KeyPair::new_operator(), KeyPair::new_account(), KeyPair::new_user());
    let operator_jwt = jwt(&operator, &operator, json!({"type": "operator"}));
    let limits = json!({
        "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": true, "conn": -1, "leaf": -1,
        "mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1,
    });
    let account_jwt = jwt(&operator, &account, json!({"type": "account", "limits": limits}));
    let system = KeyPair::new_account();
    // Without JetStream, which is forbidden there.
    let limits = json!({"subs": -1, "data": -1, "payload": -1, "conn": -1});
    let system_jwt = jwt(&operator, &system, json!({"type": "account", "limits": limits}));
    let text = format!(
        "operator: {operator_jwt}\nsystem_account: {}\nresolver: MEMORY\nresolver_preload: {{ {}: {account_jwt}, {}: {system_jwt} }}",
        system.public_key(),
        account.public_key(),
        system.public_key(),
    );
    let credentials = |issuer: &KeyPair| {
        let user_jwt = jwt(issuer, &user, json!({"type": "user", "subs": -1, "data": -1, "payload": -1}));
        File::new(&format!(
            "-----BEGIN NATS USER JWT-----\n{user_jwt}\n------END NATS USER JWT------\n\n\
             -----BEGIN USER NKEY SEED-----\n{}\n------END USER NKEY SEED------\n",
            user.seed().unwrap()
        ))
    };
    let (known, unknown) = (credentials(&account), credentials(&KeyPair::new_account()));
    let settings = authenticated_by(Authentication::Credentials(known.0.clone()));
    only_these_connect(server(&text), settings, authenticated_by(Authentication::Credentials(unknown.0.clone()))).await;
}

/// The claims about `subject`, signed by `issuer`.
fn jwt(issuer: &KeyPair, subject: &KeyPair, mut claims: Value) -> String {
    claims["version"] = json!(2);
    let (iss, sub) = (issuer.public_key(), subject.public_key());
    let claims = json!({"iat": 1_700_000_000, "iss": iss, "sub": sub, "name": sub, "nats": claims});
    let encode = |text: &[u8]| BASE64_URL_SAFE_NO_PAD.encode(text);
    let header = encode(br#"{"typ":"JWT","alg":"ed25519-nkey"}"#);
    let signed = format!("{header}.{}", encode(claims.to_string().as_bytes()));
    let signature = issuer.sign(signed.as_bytes()).unwrap();
    format!("{signed}.{}", encode(&signature))
}

/// A server, and a leaf node of it, to which the harness connects. The JetStream of each is a domain.
async fn hub_and_leaf() -> (Nats, Harness) {
    let configured = |text: String| NatsSetup { own_configuration: Some(text), ..NatsSetup::default() };
    let text = "http: 8222\njetstream { store_dir: /data, domain: hub }\nleafnodes { port: 7422 }";
    let hub = Nats::start_with(configured(text.to_owned())).await.unwrap();
    let address = hub.address().await.unwrap().ip();
    let text = "http: 8222\njetstream { store_dir: /data, domain: leaf }";
    let leaf = configured(format!("{text}\nleafnodes {{ remotes: [{{ url: \"nats://{address}:7422\" }}] }}"));
    let settings = NatsSettings { domain: Some("hub".to_owned()), ..NatsSettings::default() };
    (hub, Harness::start_with(leaf, settings).await)
}

#[tokio::test]
async fn a_bus_uses_a_jetstream_domain() {
    let (hub, mut harness) = hub_and_leaf().await;
    events_arrive(&mut harness).await;
    let messages = async |nats: &Nats| {
        let report = Client::new(&nats.monitoring_url()).get("/jsz").await.unwrap().expect(200).unwrap();
        report["messages"].as_u64()
    };
    assert_eq!((messages(&hub).await, messages(&harness.nats).await), (Some(3), Some(0)));
}

/// The same streams in the domain of the leaf node acknowledge events as well.
#[tokio::test]
async fn an_ack_of_another_domain_does_not_count() {
    let (hub, mut harness) = hub_and_leaf().await;
    let leaf = NatsSettings { url: harness.nats.server(), ..NatsSettings::default() };
    event_bus::provision(&leaf, &harness.topology, Duration::from_secs(10)).await.unwrap();
    let bus = events_arrive(&mut harness).await;
    harness.published().await;
    hub.stop().await.unwrap();
    append(&bus, Id::generate(), 0..1).await;
    tokio::time::sleep(Duration::from_secs(3)).await; // time for a wrong deletion
    assert_eq!(harness.outbox().await, 1, "the event is in no stream of the domain");
}

#[tokio::test]
async fn a_missing_or_malformed_file_is_reported_at_once() {
    let wrong = File::new("no seed");
    let there = |file: &File| file.0.clone();
    let none = || Path::new("/none").to_owned();
    let certificate =
        |certificate, key| NatsSettings { certificate: Some((certificate, key)), ..NatsSettings::default() };
    for (settings, expected) in [
        (authenticated_by(Authentication::NkeySeed(none())), "nats.authentication: there is no file /none"),
        (authenticated_by(Authentication::NkeySeed(there(&wrong))), "holds no seed of a user"),
        (authenticated_by(Authentication::Credentials(none())), "nats.authentication: there is no file /none"),
        (authenticated_by(Authentication::Credentials(there(&wrong))), "cannot parse user JWT"),
        (certificate(none(), there(&wrong)), "nats.certificate: there is no file /none"),
        (certificate(there(&wrong), none()), "nats.certificate, its key: there is no file /none"),
    ] {
        let error = event_bus::provision(&settings, &crate::documents::topology(), Duration::ZERO).await.unwrap_err();
        let error = format!("{error:#}");
        assert!(error.contains(expected), "{error}");
    }
}

#[tokio::test]
async fn a_user_in_the_url_and_a_token_contradict_each_other() {
    let url = "nats://user:hidden@127.0.0.1:4222".to_owned();
    let settings = NatsSettings { url, ..authenticated_by(Authentication::Token("hidden".to_owned())) };
    let error = event_bus::provision(&settings, &crate::documents::topology(), Duration::ZERO).await.unwrap_err();
    let texts = format!("{error:#} {settings:?}");
    assert!(texts.contains("nats.url has a user") && !texts.contains("hidden"), "{texts}");
}
