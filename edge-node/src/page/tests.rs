use std::collections::BTreeSet;

use super::*;
use axum::body::to_bytes;
use axum::http::Request;
use tower::ServiceExt;

/// One request through the routes, without a socket.
async fn ask(method: &str, path: &str, held: Option<&str>) -> (StatusCode, HeaderMap, Vec<u8>) {
    let mut request = Request::builder().method(method).uri(path);
    if let Some(tag) = held {
        request = request.header(IF_NONE_MATCH, tag);
    }
    let request = request.body(Body::empty()).expect("request");
    let response = routes().oneshot(request).await.expect("infallible");
    let (parts, body) = response.into_parts();
    let body = to_bytes(body, 1 << 20).await.expect("body").to_vec();
    (parts.status, parts.headers, body)
}

#[tokio::test]
async fn index_is_served_at_the_root() {
    let (status, headers, body) = ask("GET", "/", None).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(headers[CONTENT_TYPE], "text/html; charset=utf-8");
    assert!(String::from_utf8(body).expect("UTF-8").contains("<title>Tandem"));
}

#[tokio::test]
async fn every_asset_has_type_policy_and_tag() {
    for name in Assets::iter() {
        let (status, headers, body) = ask("GET", &format!("/assets/{name}"), None).await;
        assert_eq!(status, StatusCode::OK, "{name}");
        assert_ne!(headers[CONTENT_TYPE], "application/octet-stream", "{name} has an unknown extension");
        assert_eq!(headers[CONTENT_SECURITY_POLICY], POLICY);
        assert_eq!(headers[X_CONTENT_TYPE_OPTIONS], "nosniff");
        assert!(!body.is_empty(), "{name}");

        let tag = headers[ETAG].to_str().expect("ASCII").to_owned();
        for held in [tag.clone(), format!("W/{tag}"), format!("\"other\", {tag}"), "*".to_owned()] {
            let (status, headers, body) = ask("GET", &format!("/assets/{name}"), Some(&held)).await;
            assert_eq!(status, StatusCode::NOT_MODIFIED, "{name} with {held}");
            assert_eq!(headers[ETAG], tag.as_str());
            assert!(body.is_empty());
        }
        let (status, _, _) = ask("GET", &format!("/assets/{name}"), Some("\"other\"")).await;
        assert_eq!(status, StatusCode::OK);
    }
}

#[tokio::test]
async fn head_has_headers_only() {
    let (status, headers, body) = ask("HEAD", "/", None).await;
    assert_eq!(status, StatusCode::OK);
    assert!(headers.contains_key(ETAG));
    assert!(body.is_empty());
}

#[tokio::test]
async fn nothing_outside_the_assets_is_served() {
    for path in [
        "/assets/none.js",
        "/assets/../Cargo.toml",
        "/assets/%2e%2e/Cargo.toml",
        "/assets//etc/passwd",
        "/assets/..%2fsrc%2flib.rs",
    ] {
        let (status, headers, _) = ask("GET", path, None).await;
        assert_eq!(status, StatusCode::NOT_FOUND, "{path}");
        assert_eq!(headers[CONTENT_SECURITY_POLICY], POLICY);
    }
}

#[tokio::test]
async fn other_methods_are_refused() {
    let (status, headers, _) = ask("POST", "/", None).await;
    assert_eq!(status, StatusCode::METHOD_NOT_ALLOWED);
    assert_eq!(headers[ALLOW], "GET, HEAD");
}

/// The page may ask its own node only: no absolute address, no inline script or style in the assets.
/// XML namespaces are names, not addresses.
#[test]
fn assets_name_no_other_host_and_hold_no_inline_code() {
    for name in Assets::iter() {
        let file = Assets::get(&name).expect("listed");
        let Ok(text) = std::str::from_utf8(&file.data) else {
            continue;
        };
        let text = text.replace("http://www.w3.org/2000/svg", "");
        for banned in
            ["http://", "https://", "src=\"//", "href=\"//", "@import", "eval(", "innerHTML", " style=\"", " onclick="]
        {
            assert!(!text.contains(banned), "{name} holds {banned:?}");
        }
        assert!(!text.contains("<script>"), "{name} holds an inline script");
    }
}

/// Every language has the same words, and the markup asks for no others.
#[test]
fn languages_have_the_same_words() {
    let text = |name: &str| String::from_utf8(Assets::get(name).expect("an asset").data.into_owned()).expect("UTF-8");
    let words = |name: &str| -> BTreeSet<String> {
        let text = text(name);
        let keys = text.lines().filter_map(|line| line.strip_prefix("  ")?.split_once(": "));
        keys.map(|(key, _)| key.to_owned()).collect()
    };
    let english = words("js/words/en.js");
    assert!(english.len() > 100, "{english:?}");
    assert_eq!(words("js/words/zh.js"), english);
    let index = text("index.html");
    for attribute in ["data-t=\"", "data-t-name=\"", "data-t-hint=\""] {
        for key in index.split(attribute).skip(1).filter_map(|rest| rest.split('"').next()) {
            assert!(english.contains(key), "{attribute}{key}");
        }
    }
}
