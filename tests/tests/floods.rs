//! More than a node can take: what it costs, and what becomes of the others meanwhile.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use futures::future::{join_all, try_join_all};
use reqwest::{Client, Response, StatusCode};
use serde_json::{Value, json};
use tandem_tests::process::{Up, ask, until};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

const QUESTION: &str = "What is the capital of Peru?";
/// A little less than the largest body.
const LARGE: usize = 4 * 1024 * 1024 - 400;
/// Requests of one kind at once.
const AT_ONCE: usize = 8;

/// A figure of a process's memory, kB.
fn memory(pid: u32, name: &str) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(name)).context("no such figure")?;
    line.trim_matches(|c: char| !c.is_ascii_digit()).parse().context("no number")
}

/// Fails if the process has ever taken more than twice its idle memory and 64 MB.
fn check_peak(pid: u32, idle_kb: u64, what: &str) -> Result<()> {
    let peak = memory(pid, "VmHWM:")?;
    ensure!(peak <= 2 * idle_kb + 64 * 1024, "{what}: {peak} kB at the peak, {idle_kb} idle");
    Ok(())
}

async fn post(up: &Up, path: &str, body: impl Into<reqwest::Body>) -> Result<Response> {
    let request = Client::new().post(format!("{}/{path}", up.api)).header("content-type", "application/json");
    Ok(request.body(body).send().await?)
}

/// Status, and the code of its error.
async fn refused(response: Response) -> Result<(StatusCode, String)> {
    let status = response.status();
    let body: Value = response.json().await?;
    Ok((status, body["error"]["code"].as_str().unwrap_or_default().to_owned()))
}

/// Sends each body several times at once; all must be refused with `code`, while another client is answered.
async fn flood(up: &Up, path: &str, bodies: &[String], code: &str) -> Result<()> {
    let expected = ask(&up.api, QUESTION, "local", async |_| Ok(())).await?.text;
    for body in bodies {
        let kind = body.get(..80).unwrap_or(body);
        let one = async || refused(post(up, path, body.clone()).await?).await;
        let (refused, answered) =
            tokio::join!(join_all((0..AT_ONCE).map(|_| one())), ask(&up.api, QUESTION, "local", async |_| Ok(())));
        for refused in refused {
            let refused = refused.with_context(|| kind.to_owned())?;
            ensure!(refused == (StatusCode::BAD_REQUEST, code.to_owned()), "{kind}: {refused:?}");
        }
        ensure!(answered?.text == expected, "{kind}: the other one's answer is another");
    }
    Ok(())
}

/// Long texts are refused before they are tokenized, nested bodies before they are parsed; neither costs
/// more than a few copies of the bodies.
#[tokio::test(flavor = "multi_thread")]
async fn long_texts_and_nested_bodies_cost_little() -> Result<()> {
    let up = Up::start(&["--no-cloud"]).await?;
    ask(&up.api, QUESTION, "local", async |_| Ok(())).await?.check()?;
    let edge = up.pid("edge")?;
    let idle = memory(edge, "VmRSS:")?;

    let words: String = (0..).map(|i: u32| format!("{:x} ", i.wrapping_mul(0x9e37_79b9))).take(LARGE / 10).collect();
    let texts =
        [words, "a".repeat(LARGE), "1".repeat(LARGE), "\u{1f600}".repeat(LARGE / 4), "<|bos|>".repeat(LARGE / 7)];
    let chat = |text| json!({ "model": "tandem:local", "messages": [{ "role": "user", "content": text }] }).to_string();
    let chats: Vec<String> = texts.iter().map(chat).collect();
    flood(&up, "chat/completions", &chats, "context_length_exceeded").await?;
    check_peak(edge, idle, "long conversations")?;
    let blanks = [" ".repeat(LARGE), "a ".repeat(LARGE / 2)];
    let prompts = blanks.map(|text| json!({ "model": "tandem:local", "prompt": text }).to_string());
    flood(&up, "completions", &prompts, "context_length_exceeded").await?;
    check_peak(edge, idle, "long prompts")?;

    let nested = |inner: String| format!("{{\"model\":\"tandem\",\"messages\":[],\"metadata\":{inner}}}");
    let bodies = [
        nested("[".repeat(LARGE)),
        nested(format!("[{}0]", "[],".repeat(LARGE / 3))),
        nested(format!("[{}0]", "{\"\":{}},".repeat(LARGE / 8))),
        nested(format!("[{}0]", "0,".repeat(LARGE / 2))),
        nested(format!("{{{}\"\":0}}", (0..LARGE / 12).map(|i| format!("\"{i:06}\":0,")).collect::<String>())),
    ];
    flood(&up, "chat/completions", &bodies, "body_too_complex").await?;
    check_peak(edge, idle, "nested bodies")?;
    // What was taken is given back to the system, but for a tenth.
    until("the memory to come back", async || Ok(memory(edge, "VmRSS:")? <= idle + idle / 10)).await
}

/// Connections that send nothing, or only a part of a request, make room for those that do.
#[tokio::test(flavor = "multi_thread")]
async fn idle_connections_lock_nobody_out() -> Result<()> {
    let up = Up::start(&["--no-cloud", "--set", "api.connections_max=32"]).await?;
    let address = up.api.strip_prefix("http://").and_then(|rest| rest.strip_suffix("/v1")).context("an address")?;
    let mut idle = Vec::new();
    for i in 0..200 {
        let mut client = TcpStream::connect(address).await?;
        let parts = [
            "",
            "POST /v1/chat/completions HTTP/1.1\r\n",
            "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{",
        ];
        client.write_all(parts[i % 3].as_bytes()).await?;
        idle.push(client);
    }
    ask(&up.api, QUESTION, "local", async |_| Ok(())).await?.check()?;
    let health = reqwest::get(format!("http://{address}/health")).await?;
    ensure!(health.status() == StatusCode::OK, "{health:?}");
    let mut closed = 0;
    for client in &mut idle {
        let read = tokio::time::timeout(Duration::from_millis(1), client.read_u8()).await;
        closed += usize::from(matches!(read, Ok(Err(_))));
    }
    ensure!(closed >= 200 - 32, "only {closed} of 200 were closed");
    Ok(())
}

/// A few more than the node answers at once wait for their turn; who cannot wait is told when to come again.
#[tokio::test(flavor = "multi_thread")]
async fn requests_wait_in_line_before_they_are_refused() -> Result<()> {
    let up = Up::start(&["--no-cloud", "--set", "edge.requests_max=1", "--set", "edge.queue_ms_max=100000"]).await?;
    let answers = try_join_all((0..6).map(|_| ask(&up.api, QUESTION, "local", async |_| Ok(())))).await?;
    ensure!(answers.iter().all(|answer| answer.text == answers[0].text), "{answers:?}");
    drop(up);

    let up = Up::start(&["--no-cloud", "--set", "edge.requests_max=1", "--set", "edge.queue_ms_max=0"]).await?;
    let body = json!({
        "model": "tandem:local", "prompt": "a", "max_tokens": 100_000, "stream": true, "logit_bias": { "1": -100 }
    });
    let mut held = post(&up, "completions", body.to_string()).await?;
    held.chunk().await?.context("a first token")?;
    let response = post(&up, "completions", body.to_string()).await?;
    ensure!(response.headers().contains_key("retry-after"), "{response:?}");
    ensure!(refused(response).await? == (StatusCode::TOO_MANY_REQUESTS, "busy".to_owned()));
    Ok(())
}

/// Pages of listed origins may ask, with a key too; the setting is one like the others.
#[tokio::test(flavor = "multi_thread")]
async fn origins_are_a_setting() -> Result<()> {
    let up = Up::start(&["--no-cloud", "--api-key", "secret", "--set", "api.cors_origins=[\"https://app.example\"]"])
        .await?;
    let request = Client::new()
        .request(reqwest::Method::OPTIONS, format!("{}/chat/completions", up.api))
        .header("origin", "https://app.example")
        .header("access-control-request-method", "POST")
        .header("access-control-request-headers", "authorization,content-type");
    let response = request.send().await?;
    let allowed = response.headers().get("access-control-allow-origin").map(|origin| origin.to_str()).transpose()?;
    ensure!(response.status() == StatusCode::OK && allowed == Some("https://app.example"), "{response:?}");
    Ok(())
}
