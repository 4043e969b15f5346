//! Durable tasks: an effect outside of the database, its result and its event.

use crate::documents::{Document, DocumentEvent, Id};
use crate::harness::Harness;
use crate::log::Log;
use anyhow::{Result, bail, ensure};
use event_bus::{Bus, Settings, Task, Transaction, trace};
use sqlx::Executor;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use testkit::{eventually, eventually_within};
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Prints documents, and counts the attempts. Printing is an effect outside of the database.
#[derive(Clone)]
struct Printer {
    attempts: Arc<Mutex<HashMap<String, usize>>>,
    /// An attempt needs a permit to end.
    paper: Arc<Semaphore>,
    under_way: Arc<AtomicUsize>,
    most_under_way: Arc<AtomicUsize>,
    /// How many of the next attempts fail.
    failing: Arc<AtomicUsize>,
    /// They fail with a panic.
    panics: bool,
    /// The result cannot be written.
    full: Arc<AtomicBool>,
}

impl Printer {
    fn new(paper: usize, failing: usize) -> Self {
        Self {
            attempts: Arc::default(),
            paper: Arc::new(Semaphore::new(paper)),
            under_way: Arc::default(),
            most_under_way: Arc::default(),
            failing: Arc::new(AtomicUsize::new(failing)),
            panics: false,
            full: Arc::default(),
        }
    }

    fn attempts(&self, key: &str) -> usize {
        self.attempts.lock().unwrap().get(key).copied().unwrap_or_default()
    }

    async fn wait_for_attempts(&self, key: &str, attempts: usize) {
        eventually(&format!("attempt {attempts} of {key}"), async || self.attempts(key) == attempts).await.unwrap();
    }
}

impl Default for Printer {
    fn default() -> Self {
        Self::new(Semaphore::MAX_PERMITS, 0)
    }
}

impl Task for Printer {
    const KIND: &'static str = "print";
    type Input = String;
    type Output = usize;

    async fn perform(&self, key: &str, title: &String) -> Result<usize> {
        *self.attempts.lock().unwrap().entry(key.to_owned()).or_default() += 1;
        let under_way = self.under_way.fetch_add(1, Ordering::SeqCst) + 1;
        self.most_under_way.fetch_max(under_way, Ordering::SeqCst);
        self.paper.acquire().await?.forget();
        self.under_way.fetch_sub(1, Ordering::SeqCst);
        let fails = |left: usize| left.checked_sub(1);
        if self.failing.fetch_update(Ordering::SeqCst, Ordering::SeqCst, fails).is_ok() {
            assert!(!self.panics, "the printer burns");
            bail!("a paper jam, which is \0");
        }
        Ok(title.len())
    }

    async fn complete(&self, tx: &mut Transaction, key: &str, title: &String, pages: &usize) -> Result<()> {
        assert_eq!(*pages, title.len());
        let document = Document { id: key.to_owned(), version: 0, title: title.clone() };
        tx.append([&DocumentEvent::Created(document)]).await?;
        ensure!(!self.full.load(Ordering::SeqCst), "the archive is full");
        Ok(())
    }
}

/// Ignores an error of Postgres.
struct Careless;

impl Task for Careless {
    const KIND: &'static str = "careless";
    type Input = ();
    type Output = ();

    async fn perform(&self, _: &str, (): &()) -> Result<()> {
        Ok(())
    }

    async fn complete(&self, tx: &mut Transaction, _: &str, (): &(), (): &()) -> Result<()> {
        let _ = tx.execute("select 1 / 0").await;
        Ok(())
    }
}

impl Harness {
    /// A replica's bus, which tries again soon.
    async fn patient_bus(&self) -> Bus {
        let (retry_delay, task_timeout) = (Duration::from_millis(20), Duration::from_secs(2));
        let (apply_timeout, connection_timeout) = (Duration::from_secs(1), Duration::from_secs(1));
        let settings = self.settings(&self.nats.url());
        let settings =
            Settings { retry_delay, task_timeout, apply_timeout, connection_timeout, task_attempts: 3, ..settings };
        Self::open(settings).await.unwrap()
    }

    /// A worker, and what stops it.
    async fn work<T: Task>(&mut self, task: T) -> (Bus, CancellationToken) {
        let bus = self.patient_bus().await;
        let stop = self.work_on(&bus, task).await;
        (bus, stop)
    }

    /// A worker of this bus, and what stops it.
    async fn work_on<T: Task>(&mut self, bus: &Bus, task: T) -> CancellationToken {
        let stop = self.stop.child_token();
        self.tasks.spawn(bus.clone().perform(task, stop.clone()));
        eventually("the database to be prepared", async || bus.connection().await.map(drop)).await.unwrap();
        stop
    }

    /// Waits until no task is left.
    async fn performed(&self) {
        let done = eventually("all tasks to be done", async || {
            let left: i64 =
                sqlx::query_scalar("select count(*) from bus.tasks").fetch_one(&mut self.db().await).await?;
            ensure!(left == 0, "{left} are left");
            Ok(())
        });
        done.await.unwrap();
    }

    /// Status, attempts and error of the one task.
    async fn task(&self) -> (String, i32, Option<String>) {
        let sql = "select status, attempts, error from bus.tasks";
        sqlx::query_as(sql).fetch_one(&mut self.db().await).await.unwrap()
    }

    async fn wait_for_dead_task(&self) {
        eventually("the task to be dead", async || self.task().await.0 == "dead").await.unwrap();
    }

    /// Version and aggregate of the events in the outbox.
    async fn announced(&self) -> Vec<String> {
        let sql = "select aggregate_id || '-' || version from bus.outbox order by id";
        sqlx::query_scalar(sql).fetch_all(&mut self.db().await).await.unwrap()
    }
}

async fn schedule<T: Task>(bus: &Bus, key: &str, input: &T::Input) -> bool {
    let mut tx = bus.begin().await.unwrap();
    let scheduled = tx.schedule::<T>(key, input, Duration::ZERO).await.unwrap();
    tx.commit().await.unwrap();
    scheduled
}

async fn print(bus: &Bus) -> String {
    let key = Id::generate().to_string();
    assert!(schedule::<Printer>(bus, &key, &"A title".to_owned()).await);
    key
}

#[tokio::test]
async fn a_task_is_performed_and_its_event_published_with_the_trace_of_its_cause() {
    const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let mut harness = Harness::start().await;
    let relay = harness.relay().await;
    let printer = Printer::default();
    let (bus, _) = harness.work(printer.clone()).await;
    let key = trace::scope(Some(TRACE.to_owned()), print(&bus)).await;
    harness.performed().await;
    harness.published().await;
    assert_eq!(harness.stream().await, [format!("{key}-0")]);
    assert_eq!(printer.attempts(&key), 1);
    let message = harness.jetstream().await.get_stream("DOCUMENTS").await.unwrap().get_raw_message(1).await.unwrap();
    assert_eq!(message.headers.get("traceparent").unwrap().as_str(), TRACE);
    drop(relay);
}

#[tokio::test]
async fn a_task_of_a_transaction_that_is_rolled_back_is_not_performed() {
    let mut harness = Harness::start().await;
    let printer = Printer::default();
    let (bus, _) = harness.work(printer.clone()).await;
    let mut tx = bus.begin().await.unwrap();
    assert!(tx.schedule::<Printer>("one", &String::new(), Duration::ZERO).await.unwrap());
    tx.rollback().await.unwrap();
    let key = print(&bus).await;
    harness.performed().await;
    assert_eq!((printer.attempts("one"), printer.attempts(&key)), (0, 1));
}

#[tokio::test]
async fn a_task_that_exists_is_not_scheduled_again() {
    let mut harness = Harness::start().await;
    let printer = Printer::new(0, 0);
    let (bus, _) = harness.work(printer.clone()).await;
    let key = print(&bus).await;
    assert!(!schedule::<Printer>(&bus, &key, &"Another title".to_owned()).await);
    printer.wait_for_attempts(&key, 1).await;
    assert!(!schedule::<Printer>(&bus, &key, &"Another title".to_owned()).await, "while it is performed");
    printer.paper.add_permits(9);
    harness.performed().await;
    assert_eq!(printer.attempts(&key), 1);
    // Of another kind, it is another task.
    assert!(schedule::<Careless>(&bus, "one", &()).await && schedule::<Printer>(&bus, "one", &String::new()).await);
}

#[tokio::test]
async fn malformed_keys_are_refused() {
    let mut harness = Harness::start().await;
    let (bus, _) = harness.work(Printer::default()).await;
    for key in ["", "a key", "schlüssel", "a\nkey", &"k".repeat(201)] {
        let mut tx = bus.begin().await.unwrap();
        let error = tx.schedule::<Printer>(key, &String::new(), Duration::ZERO).await.unwrap_err();
        let event_bus::Error::Postgres(error) = error else { panic!("{error}") };
        assert!(error.as_database_error().unwrap().is_check_violation(), "{key:?}: {error}");
    }
}

#[tokio::test]
async fn a_task_is_not_performed_before_it_is_due() {
    const DELAY: Duration = Duration::from_secs(2);
    let mut harness = Harness::start().await;
    let printer = Printer::default();
    let (bus, _) = harness.work(printer.clone()).await;
    let mut tx = bus.begin().await.unwrap();
    let begun = Instant::now();
    tx.schedule::<Printer>("later", &String::new(), DELAY).await.unwrap();
    tx.commit().await.unwrap();
    print(&bus).await;
    printer.wait_for_attempts("later", 1).await;
    assert!(begun.elapsed() >= Duration::from_millis(1950), "after {:?}", begun.elapsed());
}

#[tokio::test]
async fn failed_attempts_and_panics_are_retried_until_the_task_is_dead() {
    for panics in [false, true] {
        let mut harness = Harness::start().await;
        let printer = Printer { panics, ..Printer::new(Semaphore::MAX_PERMITS, 4) };
        let (log, logging) = Log::start();
        let (bus, _) = harness.work(printer.clone()).await;
        let key = print(&bus).await;
        harness.wait_for_dead_task().await;
        let (_, attempts, error) = harness.task().await;
        let expected = if panics { "the task panicked: the printer burns" } else { "a paper jam, which is \u{fffd}" };
        assert_eq!((attempts, error.as_deref()), (3, Some(expected)));
        assert_eq!(printer.attempts(&key), 3);
        assert!(harness.announced().await.is_empty());
        eventually("the error", async || log.lines(" ERROR ").iter().any(|line| line.contains(&key))).await.unwrap();
        assert_eq!(log.lines(" WARN ").iter().filter(|line| line.contains(&key)).count(), 2);
        drop(logging);

        // As a person would.
        let revive = "update bus.tasks set status = 'pending', attempts = 0, due_at = now()";
        harness.db().await.execute(revive).await.unwrap();
        harness.performed().await;
        assert_eq!(printer.attempts(&key), 5);
        assert_eq!(harness.announced().await, [format!("{key}-0")]);
    }
}

#[tokio::test]
async fn an_attempt_that_takes_too_long_is_ended_and_retried() {
    let mut harness = Harness::start().await;
    let printer = Printer::new(0, 0);
    let (bus, _) = harness.work(printer.clone()).await;
    let key = print(&bus).await;
    printer.wait_for_attempts(&key, 2).await;
    assert_eq!(harness.task().await.2.as_deref(), Some("not performed within 2s"));
    printer.paper.add_permits(1);
    harness.performed().await;
    assert_eq!(harness.announced().await, [format!("{key}-0")]);
}

#[tokio::test]
async fn a_result_that_cannot_be_stored_is_a_failed_attempt() {
    let mut harness = Harness::start().await;
    let printer = Printer::default();
    printer.full.store(true, Ordering::SeqCst);
    let (bus, _) = harness.work(printer.clone()).await;
    let key = print(&bus).await;
    harness.wait_for_dead_task().await;
    assert_eq!(harness.task().await.2.as_deref(), Some("the archive is full"));
    assert!(harness.announced().await.is_empty(), "part of a result was committed");
    assert_eq!(printer.attempts(&key), 3);
}

#[tokio::test]
async fn a_task_that_ignores_an_error_of_postgres_is_not_done() {
    let mut harness = Harness::start().await;
    let (bus, _) = harness.work(Careless).await;
    schedule::<Careless>(&bus, "one", &()).await;
    harness.wait_for_dead_task().await;
    let error = harness.task().await.2.unwrap();
    assert!(error.contains("current transaction is aborted"), "{error}");
}

#[tokio::test]
async fn a_task_whose_worker_died_is_performed_again_after_its_lease() {
    let mut harness = Harness::start().await;
    let printer = Printer::new(0, 0);
    let (bus, _) = harness.work(printer.clone()).await;
    let key = print(&bus).await;
    printer.wait_for_attempts(&key, 1).await;
    let died = Instant::now();
    harness.tasks.shutdown().await;
    let other = Printer::default();
    harness.work(other.clone()).await;
    harness.performed().await;
    // 2 s to perform, 1 s to complete and 1 s to connect.
    assert!(died.elapsed() > Duration::from_secs(3), "after {:?}", died.elapsed());
    assert_eq!((printer.attempts(&key), other.attempts(&key)), (1, 1));
    assert_eq!(harness.announced().await, [format!("{key}-0")]);
}

#[tokio::test]
async fn of_two_attempts_that_overlap_one_commits_its_result() {
    let mut harness = Harness::start().await;
    harness.relay().await;
    let slow = Printer::new(0, 0);
    let (bus, slow_stop) = harness.work(slow.clone()).await;
    let key = print(&bus).await;
    slow.wait_for_attempts(&key, 1).await;
    // The attempt continues, but its worker leases no other task. Meanwhile the lease ends.
    slow_stop.cancel();
    harness.db().await.execute("update bus.tasks set due_at = now()").await.unwrap();
    let fast = Printer::default();
    harness.work(fast.clone()).await;
    harness.performed().await;
    // Out of the outbox, which would refuse the same event.
    harness.published().await;
    slow.paper.add_permits(1);
    eventually("one worker to end", async || harness.tasks.try_join_next().is_some()).await.unwrap();
    harness.published().await;
    assert_eq!((slow.attempts(&key), fast.attempts(&key)), (1, 1));
    assert_eq!(harness.stream().await, [format!("{key}-0")]);
}

#[tokio::test]
async fn a_task_that_is_dead_by_the_time_an_attempt_succeeds_is_done() {
    let mut harness = Harness::start().await;
    let printer = Printer::new(0, 0);
    let (bus, _) = harness.work(printer.clone()).await;
    let key = print(&bus).await;
    printer.wait_for_attempts(&key, 1).await;
    harness.db().await.execute("update bus.tasks set status = 'dead', attempts = 3").await.unwrap();
    printer.paper.add_permits(1);
    harness.performed().await;
    assert_eq!(harness.announced().await, [format!("{key}-0")]);
}

#[tokio::test]
async fn a_late_failure_does_not_touch_the_next_attempt() {
    let mut harness = Harness::start().await;
    let late = Printer::new(0, 1);
    let (bus, late_stop) = harness.work(late.clone()).await;
    let key = print(&bus).await;
    late.wait_for_attempts(&key, 1).await;
    late_stop.cancel();
    harness.db().await.execute("update bus.tasks set due_at = now()").await.unwrap();
    let next = Printer::new(0, 0);
    harness.work(next.clone()).await;
    next.wait_for_attempts(&key, 1).await;
    late.paper.add_permits(1);
    eventually("one worker to end", async || harness.tasks.try_join_next().is_some()).await.unwrap();
    assert_eq!(harness.task().await, ("pending".to_owned(), 2, None));
    next.paper.add_permits(1);
    harness.performed().await;
    assert_eq!((late.attempts(&key), next.attempts(&key)), (1, 1));
}

#[tokio::test]
async fn after_a_stop_another_replica_performs_unfinished_tasks_at_once() {
    let mut harness = Harness::start().await;
    let (ending, hanging) = (Printer::new(0, 0), Printer::new(0, 0));
    let settings = Settings { task_attempts: 1, ..harness.settings(&harness.nats.url()) };
    let mut keys = Vec::new();
    for printer in [&ending, &hanging] {
        // With a lease of more than 40 s.
        let (bus, stop) = (Harness::open(settings.clone()).await.unwrap(), harness.stop.child_token());
        let worker = tokio::spawn(bus.clone().perform(printer.clone(), stop.clone()));
        eventually("the database to be prepared", async || bus.connection().await.map(drop)).await.unwrap();
        let key = print(&bus).await;
        printer.wait_for_attempts(&key, 1).await;
        stop.cancel();
        keys.push((key, worker));
        ending.paper.add_permits(1);
    }
    for (_, worker) in &mut keys {
        worker.await.unwrap().unwrap();
    }
    // Its interrupted attempt does not count.
    assert_eq!(harness.task().await, ("pending".to_owned(), 0, Some("the service stopped".to_owned())));
    harness.work(Printer::default()).await;
    eventually_within(Duration::from_secs(5), "the other task to be done", async || {
        harness.announced().await.len() == 2
    })
    .await
    .unwrap();
    assert_eq!(harness.announced().await, [format!("{}-0", keys[0].0), format!("{}-0", keys[1].0)]);
}

#[tokio::test]
async fn a_task_that_kills_its_process_each_time_becomes_dead() {
    let mut harness = Harness::start().await;
    let printer = Printer::default();
    let bus = harness.relay().await;
    let key = print(&bus).await;
    // As after three workers that died.
    harness.db().await.execute("update bus.tasks set attempts = 3").await.unwrap();
    harness.work(printer.clone()).await;
    harness.wait_for_dead_task().await;
    assert_eq!(printer.attempts(&key), 0);
    assert_eq!(harness.task().await.2.as_deref(), Some("the process ended during the last attempt"));
}

#[tokio::test]
async fn the_settings_limit_concurrent_attempts() {
    let mut harness = Harness::start().await;
    let printer = Printer::new(0, 0);
    let (bus, _) = harness.work(printer.clone()).await;
    for _ in 0..20 {
        print(&bus).await;
    }
    eventually("eight attempts", async || printer.under_way.load(Ordering::SeqCst) == 8).await.unwrap();
    printer.paper.add_permits(20);
    harness.performed().await;
    assert_eq!(printer.most_under_way.load(Ordering::SeqCst), 8);
    assert_eq!(harness.announced().await.len(), 20);
}

#[tokio::test]
async fn many_workers_perform_each_task_once() {
    let mut harness = Harness::start().await;
    let printer = Printer::default();
    let (bus, _) = harness.work(printer.clone()).await;
    for _ in 0..3 {
        harness.work(printer.clone()).await;
    }
    let mut keys = Vec::new();
    for _ in 0..200 {
        keys.push(print(&bus).await);
    }
    harness.performed().await;
    assert!(keys.iter().all(|key| printer.attempts(key) == 1));
    let mut announced = harness.announced().await;
    announced.sort();
    announced.dedup();
    assert_eq!(announced.len(), 200);
}

#[tokio::test]
async fn tasks_that_no_worker_performs_are_logged_as_an_error() {
    let mut harness = Harness::start().await;
    let bus = harness.relay().await;
    print(&bus).await;
    harness.db().await.execute("update bus.tasks set due_at = now() - interval '2 minutes'").await.unwrap();
    let (log, logging) = Log::start();
    harness.work(Careless).await;
    let error = "kinds=\"print\"";
    eventually("the error", async || log.lines(" ERROR ").iter().any(|line| line.contains(error))).await.unwrap();
    drop(logging);

    // Tasks of a kind that is performed here are only late.
    harness.tasks.shutdown().await;
    let (log, logging) = Log::start();
    let printer = Printer::new(0, 0);
    harness.work(printer.clone()).await;
    eventually("an attempt", async || printer.under_way.load(Ordering::SeqCst) == 1).await.unwrap();
    assert_eq!(log.lines(" ERROR "), Vec::<String>::new());
    drop(logging);
}

/// Schedules the next task under the same key, three in all.
struct Chain;

impl Task for Chain {
    const KIND: &'static str = "chain";
    type Input = u32;
    type Output = ();

    async fn perform(&self, _: &str, _: &u32) -> Result<()> {
        Ok(())
    }

    async fn complete(&self, tx: &mut Transaction, key: &str, link: &u32, (): &()) -> Result<()> {
        let document = Document { id: key.to_owned(), version: i64::from(*link), title: String::new() };
        tx.append([&DocumentEvent::Updated(document)]).await?;
        if *link < 2 {
            ensure!(tx.schedule::<Self>(key, &(link + 1), Duration::ZERO).await?, "the key is taken");
        }
        Ok(())
    }
}

#[tokio::test]
async fn a_task_can_schedule_the_next_one_under_its_key() {
    let mut harness = Harness::start().await;
    let (bus, _) = harness.work(Chain).await;
    schedule::<Chain>(&bus, "one", &0).await;
    harness.performed().await;
    assert_eq!(harness.announced().await, ["one-0", "one-1", "one-2"]);
}

#[tokio::test]
async fn a_commit_wakes_the_worker() {
    const TASKS: usize = 10;
    let mut harness = Harness::start().await;
    let printer = Printer::default();
    let (bus, _) = harness.work(printer.clone()).await;
    let begun = Instant::now();
    for _ in 0..TASKS {
        let key = print(&bus).await;
        while printer.attempts(&key) == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    // Without it, a task is found after a third of a second.
    assert!(begun.elapsed() < Duration::from_secs(2), "{TASKS} tasks took {:?}", begun.elapsed());
}

#[tokio::test]
async fn the_next_attempt_begins_after_the_delay() {
    let mut harness = Harness::start().await;
    let printer = Printer::new(Semaphore::MAX_PERMITS, 1);
    let settings = Settings { retry_delay: Duration::from_secs(2), ..harness.settings(&harness.nats.url()) };
    let bus = Harness::open(settings).await.unwrap();
    harness.work_on(&bus, printer.clone()).await;
    let key = print(&bus).await;
    printer.wait_for_attempts(&key, 1).await;
    let failed = Instant::now();
    printer.wait_for_attempts(&key, 2).await;
    assert!(failed.elapsed() > Duration::from_millis(800), "after {:?}", failed.elapsed());
}

/// Takes 600 ms to store a result.
#[derive(Clone, Default)]
struct Archive(Arc<AtomicUsize>);

impl Task for Archive {
    const KIND: &'static str = "archive";
    type Input = ();
    type Output = ();

    async fn perform(&self, _: &str, (): &()) -> Result<()> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    async fn complete(&self, tx: &mut Transaction, _: &str, (): &(), (): &()) -> Result<()> {
        tx.execute("select pg_sleep(0.6)").await?;
        Ok(())
    }
}

#[tokio::test]
async fn a_slow_store_of_results_does_not_repeat_the_effect() {
    let mut harness = Harness::start().await;
    let archive = Archive::default();
    // Eight results, two at a time, take 2.4 s; one at a time they would take longer than the lease.
    let (apply_timeout, task_timeout) = (Duration::from_millis(3500), Duration::from_millis(500));
    let connection_timeout = Duration::from_millis(500);
    let settings = harness.settings(&harness.nats.url());
    let bus = Harness::open(Settings { apply_timeout, task_timeout, connection_timeout, ..settings }).await.unwrap();
    harness.work_on(&bus, archive.clone()).await;
    for number in 0..8 {
        schedule::<Archive>(&bus, &number.to_string(), &()).await;
    }
    harness.performed().await;
    assert_eq!(archive.0.load(Ordering::SeqCst), 8);
}

/// Panics when an attempt is given up.
struct Burning;

struct Fire;

impl Drop for Fire {
    fn drop(&mut self) {
        assert!(std::thread::panicking(), "dropped while it burns");
    }
}

impl Task for Burning {
    const KIND: &'static str = "burning";
    type Input = ();
    type Output = ();

    async fn perform(&self, _: &str, (): &()) -> Result<()> {
        let _fire = Fire;
        std::future::pending().await
    }

    async fn complete(&self, _: &mut Transaction, _: &str, (): &(), (): &()) -> Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn a_panic_at_the_end_of_an_attempt_is_a_failed_attempt() {
    let mut harness = Harness::start().await;
    let (bus, _) = harness.work(Burning).await;
    schedule::<Burning>(&bus, "one", &()).await;
    let failed =
        eventually("the attempt to fail", async || harness.task().await.2.ok_or_else(|| anyhow::anyhow!("it has not")));
    assert_eq!(failed.await.unwrap(), "the task panicked: dropped while it burns");
}

#[tokio::test]
async fn a_worker_that_cannot_lease_backs_off() {
    let mut harness = Harness::start().await;
    let (log, logging) = Log::start();
    let (bus, _) = harness.work(Printer::default()).await;
    harness.db().await.execute("alter function bus.lease_tasks rename to hidden").await.unwrap();
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(3) {
        print(&bus).await;
    }
    harness.db().await.execute("alter function bus.hidden rename to lease_tasks").await.unwrap();
    harness.performed().await;
    let works = log.lines(" INFO ").into_iter().find(|line| line.contains("leasing") && line.contains("works again"));
    drop(logging);
    let works = works.expect("more than one lease failed");
    let failures = works.split("failures=").nth(1).and_then(|rest| rest.split(' ').next()).unwrap();
    assert!(failures.parse::<u32>().unwrap() < 20, "{works}");
}

#[tokio::test]
async fn a_worker_goes_on_when_postgres_is_back() {
    let mut harness = Harness::start().await;
    let printer = Printer::new(0, 0);
    let (bus, _) = harness.work(printer.clone()).await;
    let key = print(&bus).await;
    printer.wait_for_attempts(&key, 1).await;
    let end = "select pg_terminate_backend(pid) from pg_stat_activity
               where datname = current_database() and pid <> pg_backend_pid()";
    harness.db().await.execute(end).await.unwrap();
    printer.paper.add_permits(9);
    harness.performed().await;
    assert_eq!(harness.announced().await, [format!("{key}-0")]);
}
