//! The real llama-server as a process: `tests/clients/llama_server.py` runs the one that the Python package
//! xllamacpp carries.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};

use crate::process::{WAIT_MAX, finish, required};

/// Sequences that a server keeps.
const SLOTS: &str = "2";
/// Context of each, tokens.
const CONTEXT: &str = "1024";

/// What is needed to run it.
#[derive(Clone, Debug)]
pub struct Needs {
    /// A Python with the package.
    pub python: PathBuf,
    /// SmolLM2-135M-Instruct in Q4_1.
    pub smollm2: String,
}

/// Finds what is needed; without it, a test is skipped and says so, unless the environment says that it must be there.
pub async fn needs() -> Result<Option<Needs>> {
    let clients = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/clients/bin/python");
    let mut python = None;
    for candidate in [clients, PathBuf::from("python3")] {
        let works = finish(Command::new(&candidate).args(["-c", "import xllamacpp"])).await;
        if works.is_ok_and(|ended| ended.code == Some(0)) {
            python = Some(candidate);
            break;
        }
    }
    let smollm2 = std::env::var("TANDEM_SMOLLM2_GGUF").ok();
    ensure!(
        python.is_some() || !required("TANDEM_REQUIRE_CLIENTS"),
        "no Python has xllamacpp; tests/clients/README.md says how to install it"
    );
    ensure!(smollm2.is_some() || !required("TANDEM_REQUIRE_SMOLLM2"), "TANDEM_SMOLLM2_GGUF names no file");
    let found = python.zip(smollm2).map(|(python, smollm2)| Needs { python, smollm2 });
    if found.is_none() {
        println!("SKIPPED: needs xllamacpp (tests/clients/README.md) and TANDEM_SMOLLM2_GGUF");
    }
    Ok(found)
}

/// A running server.
#[derive(Debug)]
pub struct LlamaServer {
    child: Child,
    /// Where it is.
    pub url: String,
    port: u16,
}

impl LlamaServer {
    /// Starts one for `model` on `port`, 0 for any that is free, and waits until it serves.
    pub async fn start(needs: &Needs, model: &str, port: u16) -> Result<Self> {
        let port = match port {
            0 => std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port(),
            port => port,
        };
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients/llama_server.py");
        let mut child = Command::new(&needs.python)
            .arg(script)
            .args([model, &port.to_string(), SLOTS, CONTEXT])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()?;
        let mut lines = BufReader::new(child.stdout.take().context("standard output")?).lines();
        let line = tokio::time::timeout(WAIT_MAX, lines.next_line()).await.context("llama-server does not start")??;
        let url = line.context("llama-server ended before it served")?;
        ensure!(url.starts_with("http://"), "llama-server said {url:?}");
        Ok(Self { child, url, port })
    }

    /// Port that it listens on.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// SIGKILL, and waits for the end.
    pub async fn kill(&mut self) -> Result<()> {
        Ok(self.child.kill().await?)
    }

    /// The token ids with which it continues a prompt by itself, greedily.
    pub async fn greedy(&self, prompt: &[u32], tokens: usize) -> Result<Vec<u64>> {
        let body = json!({
            "prompt": prompt, "n_predict": tokens, "temperature": 0, "return_tokens": true, "cache_prompt": false,
        });
        let answer = self.post("/completion", &body).await?;
        Ok(serde_json::from_value(answer["tokens"].clone())?)
    }

    /// How many sequences it is working on.
    pub async fn busy(&self) -> Result<usize> {
        let slots: Value = reqwest::get(format!("{}/slots", self.url)).await?.error_for_status()?.json().await?;
        let slots = slots.as_array().context("slots")?;
        Ok(slots.iter().filter(|slot| slot["is_processing"] == true).count())
    }

    async fn post(&self, path: &str, body: &Value) -> Result<Value> {
        let url = format!("{}{path}", self.url);
        Ok(reqwest::Client::new().post(url).json(body).send().await?.error_for_status()?.json().await?)
    }
}
