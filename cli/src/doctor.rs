//! `tandem doctor`: what works on this machine, and what to do about what does not.

use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use reqwest::StatusCode;
use serde::Serialize;
use serde_json::{Value, json};
use tandem_edge_node::diagnosis::{self, CloudState, LinkState};
use tandem_engine::{KvPool, Rows, inspect, memory::available_bytes};
use tandem_proto::message::Hello;
use tandem_transport::bulk::BulkInbox;
use tandem_transport::{Connector, DevCa, DialState, Role, Server, Settings as QuicSettings};

use crate::args::{Global, NodeArgs};
use crate::config::{self, Settings};
use crate::failure::{Code, Failure, OrFail as _};
use crate::model::human;
use crate::node_client::NodeClient;
use crate::ready::{print_json, print_line};
use crate::state::{self, StateDir};
use crate::{logging, pair, uplink};

/// A question of the reference, and how both models answer it greedily (`models/reference/`).
const QUESTION: &str = "Zagreb is the capital of which country?";
/// The answer to it.
const ANSWER: &str = "Zagreb is the capital of Croatia.";
/// Memory that buffers and the smallest useful KV pools take beside the weights, bytes.
const WORK_BYTES: u64 = 256 << 20;
/// No build of this program is older: 2025-01-01.
const BUILT_AFTER_S: u64 = 1_735_689_600;
/// Longest wait for a link over loopback.
const LINK_WAIT: Duration = Duration::from_secs(5);

/// Longest wait for a node that is still connecting to its cloud.
const CLOUD_WAIT: Duration = Duration::from_secs(6);
/// Between two looks at it.
const CLOUD_LOOK_EVERY: Duration = Duration::from_millis(100);

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    /// Fine.
    Ok,
    /// Works, with a drawback.
    Warn,
    /// Broken.
    Fail,
}

/// One line of the report.
#[derive(Clone, Debug, Serialize)]
struct Check {
    name: &'static str,
    verdict: Verdict,
    /// What was found, and what to do unless it is fine.
    detail: String,
}

impl Check {
    fn ok(name: &'static str, detail: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Ok, detail: detail.into() }
    }

    fn warn(name: &'static str, detail: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Warn, detail: detail.into() }
    }

    fn fail(name: &'static str, detail: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Fail, detail: detail.into() }
    }
}

/// Runs every check and reports; fails if one does.
pub(crate) async fn run(global: &Global, args: &NodeArgs) -> Result<(), Failure> {
    let path = state::path(global)?;
    let (configuration, settings) = match config::load(global, &path, Vec::new()) {
        Ok(settings) => (Check::ok("configuration", "every key is known"), settings),
        Err(failure) => (Check::fail("configuration", failure.to_string()), Settings::default()),
    };
    logging::start(&settings.log)?;
    let mut checks = vec![configuration, cpu(), memory(&settings), clock(), state_folder(&path)];
    for name in [&settings.edge.model, &settings.cloud.model] {
        checks.push(model(name.clone()).await);
    }
    checks.push(loopback_link().await);
    match node(global, args).await {
        Some(check) => checks.push(check),
        None => {
            checks.extend(ports(&settings));
            checks.extend(configured_cloud(&settings, &path).await);
        }
    }
    let broken = checks.iter().any(|check| check.verdict == Verdict::Fail);
    if global.json {
        print_json(&json!({ "ok": !broken, "checks": checks }));
    } else {
        for Check { name, verdict, detail } in &checks {
            let mark = match verdict {
                Verdict::Ok => "ok  ",
                Verdict::Warn => "warn",
                Verdict::Fail => "FAIL",
            };
            print_line(&format!("{mark}  {name:<14} {detail}"));
        }
    }
    if broken { Err(Failure::reported(Code::Unwell)) } else { Ok(()) }
}

fn cpu() -> Check {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let (set, numerics) = (tandem_engine::instruction_set(), tandem_engine::numerics());
    if set == "portable" {
        let detail = format!("{cores} cores without AVX2 or NEON: the portable kernels are several times slower");
        return Check::warn("cpu", detail);
    }
    Check::ok("cpu", format!("{cores} cores, kernels {set}, arithmetic {numerics}"))
}

fn memory(settings: &Settings) -> Check {
    // What cannot be read is the business of the models' own checks.
    let weights = |name: &String| Some(inspect(&pair::find(name, Code::Config).ok()?.files()).ok()?.weight_bytes);
    let weights: u64 = [&settings.edge.model, &settings.cloud.model].into_iter().filter_map(weights).sum();
    let needed = weights.saturating_add(WORK_BYTES);
    match available_bytes() {
        None => Check::warn("memory", format!("cannot be read here; about {} are needed", human(needed))),
        Some(free) if free < needed => Check::fail(
            "memory",
            format!(
                "{} free, the models and their state need about {}; end something, choose smaller models, or lower edge.kv_blocks and cloud.bounds.kv_blocks",
                human(free),
                human(needed)
            ),
        ),
        Some(free) => Check::ok("memory", format!("{} free, the models take {}", human(free), human(weights))),
    }
}

fn clock() -> Check {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    if now < BUILT_AFTER_S {
        return Check::fail("clock", "is before 2025; set it, or no certificate will be valid");
    }
    Check::ok("clock", "plausible")
}

fn state_folder(path: &Path) -> Check {
    let check = || -> Result<(), Failure> {
        let state = StateDir::open(path)?;
        state.identity(None, Role::Operator, "doctor").map(drop)
    };
    match check() {
        Ok(()) => Check::ok("state", format!("{} is writable, its CA issues valid certificates", path.display())),
        Err(failure) => Check::fail("state", failure.to_string()),
    }
}

async fn model(name: String) -> Check {
    let asked = name.clone();
    let answered = tokio::task::spawn_blocking(move || {
        let embedded = pair::find(&asked, Code::Config)?.is_embedded();
        answer(&asked).map(|(text, ms)| (embedded, text, ms))
    });
    match answered.await.or_fail(Code::Failed).and_then(|answered| answered) {
        Ok((true, text, ms)) if text == ANSWER => {
            Check::ok("model", format!("{name} loads and answers as the reference ({ms} ms)"))
        }
        Ok((true, text, _)) => Check::fail(
            "model",
            format!(
                "{name} answers {text:?}, the reference {ANSWER:?}: the kernels are wrong on this machine; please report it with `tandem doctor --json`"
            ),
        ),
        // There is no reference for other models.
        Ok((false, text, ms)) => Check::ok("model", format!("{name} loads and answers {text:?} ({ms} ms)")),
        Err(failure) => Check::fail("model", failure.to_string()),
    }
}

/// The greedy answer of a model to [`QUESTION`], and how long loading and answering took.
fn answer(name: &str) -> Result<(String, u128), Failure> {
    const STEPS_MAX: usize = 32;
    let begun = std::time::Instant::now();
    let loaded = pair::load(name, 0)?;
    let message = tandem_engine::chat::Message::new("user", QUESTION);
    let prompt = loaded.chat.render(&[message], true, 0).or_fail(Code::Failed)?;
    let mut next = loaded.tokenizer.encode(&prompt).or_fail(Code::Failed)?;
    let layers = 0..loaded.model.spec().layers;
    let mut pool = KvPool::new(loaded.model.kv_layout(), layers.clone(), 8).or_fail(Code::Failed)?;
    let mut seq = pool.sequence();
    let mut written = Vec::new();
    while written.len() < STEPS_MAX {
        let hidden = loaded.model.embed(&next).or_fail(Code::Failed)?;
        let mut rows = [Rows { seq: &mut seq, rows: next.len() }];
        let hidden = loaded.model.layers(layers.clone(), &mut pool, &mut rows, hidden).or_fail(Code::Failed)?;
        let logits = loaded.model.head(&hidden, &[next.len() - 1]).or_fail(Code::Failed)?;
        let best =
            logits.data.iter().enumerate().fold((0, f32::NEG_INFINITY), |best, (id, &score)| {
                if score > best.1 { (id as u32, score) } else { best }
            });
        if loaded.stop_tokens.contains(&best.0) {
            break;
        }
        written.push(best.0);
        next = vec![best.0];
    }
    let text = loaded.tokenizer.decode(&written).or_fail(Code::Failed)?;
    Ok((text, begun.elapsed().as_millis()))
}

async fn loopback_link() -> Check {
    let linked = async {
        let dir = std::env::temp_dir().join(format!("tandem-doctor-{}-{}", std::process::id(), pair::now_ms()));
        let ca = DevCa::open_or_create(&dir).or_fail(Code::State);
        // The CA lives on in memory.
        let _ = std::fs::remove_dir_all(&dir);
        let ca = ca?;
        let (cloud, edge) = (ca.issue(Role::Cloud, "doctor"), ca.issue(Role::Edge, "doctor"));
        let (cloud, edge) = (cloud.or_fail(Code::State)?, edge.or_fail(Code::State)?);
        let hello = Hello::new("doctor", 1, Vec::new());
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let server = Server::bind(any, &cloud, QuicSettings::dev(), hello.clone()).or_fail(Code::Failed)?;
        let address = server.local_addr().or_fail(Code::Failed)?;
        let connector = Connector::new(&edge, QuicSettings::dev(), hello).or_fail(Code::Failed)?;
        let link = connector.connect(address, "localhost").await.or_fail(Code::Failed)?;
        Ok::<_, Failure>(link.stats().rtt_us)
    };
    match tokio::time::timeout(LINK_WAIT, linked).await {
        Ok(Ok(rtt_us)) => Check::ok("link", format!("mutual TLS over QUIC on loopback works (RTT {rtt_us} µs)")),
        Ok(Err(failure)) => {
            Check::fail("link", format!("no QUIC link over loopback: {failure}; allow UDP on lo in the firewall"))
        }
        Err(_) => Check::fail("link", "no QUIC link over loopback within 5 s; allow UDP on lo in the firewall"),
    }
}

/// The running node; none if nothing answers there, or something else.
async fn node(global: &Global, args: &NodeArgs) -> Option<Check> {
    let client = match NodeClient::new(global, args) {
        Ok(client) => client,
        Err(failure) if failure.code() == Code::Usage => return Some(Check::fail("node", failure.to_string())),
        Err(_) => return None,
    };
    let response = client.get("/tandem/status").send().await.ok()?;
    if response.status() == StatusCode::UNAUTHORIZED {
        let url = client.url();
        let detail =
            format!("one answers at {url} but refuses; set TANDEM_API_KEY to its key, or give it with --api-key");
        return Some(Check::warn("node", detail));
    }
    let mut status = client.json(response.error_for_status().ok()?).await.ok()?;
    // A node that has just started decides soon whether its cloud is merely slow.
    let begun = Instant::now();
    while status["cloud"]["state"] == "connecting" && begun.elapsed() < CLOUD_WAIT {
        tokio::time::sleep(CLOUD_LOOK_EVERY).await;
        status = client.json(client.get("/tandem/status").send().await.ok()?).await.ok()?;
    }
    Some(cloud_of(&status))
}

/// What a running node says of its cloud.
fn cloud_of(status: &Value) -> Check {
    let cloud = &status["cloud"];
    let word = |name: &str| cloud[name].as_str().unwrap_or_default();
    let problem = format!("{}; {}", word("problem"), word("what_to_do"));
    match word("state") {
        "connected" => Check::ok("node", "one is running, connected to its cloud"),
        "none" => Check::ok("node", "one is running, without a cloud by choice"),
        "cut" => Check::warn("node", "one is running, its cloud is cut off by the operator; let it back on the page"),
        "failed" => Check::fail("node", format!("one is running, and its cloud cannot take part: {problem}")),
        _ if cloud["problem"].is_string() => {
            Check::fail("node", format!("one is running, and its cloud is not there: {problem}"))
        }
        _ => Check::fail("node", "one is running, and is not connected to its cloud yet; see its log"),
    }
}

/// Whether an edge with these settings would reach its cloud; none if they name no cloud and no router.
async fn configured_cloud(settings: &Settings, path: &Path) -> Option<Check> {
    if settings.peers.cloud.is_none() && settings.peers.routers.is_empty() {
        return None;
    }
    Some(match dial(settings, path).await {
        Ok(None) => Check::ok("cloud", "the cloud of the settings answers and serves the model"),
        Ok(Some(failure)) => Check::fail("cloud", format!("the cloud of the settings cannot take part: {failure}")),
        Err(failure) => Check::fail("cloud", failure.to_string()),
    })
}

/// Dials the cloud as an edge does; gives what keeps it from taking part.
async fn dial(settings: &Settings, path: &Path) -> Result<Option<String>, Failure> {
    let issuer = StateDir::open(path)?.issuer(settings.peers.identity.as_deref(), Role::Edge, "doctor");
    let identity = issuer.issue()?;
    let hello = Hello::new("doctor", pair::now_ms(), Vec::new());
    let (model, quic) = (&settings.edge.cloud_model, settings.link.quic());
    let uplinks = uplink::start(&settings.peers, model, (&identity, issuer), &quic, &hello, &BulkInbox::default())?;
    let Some(mut dialing) = uplinks.dialing() else { return Ok(None) };
    let decided = |dial: &DialState| {
        let state = CloudState::of_dialing(dial, true).state;
        matches!(state, LinkState::Connected | LinkState::Failed)
    };
    // Whatever it is when the time is over is the answer.
    let _ = tokio::time::timeout(CLOUD_WAIT, dialing.wait_for(decided)).await;
    let state = CloudState::of_dialing(&dialing.borrow(), false);
    let Some(link) = uplinks.current() else {
        return Ok(Some(state.failure().unwrap_or_else(|| "it does not answer; check its address".to_owned())));
    };
    let served: Vec<String> = link.peer_hello().models.iter().map(|card| card.name.clone()).collect();
    Ok((!served.contains(model)).then(|| diagnosis::unknown_model(model, &served).line()))
}

/// Whether the ports that `up` would take are free.
fn ports(settings: &Settings) -> Vec<Check> {
    let ports = [
        ("api port", settings.listen.api, TcpListener::bind(settings.listen.api).is_ok(), "--listen"),
        ("router port", settings.listen.router, TcpListener::bind(settings.listen.router).is_ok(), "--router-listen"),
        ("cloud port", settings.listen.cloud, UdpSocket::bind(settings.listen.cloud).is_ok(), "--cloud-listen"),
    ];
    let check = |(name, address, free, flag): (_, SocketAddr, _, _)| {
        if free {
            Check::ok(name, format!("{address} is free"))
        } else {
            Check::warn(name, format!("{address} is taken; stop what holds it, or choose another with {flag}"))
        }
    };
    ports.map(check).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_whose_cloud_cannot_take_part_is_never_fine() {
        let table = [
            (json!({ "state": "connected" }), Verdict::Ok, "connected"),
            (json!({ "state": "none" }), Verdict::Ok, "by choice"),
            (json!({ "state": "cut" }), Verdict::Warn, "cut off"),
            (json!({ "state": "failed", "problem": "P", "what_to_do": "do W" }), Verdict::Fail, "P; do W"),
            (json!({ "state": "connecting", "problem": "P", "what_to_do": "do W" }), Verdict::Fail, "P; do W"),
            (json!({ "state": "connecting" }), Verdict::Fail, "not connected"),
            (json!(null), Verdict::Fail, "not connected"),
        ];
        for (cloud, verdict, words) in table {
            let check = cloud_of(&json!({ "cloud": cloud }));
            assert_eq!(check.verdict, verdict, "{cloud}");
            assert!(check.detail.contains(words), "{cloud}: {}", check.detail);
        }
    }
}
