use axum::Router;
use axum::routing::get;
use reqwest::Client;

use crate::server::start;

#[tokio::test]
async fn a_request_id_that_is_safe_to_log_is_kept_another_is_replaced() {
    let running = start(Router::new()).await;
    let longest = "x".repeat(128);
    let too_long = "x".repeat(129);
    for (sent, kept) in
        [("abc-1", true), (&longest, true), (&too_long, false), ("a b", false), ("é", false), ("", false)]
    {
        let request = Client::new().get(format!("http://{}/", running.address)).header("x-request-id", sent);
        let response = request.send().await.unwrap();
        let id = response.headers()["x-request-id"].to_str().unwrap();
        assert_eq!(id == sent, kept, "{sent}");
        assert!(kept || (id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit())), "{id}");
    }
}

#[tokio::test]
async fn a_handler_has_the_trace_context_of_its_request() {
    let running =
        start(Router::new().route("/", get(|| async { event_bus::trace::current().unwrap_or_default() }))).await;
    let valid = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    for (sent, kept) in [(valid, valid), ("malformed", ""), ("é", "")] {
        let request = Client::new().get(format!("http://{}/", running.address)).header("traceparent", sent);
        assert_eq!(request.send().await.unwrap().text().await.unwrap(), kept);
    }
}
