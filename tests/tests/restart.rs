//! A conversation outlives the edge's process, and what is on disk is used only if it is what was computed.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tandem_tests::process::Process;

/// Tokens of a block.
const KV_BLOCK_TOKENS: u64 = tandem_proto::limits::KV_BLOCK_TOKENS as u64;

struct Edge {
    process: Process,
    api: String,
}

/// What a turn said and cost.
#[derive(Debug, PartialEq)]
struct Turn {
    text: String,
    ids: Vec<u64>,
    prompt_tokens: u64,
    cached_tokens: u64,
}

impl Edge {
    async fn start(state: &Path, extra: &[&str]) -> Result<Self> {
        let state = state.to_str().context("the path is no text")?;
        let args = [&["edge", "--listen", "127.0.0.1:0", "--state", state], extra].concat();
        let process = Process::start(&args).await?;
        let api = process.field("url")?;
        Ok(Self { process, api })
    }

    async fn end(mut self) -> Result<()> {
        let status = self.process.signal("TERM").await?;
        ensure!(status.success(), "{status}: {}", self.process.stderr());
        Ok(())
    }

    async fn ask(&self, messages: &Value) -> Result<Turn> {
        let body = json!({
            "model": "tandem:local", "messages": messages, "temperature": 0.7, "seed": 11, "max_tokens": 40,
            "ignore_eos": true, "tandem": { "tokens": true },
        });
        let response = reqwest::Client::new().post(format!("{}/chat/completions", self.api)).json(&body).send().await?;
        let answer: Value = response.error_for_status()?.json().await?;
        let count = |path: &str| answer.pointer(path).and_then(Value::as_u64).context("a count");
        let choice = &answer["choices"][0];
        Ok(Turn {
            text: choice["message"]["content"].as_str().context("text")?.to_owned(),
            ids: choice["tandem"]["tokens"]
                .as_array()
                .context("tokens")?
                .iter()
                .filter_map(|token| token["id"].as_u64())
                .collect(),
            prompt_tokens: count("/usage/prompt_tokens")?,
            cached_tokens: count("/usage/prompt_tokens_details/cached_tokens")?,
        })
    }

    async fn metric(&self, name: &str) -> Result<u64> {
        let text = reqwest::get(self.api.replace("/v1", "/metrics")).await?.error_for_status()?.text().await?;
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<f64>().ok());
        Ok(value.with_context(|| format!("no {name} in {text}"))? as u64)
    }
}

fn blocks(state: &Path) -> Result<Vec<PathBuf>> {
    let mut files: Vec<PathBuf> =
        fs::read_dir(state.join("kv"))?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    files.retain(|path| path.extension().is_some_and(|extension| extension == "kv"));
    Ok(files)
}

fn turns() -> Value {
    let facts = "Lima is the capital of Peru, and Quito is the capital of Ecuador. ".repeat(8);
    json!([{ "role": "user", "content": format!("{facts}What is the capital of Peru?") }])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conversation_survives_the_edges_restart() -> Result<()> {
    let (state, other) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let state = state.path();
    // A node that keeps nothing says what is right.
    let cold = Edge::start(other.path(), &["--set", "edge.prefix_cache_mib_max=0"]).await?;
    let mut messages = turns();
    let first = cold.ask(&messages).await?;
    let list = messages.as_array_mut().context("a list")?;
    list.push(json!({ "role": "assistant", "content": first.text }));
    list.push(json!({ "role": "user", "content": "And of Ecuador?" }));
    let second = cold.ask(&messages).await?;
    cold.end().await?;
    ensure!(first.prompt_tokens > 100 && second.cached_tokens == 0, "{first:?} {second:?}");
    ensure!(!other.path().join("kv").exists(), "nothing is kept where nothing is to be kept");

    let edge = Edge::start(state, &[]).await?;
    ensure!(edge.ask(&turns()).await? == first, "the first turn");
    edge.end().await?;
    let files = blocks(state)?;
    ensure!(!files.is_empty(), "nothing is on disk");
    #[cfg(unix)]
    for path in files.iter().chain([&state.join("kv")]) {
        use std::os::unix::fs::PermissionsExt as _;
        let mode = fs::metadata(path)?.permissions().mode();
        ensure!(mode & 0o077 == 0, "others may look at {}: {mode:o}", path.display());
    }

    // The second turn after a restart.
    let mut edge = Edge::start(state, &[]).await?;
    let turn = edge.ask(&messages).await?;
    ensure!(turn.ids == second.ids && turn.text == second.text, "{turn:?} {second:?}");
    ensure!(turn.cached_tokens >= first.prompt_tokens, "{turn:?} after {first:?}");
    ensure!(edge.metric("tandem_edge_prefix_disk_restored_blocks_total").await? > 3);
    // Killed in the middle of whatever it writes. Whole blocks of the first turn are none of it.
    edge.process.kill().await?;
    let edge = Edge::start(state, &[]).await?;
    let turn = edge.ask(&messages).await?;
    let whole = first.prompt_tokens / KV_BLOCK_TOKENS * KV_BLOCK_TOKENS;
    ensure!(turn.ids == second.ids && turn.text == second.text && turn.cached_tokens >= whole, "{turn:?}");
    edge.end().await?;

    // A flipped bit in a number is found, and its rows are computed.
    for path in blocks(state)? {
        let mut bytes = fs::read(&path)?;
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x40;
        fs::write(&path, bytes)?;
    }
    let edge = Edge::start(state, &[]).await?;
    let turn = edge.ask(&messages).await?;
    ensure!(turn.ids == second.ids && turn.text == second.text && turn.cached_tokens == 0, "{turn:?}");
    ensure!(edge.metric("tandem_edge_prefix_disk_refused_blocks_total").await? > 0);
    ensure!(edge.process.stderr().contains("damaged"), "{}", edge.process.stderr());
    edge.end().await?;

    // They are replaced by good ones.
    let edge = Edge::start(state, &[]).await?;
    let turn = edge.ask(&messages).await?;
    ensure!(turn.ids == second.ids && turn.cached_tokens == turn.prompt_tokens - 1, "{turn:?}");
    edge.end().await?;

    // Another model takes nothing of it, and its own comes in the place of it.
    let before = blocks(state)?;
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/tests/goldens/tiny-llama-f16.gguf");
    let edge = Edge::start(state, &["--model", tiny.to_str().context("the path is no text")?]).await?;
    let hello = json!([{ "role": "user", "content": "hello" }]);
    ensure!(edge.ask(&hello).await?.cached_tokens == 0);
    ensure!(edge.process.stderr().contains("another model"), "{}", edge.process.stderr());
    edge.end().await?;
    let after = blocks(state)?;
    ensure!(!after.is_empty() && after.iter().all(|path| !before.contains(path)), "{after:?}");

    // Off, and what there was is gone.
    let edge = Edge::start(state, &["--set", "edge.prefix_disk_mib_max=0"]).await?;
    ensure!(blocks(state)?.is_empty());
    ensure!(edge.ask(&turns()).await? == first);
    edge.end().await?;
    ensure!(blocks(state)?.is_empty());
    Ok(())
}
