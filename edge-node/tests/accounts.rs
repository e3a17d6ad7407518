//! One account of an answer: what `usage`, `explain`, `/tandem/status` and `/metrics` say of it, from the
//! real node behind its API.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::Request;
use metrics_exporter_prometheus::PrometheusHandle;
use serde_json::{Value, json};
use tandem_edge_node::api::router;
use tandem_edge_node::metric_definitions::exporter;
use tandem_edge_node::node::{EdgeNode, EdgeParts};
use tandem_edge_node::serve::NodeBackend;
use tandem_edge_node::settings::EdgeSettings;
use tandem_edge_node::uplinks::Uplinks;
use tandem_models::EDGE;
use tandem_router::policy::Entropy;
use tandem_transport::bulk::BulkInbox;
use tower::ServiceExt as _;

/// Far more than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

fn settings() -> EdgeSettings {
    EdgeSettings { trunk_layers: Some(0), threshold: Some(2.5), ..EdgeSettings::default() }
}

/// A node without a cloud, and what its process records.
fn node() -> (Router, PrometheusHandle) {
    node_with(settings())
}

fn node_with(settings: EdgeSettings) -> (Router, PrometheusHandle) {
    let recorder = exporter().expect("the buckets are good").build_recorder();
    let metrics = recorder.handle();
    // Tests of this file run in one process and add up: each looks at what it adds.
    static METRICS: std::sync::OnceLock<PrometheusHandle> = std::sync::OnceLock::new();
    let metrics = METRICS
        .get_or_init(|| {
            metrics::set_global_recorder(recorder).expect("the first recorder");
            metrics
        })
        .clone();
    let small = EDGE.load(1).expect("the edge model");
    let parts = EdgeParts {
        model: small.model,
        tokenizer: small.tokenizer,
        chat: small.chat,
        stop_tokens: small.stop_tokens,
        sampling: small.sampling,
        short_json: None,
        policy: Arc::new(Entropy::new(1.0).expect("a policy")),
        uplinks: Uplinks::none(),
        bulk: BulkInbox::default(),
        tenant_key: [1; 32],
        kv_folder: None,
    };
    let backend = NodeBackend::loading(Some(metrics.clone()));
    backend.loaded(EdgeNode::start(settings, parts).expect("an edge node"));
    (router(backend), metrics)
}

async fn send(app: &Router, request: Request<Body>) -> (u16, Vec<u8>) {
    let response = app.clone().oneshot(request).await.expect("a router does not fail");
    let status = response.status().as_u16();
    (status, to_bytes(response.into_body(), usize::MAX).await.expect("a body").to_vec())
}

async fn post(app: &Router, path: &str, body: &Value) -> Value {
    let request = Request::post(path).header("content-type", "application/json");
    let (status, body) = send(app, request.body(Body::from(body.to_string())).expect("a request")).await;
    let body: Value = serde_json::from_slice(&body).expect("JSON");
    assert_eq!(status, 200, "{body}");
    body
}

async fn get(app: &Router, path: &str) -> Value {
    let (_, body) = send(app, Request::get(path).body(Body::empty()).expect("a request")).await;
    serde_json::from_slice(&body).expect("JSON")
}

/// The sum of a counter's series with all of these labels.
fn counted(metrics: &PrometheusHandle, name: &str, labels: &[&str]) -> u64 {
    let text = metrics.render();
    let series = text.lines().filter(|l| l.starts_with(name) && labels.iter().all(|label| l.contains(label)));
    series.filter_map(|l| l.rsplit(' ').next()?.parse::<f64>().ok()).sum::<f64>() as u64
}

fn question(extra: &Value) -> Value {
    let mut body = json!({ "model": "tandem:local", "temperature": 0,
        "messages": [{ "role": "user", "content": "Calculate 936 + 181." }] });
    for (name, value) in extra.as_object().expect("an object") {
        body[name] = value.clone();
    }
    body
}

fn tokens(route: &Value) -> u64 {
    ["edge_tokens", "accepted", "cloud_tokens"].iter().map(|name| route[name].as_u64().expect("a count")).sum()
}

/// All counters move together, and by what the client was told.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_accounts_of_an_answer_agree_wherever_it_ends() {
    let (app, metrics) = node();
    let whole = post(&app, "/v1/chat/completions", &question(&json!({}))).await;
    let text = whole["choices"][0]["message"]["content"].as_str().expect("text").to_owned();
    let long = whole["usage"]["completion_tokens"].as_u64().expect("a count");
    assert!(long > 20, "an answer that can be cut: {text}");
    // Far from the end, where the node has long finished when the stop string is found, and at its end.
    let cuts = [text[1..3].to_owned(), text[text.len() / 2..text.len() / 2 + 3].to_owned(), "never there".into()];
    for stream in [false, true] {
        for stop in &cuts {
            let before = (
                get(&app, "/tandem/status").await,
                counted(&metrics, "tandem_edge_tokens_total", &["local"]),
                counted(&metrics, "tandem_edge_discarded_tokens_total", &["local"]),
                counted(&metrics, "tandem_edge_answers_total", &["stop"]),
            );
            let mut request = question(&json!({ "stop": [stop] }));
            let usage = if stream {
                request["stream"] = true.into();
                request["stream_options"] = json!({ "include_usage": true });
                let body = Request::post("/v1/chat/completions").header("content-type", "application/json");
                let (_, body) = send(&app, body.body(Body::from(request.to_string())).expect("a request")).await;
                let text = String::from_utf8(body).expect("text");
                let mut lines: Vec<&str> = text.lines().filter_map(|l| l.strip_prefix("data: ")).collect();
                assert_eq!(lines.pop(), Some("[DONE]"));
                serde_json::from_str::<Value>(lines.pop().expect("a chunk")).expect("JSON")["usage"].clone()
            } else {
                post(&app, "/v1/chat/completions", &request).await["usage"].clone()
            };
            let told = usage["completion_tokens"].as_u64().expect("a count");
            assert_eq!(tokens(&usage["tandem"]), told, "{stop:?}");
            let explained = get(&app, "/tandem/explain/last").await;
            assert_eq!(explained["tokens"].as_array().expect("tokens").len() as u64, told, "{stop:?}");
            assert_eq!(explained["route"], usage["tandem"], "{stop:?}");
            let status = get(&app, "/tandem/status").await;
            assert_eq!(tokens(&status["totals"]) - tokens(&before.0["totals"]), told, "{stop:?}");
            assert_eq!(counted(&metrics, "tandem_edge_tokens_total", &["local"]) - before.1, told, "{stop:?}");
            let discarded = usage["tandem"]["discarded"].as_u64().expect("a count");
            let all = counted(&metrics, "tandem_edge_discarded_tokens_total", &["local"]) - before.2;
            assert_eq!(all, discarded, "{stop:?}");
            assert!(told + discarded <= long, "{stop:?}: {usage}");
            assert_eq!(status["answers"].as_u64(), before.0["answers"].as_u64().map(|n| n + 1));
            assert_eq!(counted(&metrics, "tandem_edge_answers_total", &["stop"]) - before.3, 1);
        }
    }
    // One that nobody waited for.
    for stream in [false, true] {
        let before = (get(&app, "/tandem/status").await, counted(&metrics, "tandem_edge_answers_total", &["gone"]));
        let tokens_before = counted(&metrics, "tandem_edge_tokens_total", &["local"]);
        let left_before = counted(&metrics, "tandem_edge_requests_total", &["left"]);
        let body = question(&json!({ "stream": stream, "ignore_eos": true, "max_tokens": 4000 })).to_string();
        let request = Request::post("/v1/chat/completions").header("content-type", "application/json");
        let answer = app.clone().oneshot(request.body(Body::from(body)).expect("a request"));
        if stream {
            let mut body = answer.await.expect("a response").into_body().into_data_stream();
            futures::StreamExt::next(&mut body).await.expect("a chunk").expect("no error");
        } else {
            tokio::time::timeout(Duration::from_millis(300), answer).await.expect_err("a long answer");
        }
        let gone = async {
            while counted(&metrics, "tandem_edge_answers_total", &["gone"]) == before.1
                || get(&app, "/tandem/status").await["answers"] == before.0["answers"]
            {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(PATIENCE, gone).await.expect("the answer is booked");
        let status = get(&app, "/tandem/status").await;
        assert_eq!(status["answers"].as_u64(), before.0["answers"].as_u64().map(|n| n + 1));
        let taken = tokens(&status["totals"]) - tokens(&before.0["totals"]);
        assert_eq!(counted(&metrics, "tandem_edge_tokens_total", &["local"]) - tokens_before, taken);
        assert_eq!(get(&app, "/tandem/explain/last").await["tokens"].as_array().expect("tokens").len() as u64, taken);
        let left = counted(&metrics, "tandem_edge_requests_total", &["left"]) - left_before;
        assert_eq!(left, u64::from(!stream), "a response that never began is a request all the same");
    }
    thresholds_have_one_unit(&app).await;
    prompts_are_scored_as_answers_are(&app).await;
    only_what_is_new_is_computed(&app).await;
}

/// Rows that the node's model has computed.
async fn rows(app: &Router) -> u64 {
    let (_, text) = send(app, Request::get("/metrics").body(Body::empty()).expect("a request")).await;
    let text = String::from_utf8(text).expect("text");
    let count = text.lines().find_map(|line| line.strip_prefix("tandem_edge_rows_total ")?.parse().ok());
    count.expect("a count")
}

/// A second turn, an answer once more, several answers and a shared system prompt: what `usage` says was held
/// was not computed, in every API's words, and the text is that of a node that holds nothing.
async fn only_what_is_new_is_computed(app: &Router) {
    let (cold, _) = node_with(EdgeSettings { prefix_cache_mib_max: 0, ..settings() });
    let system = "You answer in one short sentence. ".repeat(12);
    // The template of this model leaves system prompts out.
    let first = |question: &str| format!("{system}{question}");
    let (mut messages, mut last) = (Vec::new(), String::new());
    let chat = |messages: &[Value], n: usize| json!({ "model": "tandem:local", "temperature": 0.7, "seed": 5, "max_tokens": 24, "n": n, "messages": messages });
    let text = |body: &Value, i: usize| body["choices"][i]["message"]["content"].as_str().expect("text").to_owned();
    let count = |body: &Value, path: &str| body.pointer(path).and_then(Value::as_u64).expect("a count");
    let (whole, held) = ("/usage/prompt_tokens", "/usage/prompt_tokens_details/cached_tokens");
    // (what is asked, answers, tokens of the prompt that are new)
    let table = [("Who are you?", 1, 60..400), ("Count to five.", 1, 5..60), ("", 1, 1..2), ("", 4, 1..2)];
    for (question, n, new) in table {
        if !question.is_empty() {
            let content = if messages.is_empty() { first(question) } else { question.to_owned() };
            if !messages.is_empty() {
                messages.push(json!({ "role": "assistant", "content": last }));
            }
            messages.push(json!({ "role": "user", "content": content }));
        }
        let before = rows(app).await;
        let path = "/v1/chat/completions";
        let body = post(app, path, &chat(&messages, n)).await;
        let expected = post(&cold, path, &chat(&messages, n)).await;
        for i in 0..n {
            assert_eq!(text(&body, i), text(&expected, i), "{question} {n}");
        }
        assert_eq!(count(&expected, held), 0);
        let (computed, told) = (rows(app).await - before, count(&body, whole) - count(&body, held));
        assert!(new.contains(&told), "{question} {n}: {told} of {} new", count(&body, whole));
        // The prompt's new tokens once, those of an answer but its last, and of the other answers the row
        // that says what comes first.
        let answers = count(&body, "/usage/completion_tokens");
        assert_eq!(computed, told + answers - n as u64 + (n as u64 - 1), "{question} {n}");
        last = text(&body, 0);
    }
    // Another conversation that begins alike, as the other APIs have it.
    let ask = json!({ "model": "tandem:local", "max_output_tokens": 4, "input": first("Hello.") });
    let usage = &post(app, "/v1/responses", &ask).await["usage"];
    assert!(count(usage, "/input_tokens") - count(usage, "/input_tokens_details/cached_tokens") < 30, "{usage}");
    let ask = json!({ "model": "tandem:local", "max_tokens": 4,
        "messages": [{ "role": "user", "content": first("Hello.") }] });
    let usage = &post(app, "/v1/messages", &ask).await["usage"];
    assert!(count(usage, "/input_tokens") == 1 && count(usage, "/cache_read_input_tokens") > 60, "{usage}");
    let explained = get(app, "/tandem/explain/last").await;
    assert_eq!(explained["route"]["cached_tokens"], usage["cache_read_input_tokens"]);
}

/// What is read of the threshold can be written back, in the unit of the policy in use.
async fn thresholds_have_one_unit(app: &Router) {
    let status = get(app, "/tandem/status").await;
    assert_eq!((&status["threshold"], &status["threshold_unit"]), (&json!(2.5), &json!("nats")));
    assert_eq!(status["policy"], "entropy");
    let changed = post(app, "/tandem/controls", &json!({ "threshold": status["threshold"] })).await;
    assert_eq!(changed["threshold"], status["threshold"]);
    let most = status["threshold_max"].as_f64().expect("a number");
    let request = Request::post("/tandem/controls").header("content-type", "application/json");
    let body = Body::from(json!({ "threshold": most + 1.0 }).to_string());
    let (code, body) = send(app, request.body(body).expect("a request")).await;
    assert!(code == 400 && String::from_utf8_lossy(&body).contains("nats"));
}

/// A prompt's log probabilities are those that its tokens had when they were written.
async fn prompts_are_scored_as_answers_are(app: &Router) {
    let ask = json!({ "model": "tandem:local", "prompt": "What is the capital of Peru?", "max_tokens": 12,
        "temperature": 0, "logprobs": 2 });
    let written = post(app, "/v1/completions", &ask).await;
    let report = |body: &Value, name: &str| body["choices"][0]["logprobs"][name].as_array().expect("a list").clone();
    let (tokens, scores) = (report(&written, "tokens"), report(&written, "token_logprobs"));
    let text = written["choices"][0]["text"].as_str().expect("text");
    let mut again = ask.clone();
    again["prompt"] = format!("What is the capital of Peru?{text}").into();
    again["echo"] = true.into();
    again["max_tokens"] = 0.into();
    let echoed = post(app, "/v1/completions", &again).await;
    assert_eq!(echoed["choices"][0]["text"], again["prompt"]);
    let (all, all_scores) = (report(&echoed, "tokens"), report(&echoed, "token_logprobs"));
    assert_eq!(all_scores[0], Value::Null);
    // The stop token of the answer is not in its text.
    let common = tokens.iter().take_while(|token| !token.as_str().expect("text").starts_with("<|")).count();
    let at = all.len() - common;
    assert_eq!(all[at..], tokens[..common]);
    for (got, wanted) in all_scores[at..].iter().zip(&scores) {
        let (got, wanted) = (got.as_f64().expect("a number"), wanted.as_f64().expect("a number"));
        assert!((got - wanted).abs() < 1e-4, "{got} and {wanted}");
    }
}
