//! Pages of other origins, and names of the node.

use super::*;
use crate::api::{Hosts, Origins};

const PAGE: &str = "https://app.example";

fn options(origins: &[&str], key: Option<&str>) -> ApiOptions {
    let origins: Vec<String> = origins.iter().map(ToString::to_string).collect();
    ApiOptions { origins: Origins::parse(&origins).unwrap(), api_key: key.map(Into::into), ..ApiOptions::default() }
}

/// The question that a browser asks before it sends JSON to another origin.
async fn preflight(replay: &Arc<Replay>, options: ApiOptions, origin: &str) -> Reply {
    let request = Request::options(CHAT)
        .header("origin", origin)
        .header("access-control-request-method", "POST")
        .header("access-control-request-headers", "authorization,content-type,x-stainless-lang")
        .body(Body::empty());
    send(app_with(replay, options), request.unwrap()).await
}

async fn ask(replay: &Arc<Replay>, options: ApiOptions, origin: &str, key: &str) -> Reply {
    let request = Request::post(CHAT)
        .header("origin", origin)
        .header("content-type", "application/json")
        .header("authorization", format!("Bearer {key}"))
        .body(Body::from(chat(&json!({})).to_string()));
    send(app_with(replay, options), request.unwrap()).await
}

#[tokio::test]
async fn pages_of_listed_origins_are_served_with_a_key_too() {
    let replay = Arc::new(Replay::of("Lima."));
    for key in [None, Some("secret")] {
        let options = options(&["http://other.example", PAGE], key);
        let reply = preflight(&replay, options.clone(), PAGE).await;
        assert_eq!(reply.status, StatusCode::OK, "a browser sends no key with its question");
        assert_eq!(reply.header("access-control-allow-origin"), Some(PAGE));
        assert_eq!(reply.header("access-control-allow-headers"), Some("authorization,content-type,x-stainless-lang"));
        assert!(reply.header("access-control-allow-methods").is_some_and(|methods| methods.contains("POST")));
        let reply = ask(&replay, options.clone(), PAGE, "secret").await;
        assert_eq!((reply.status, reply.header("access-control-allow-origin")), (StatusCode::OK, Some(PAGE)));
        assert!(reply.header("access-control-expose-headers").is_some_and(|names| names.contains("x-request-id")));
        // The page is to read what is wrong with its key.
        let reply = ask(&replay, options.clone(), PAGE, "wrong").await;
        assert_eq!(reply.status == StatusCode::UNAUTHORIZED, key.is_some());
        assert_eq!(reply.header("access-control-allow-origin"), Some(PAGE));
        let reply = preflight(&replay, options, "https://evil.example").await;
        assert_eq!(reply.header("access-control-allow-origin"), None);
    }
    let reply = preflight(&replay, options(&["*"], None), "https://any.example").await;
    assert_eq!(reply.header("access-control-allow-origin"), Some("*"));
}

#[tokio::test]
async fn by_default_no_other_origin_is_allowed_anything() {
    let replay = Arc::new(Replay::of("Lima."));
    let reply = preflight(&replay, ApiOptions::default(), PAGE).await;
    assert_eq!(reply.status, StatusCode::METHOD_NOT_ALLOWED);
    assert_eq!(reply.header("access-control-allow-origin"), None);
    let reply = ask(&replay, ApiOptions::default(), PAGE, "").await;
    assert_eq!(reply.header("access-control-allow-origin"), None);
}

#[tokio::test]
async fn the_node_may_be_called_by_listed_names() {
    let replay = Arc::new(Replay::of("Lima."));
    let hosts = Hosts::parse(&["tandem.example".into()]).unwrap();
    for (host, status) in [("Tandem.Example:8080", 200), ("localhost:8080", 200), ("other.example", 403)] {
        let options = ApiOptions { hosts: hosts.clone(), ..ApiOptions::default() };
        let request = Request::get("/v1/models").header("host", host).body(Body::empty()).unwrap();
        assert_eq!(send(app_with(&replay, options), request).await.status.as_u16(), status, "{host}");
    }
}
