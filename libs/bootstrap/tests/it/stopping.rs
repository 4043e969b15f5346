use std::sync::{Arc, Mutex};

use axum::Router;
use axum::routing::get;
use bootstrap::{Config, Service};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::sync::Notify;

use crate::server::{REQUEST, config, endless_route, no_bus, read_all, read_head, start, start_with};

fn ready_route() -> Router {
    Router::new().route("/", get(|| async {}))
}

#[tokio::test]
async fn background_tasks_are_stopped_after_the_last_response() {
    let order = Arc::new(Mutex::new(Vec::new()));
    let (begun, release) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let handler = {
        let (order, begun, release) = (order.clone(), begun.clone(), release.clone());
        move || async move {
            begun.notify_one();
            release.notified().await;
            order.lock().unwrap().push("handler");
            "done"
        }
    };
    let mut service = Service::new(&config(&[]));
    let background_order = order.clone();
    service.spawn("background", async move |stop| {
        stop.cancelled().await;
        background_order.lock().unwrap().push("background");
        Ok(())
    });
    let running = service.run(Router::new().route("/", get(handler)), no_bus().await).await.unwrap();
    let address = running.address;
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(REQUEST).await.unwrap();
    begun.notified().await;

    let stopped = tokio::spawn(running.stop());
    while TcpStream::connect(address).await.is_ok() {
        tokio::task::yield_now().await;
    }
    assert!(order.lock().unwrap().is_empty() && !stopped.is_finished());

    release.notify_one();
    let answer = read_all(stream).await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("done"), "{answer}");
    assert!(answer.to_ascii_lowercase().contains("\r\nconnection: close\r\n"), "{answer}");
    stopped.await.unwrap().unwrap();
    assert_eq!(*order.lock().unwrap(), ["handler", "background"]);
}

#[tokio::test]
async fn idle_connections_are_closed() {
    let running = start(ready_route()).await;
    let mut idle = TcpStream::connect(running.address).await.unwrap();
    idle.write_all(REQUEST).await.unwrap();
    read_head(&mut idle).await;
    let mut silent = TcpStream::connect(running.address).await.unwrap();
    silent.write_all(b"").await.unwrap();
    running.stop().await.unwrap();
    assert_eq!(read_all(idle).await, "");
}

#[tokio::test]
async fn a_stop_ends_within_its_grace() {
    let (begun, route) = endless_route();
    let running = start_with(&["--stop-grace=100ms"], route).await;
    let mut stream = TcpStream::connect(running.address).await.unwrap();
    stream.write_all(REQUEST).await.unwrap();
    begun.notified().await;
    assert!(running.stop().await.unwrap_err().to_string().contains("requests were still running"));
    assert_eq!(read_all(stream).await, "");

    let mut service = Service::new(&config(&["--stop-grace=100ms"]));
    service.spawn("stubborn", |_| std::future::pending());
    let running = service.run(ready_route(), no_bus().await).await.unwrap();
    assert!(running.stop().await.unwrap_err().to_string().contains("not stopped within 100ms"));
}

#[tokio::test]
async fn a_background_task_that_ends_is_reported_by_name() {
    for (task, expected) in
        [("ends", "relay ended by itself"), ("fails", "relay failed: on purpose"), ("panics", "panicked")]
    {
        let mut service = Service::new(&config(&[]));
        service.spawn("clock", async |stop| {
            stop.cancelled().await;
            Ok(())
        });
        service.spawn("relay", async move |_| match task {
            "ends" => Ok(()),
            "fails" => anyhow::bail!("on purpose"),
            _ => panic!("on purpose"),
        });
        let mut running = service.run(ready_route(), no_bus().await).await.unwrap();
        let error = format!("{:#}", running.wait().await);
        assert!(error.starts_with("relay") && error.contains(expected), "{error}");
        running.stop().await.unwrap();
    }
}

#[tokio::test]
async fn a_task_that_fails_while_stopping_fails_the_stop() {
    let mut service = Service::new(&config(&[]));
    service.spawn("relay", async |stop| {
        stop.cancelled().await;
        anyhow::bail!("on purpose")
    });
    let running = service.run(ready_route(), no_bus().await).await.unwrap();
    assert_eq!(format!("{:#}", running.stop().await.unwrap_err()), "relay failed while stopping: on purpose");
}

#[tokio::test]
async fn a_port_that_is_taken_is_an_error() {
    let running = start(ready_route()).await;
    let config = Config { http_addr: running.address, ..config(&[]) };
    let second = Service::new(&config).run(ready_route(), no_bus().await).await;
    assert!(second.err().unwrap().to_string().contains("cannot listen on"));
}

/// Neither an incomplete request nor an unread response may keep a service running.
#[tokio::test]
async fn clients_that_do_not_finish_are_disconnected() {
    let running = start_with(&["--stop-grace=5s"], ready_route()).await;
    let mut stream = TcpStream::connect(running.address).await.unwrap();
    stream.write_all(b"GET /ap").await.unwrap();
    running.stop().await.unwrap();
    assert_eq!(read_all(stream).await, "");
}
