use anyhow::{Context, Result, ensure};
use async_nats::jetstream::{self, stream};
use sqlx::{Connection, Executor, PgConnection};
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;
use testkit::{Nats, Postgres, eventually, eventually_within};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;

#[tokio::test]
async fn postgres_keeps_its_data_and_its_address_through_every_fault() -> Result<()> {
    let postgres = Postgres::start().await?;
    let url = postgres.database("faults").await?;
    let mut db = PgConnection::connect(&url).await?;
    db.execute("create table facts (fact text)").await?;
    db.execute("insert into facts values ('stopped')").await?;

    postgres.stop().await?;
    ensure!(PgConnection::connect(&url).await.is_err(), "a stopped server answers");
    postgres.start_again().await?;
    PgConnection::connect(&url).await?.execute("insert into facts values ('killed')").await?;

    postgres.kill().await?;
    postgres.start_again().await?;
    PgConnection::connect(&url).await?.execute("insert into facts values ('restarted')").await?;

    postgres.restart().await?;
    let facts = PgConnection::connect(&url).await?.execute("delete from facts").await?.rows_affected();
    ensure!(facts == 3, "{facts} of 3 facts are left");
    Ok(())
}

#[tokio::test]
async fn postgres_is_as_durable_as_in_production_with_300_connections() -> Result<()> {
    let postgres = Postgres::shared().await?;
    let mut db = PgConnection::connect(&postgres.database("settings").await?).await?;
    for (setting, expected) in
        [("fsync", "on"), ("synchronous_commit", "on"), ("full_page_writes", "on"), ("max_connections", "300")]
    {
        let shown = format!("do $$ begin assert current_setting('{setting}') = '{expected}'; end $$");
        db.execute(sqlx::AssertSqlSafe(shown)).await.with_context(|| format!("{setting} is not {expected}"))?;
    }
    Ok(())
}

#[tokio::test]
async fn a_paused_postgres_keeps_connections_open_without_a_response() -> Result<()> {
    let postgres = Postgres::start().await?;
    let mut db = PgConnection::connect(&postgres.database("paused").await?).await?;

    postgres.pause().await?;
    let answer = tokio::time::timeout(Duration::from_millis(300), db.execute("select 1")).await;
    ensure!(answer.is_err(), "a paused server answers: {answer:?}");
    postgres.unpause().await?;
    Ok(())
}

#[tokio::test]
async fn all_tests_share_one_postgres_and_have_a_database_each() -> Result<()> {
    let (one, other) = (Postgres::shared().await?, Postgres::shared().await?);
    ensure!(Arc::ptr_eq(&one, &other));
    let (a, b) = (one.database("same").await?, other.database("same").await?);
    ensure!(a != b);
    PgConnection::connect(&a).await?.execute("create table only_here ()").await?;
    let there = PgConnection::connect(&b).await?.execute("table only_here").await;
    ensure!(there.is_err(), "the databases are the same");
    Ok(())
}

#[tokio::test]
async fn nats_keeps_its_streams_and_its_address_through_every_fault() -> Result<()> {
    let nats = Nats::start().await?;
    let jetstream = jetstream::new(nats.connect().await?);
    let facts = stream::Config { name: "FACTS".to_owned(), subjects: vec!["fact".to_owned()], ..Default::default() };
    jetstream.create_stream(facts).await?;
    publish(&jetstream, "first").await?;

    nats.kill().await?;
    nats.start_again().await?;
    publish(&jetstream, "second").await?;
    nats.restart().await?;
    publish(&jetstream, "third").await?;
    nats.pause().await?;
    nats.unpause().await?;

    let kept = jetstream.get_stream("FACTS").await?.cached_info().state.messages;
    ensure!(kept >= 3, "{kept} of 3 messages are left");
    Ok(())
}

#[expect(clippy::disallowed_methods, reason = "it is the server that is tested here, not the bus")]
async fn publish(jetstream: &jetstream::Context, fact: &'static str) -> Result<()> {
    eventually("the client to be connected again", async || {
        anyhow::Ok(jetstream.publish("fact", fact.into()).await?.await?)
    })
    .await?;
    Ok(())
}

#[tokio::test]
async fn nats_writes_to_disk_before_it_acknowledges() -> Result<()> {
    let nats = Nats::start().await?;
    let jsz = testkit::Client::new(&nats.monitoring_url()).get("/jsz").await?.expect(200)?;
    ensure!(jsz["config"]["sync_always"] == true, "{jsz}");
    Ok(())
}

#[tokio::test]
async fn the_address_in_dockers_network_and_the_log_are_of_the_server() -> Result<()> {
    let nats = Nats::start().await?;
    testkit::connect(&testkit::nats_url("admin", &nats.address().await?.to_string())).await?;
    let log = nats.logs().await?;
    ensure!(log.contains("Server is ready"), "{log}");
    Ok(())
}

#[tokio::test]
async fn a_dropped_container_is_gone_with_its_data() -> Result<()> {
    let postgres = Postgres::start().await?;
    let id = postgres.id().to_owned();
    let volume = docker(&["inspect", "--format", "{{(index .Mounts 0).Name}}", &id]).await?;
    ensure!(exists("volume", &volume).await);

    drop(postgres);
    ensure!(!exists("container", &id).await, "the container {id} is still there");
    ensure!(!exists("volume", &volume).await, "the volume {volume} is still there");
    Ok(())
}

#[tokio::test]
async fn a_paused_or_killed_container_is_removed_when_dropped() -> Result<()> {
    let (paused, killed) = tokio::try_join!(Nats::start(), Nats::start())?;
    let ids = [paused.id().to_owned(), killed.id().to_owned()];
    paused.pause().await?;
    killed.kill().await?;
    std::thread::spawn(move || drop((paused, killed))).join().expect("no runtime is needed to drop a container");
    for id in ids {
        ensure!(!exists("container", &id).await, "the container {id} is still there");
    }
    Ok(())
}

#[tokio::test]
async fn a_container_whose_start_is_cancelled_is_removed() -> Result<()> {
    let name = format!("testkit-{}", std::process::id());
    for patience in [1, 30, 100, 300, 1000].map(Duration::from_millis) {
        // A runtime that ends at once, as that of a test that fails.
        std::thread::scope(|scope| {
            scope.spawn(|| -> Result<()> {
                let start = Postgres::start_named(&name, testkit::free_port());
                let runtime = tokio::runtime::Runtime::new()?;
                drop(runtime.block_on(async { tokio::time::timeout(patience, start).await }));
                Ok(())
            });
        });
        ensure!(!exists("container", &name).await, "{name} is still there, given up after {patience:?}");
    }
    testkit::left_over::remove_volume(&name).await
}

#[tokio::test]
async fn a_container_ends_with_a_process_that_is_killed() -> Result<()> {
    let tests = std::env::current_exe()?;
    let profile = tests.parent().and_then(Path::parent).context("tests are in deps, in the folder of their profile")?;
    let mut victim = Command::new(profile.join("examples/nats")).stdout(Stdio::piped()).kill_on_drop(true).spawn()?;
    let mut lines = BufReader::new(victim.stdout.take().context("it is piped")?).lines();
    let id = loop {
        let line = lines.next_line().await?.context("the victim died too early")?;
        if let Some((_, id)) = line.split_once("container ") {
            break id.to_owned();
        }
    };
    ensure!(exists("container", &id).await, "the victim has no container");

    victim.kill().await?;
    eventually("its container to be gone", async || !exists("container", &id).await).await
}

#[tokio::test]
async fn waiting_ends_with_the_reason_of_the_last_attempt() {
    let never = eventually_within(Duration::from_millis(50), "rain", async || Err::<(), _>(anyhow::anyhow!("sunny")));
    let error = format!("{:#}", never.await.expect_err("it cannot rain"));
    assert!(error.starts_with("gave up waiting for rain after 50ms") && error.ends_with("sunny"), "{error}");

    let hangs = eventually_within(Duration::from_millis(50), "godot", async || std::future::pending::<bool>().await);
    let error = format!("{:#}", hangs.await.expect_err("he cannot come"));
    assert!(error.contains("in an attempt that hung"), "{error}");
}

async fn exists(kind: &str, name: &str) -> bool {
    docker(&[kind, "inspect", name]).await.is_ok()
}

async fn docker(args: &[&str]) -> Result<String> {
    let output = Command::new("docker").args(args).stdin(Stdio::null()).output().await?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}
