//! The `tandem` binary as a person runs it: real processes, found by what they print.
//!
//! The binary lies beside the test's own executable. `cargo test --workspace` builds it there; a test
//! of this package alone uses whatever was built last, and fails where nothing was.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};
use tokio::process::{Child, Command};

/// Longest wait for a process to serve or to end. Far above what is needed: it only ends hung tests.
pub const WAIT_MAX: Duration = Duration::from_secs(120);
/// Between two looks at something that takes its time.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Most of a process's standard error that is kept, bytes.
const STDERR_BYTES_MAX: usize = 1 << 20;

/// Path of the `tandem` binary of this build.
pub fn binary() -> Result<PathBuf> {
    let test = std::env::current_exe()?;
    // target/<profile>/deps/test-0123456789abcdef
    let folder = test.parent().and_then(Path::parent).context("the test lies in no build folder")?;
    let path = folder.join(format!("tandem{}", std::env::consts::EXE_SUFFIX));
    ensure!(
        path.is_file(),
        "{} is missing; run `cargo test --workspace`, or `cargo build -p tandem-cli` first",
        path.display()
    );
    Ok(path)
}

/// A command of the binary that does not see the settings of the environment that the tests run in.
pub fn tandem(args: &[impl AsRef<OsStr>]) -> Result<Command> {
    let mut command = Command::new(binary()?);
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("TANDEM_")) {
        command.env_remove(name);
    }
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    Ok(command)
}

/// What a command that ends by itself left behind.
#[derive(Clone, Debug)]
pub struct Ended {
    /// Exit code; none if a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// Runs the binary to its end.
pub async fn run(args: &[impl AsRef<OsStr>]) -> Result<Ended> {
    finish(&mut tandem(args)?).await
}

/// Runs a command to its end.
pub async fn finish(command: &mut Command) -> Result<Ended> {
    let output = tokio::time::timeout(WAIT_MAX, command.output()).await.context("the command does not end")??;
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ok(Ended { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) })
}

/// A long-running process that has said that it serves.
#[derive(Debug)]
pub struct Process {
    child: Child,
    stderr: Arc<Mutex<String>>,
    /// The line that it printed.
    pub ready: Value,
}

impl Process {
    /// Starts `tandem ARGS --json` and waits for its ready line.
    pub async fn start(args: &[impl AsRef<OsStr>]) -> Result<Self> {
        let mut command = tandem(args)?;
        let mut child = command.arg("--json").spawn()?;
        let stderr = Arc::new(Mutex::new(String::new()));
        let mut errors = BufReader::new(child.stderr.take().context("standard error")?).lines();
        let kept = stderr.clone();
        tokio::spawn(async move {
            while let Ok(Some(line)) = errors.next_line().await {
                let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                if kept.len() + line.len() < STDERR_BYTES_MAX {
                    kept.push_str(&line);
                    kept.push('\n');
                }
            }
        });
        let mut output = BufReader::new(child.stdout.take().context("standard output")?);
        let mut line = String::new();
        let heard = tokio::time::timeout(WAIT_MAX, output.read_line(&mut line)).await;
        let said = || stderr.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match heard {
            Err(_) => bail!("the process did not serve within {} s; it said: {}", WAIT_MAX.as_secs(), said()),
            Ok(Ok(0)) => {
                let status = child.wait().await?;
                tokio::time::sleep(LOOK_EVERY).await;
                bail!("the process ended ({status}) before it served; it said: {}", said())
            }
            Ok(read) => drop(read?),
        }
        let ready = serde_json::from_str(&line).with_context(|| format!("not a ready line: {line:?}"))?;
        // Keep the pipe empty, or the process blocks once it is full.
        tokio::spawn(async move {
            let mut rest = Vec::new();
            let _ = output.read_to_end(&mut rest).await;
        });
        Ok(Self { child, stderr, ready })
    }

    /// Process id.
    pub fn pid(&self) -> Result<u32> {
        self.child.id().context("the process has ended")
    }

    /// A field of the ready line.
    pub fn field(&self, name: &str) -> Result<String> {
        Ok(self.ready[name]
            .as_str()
            .with_context(|| format!("the ready line has no {name}: {}", self.ready))?
            .to_owned())
    }

    /// What it has written to standard error so far.
    #[must_use]
    pub fn stderr(&self) -> String {
        self.stderr.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// SIGKILL, and waits for the end.
    pub async fn kill(&mut self) -> Result<()> {
        Ok(self.child.kill().await?)
    }

    /// SIGTERM (or the signal called `name`), and waits for the end.
    pub async fn signal(&mut self, name: &str) -> Result<ExitStatus> {
        signal(self.pid()?, name).await?;
        self.wait().await
    }

    /// Waits for the end.
    pub async fn wait(&mut self) -> Result<ExitStatus> {
        Ok(tokio::time::timeout(WAIT_MAX, self.child.wait()).await.context("the process does not end")??)
    }
}

/// Sends the signal called `name` (`TERM`, `KILL`, `STOP`) to a process.
pub async fn signal(pid: u32, name: &str) -> Result<()> {
    let sent = Command::new("kill").args([format!("-{name}"), pid.to_string()]).status().await?;
    ensure!(sent.success(), "kill -{name} {pid}: {sent}");
    Ok(())
}

/// True while a process runs; a zombie does not (Linux).
#[must_use]
pub fn runs(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // pid (name) state …
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    state.is_some_and(|state| state != 'Z' && state != 'X')
}

/// Process id of the `tandem ROLE` that uses the state folder `state` (Linux).
pub fn find(role: &str, state: &str) -> Result<Option<u32>> {
    for entry in std::fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let args: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
        if args.get(1) == Some(&role.as_bytes()) && args.contains(&state.as_bytes()) {
            return Ok(Some(pid));
        }
    }
    Ok(None)
}

/// CPU time that a process has taken, of all its threads (Linux).
pub fn cpu_time(pid: u32) -> Result<Duration> {
    let mut nanoseconds = 0;
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        // "time on the CPU, time waiting, slices"; a thread may end meanwhile.
        let text = std::fs::read_to_string(task?.path().join("schedstat")).unwrap_or_default();
        nanoseconds += text.split(' ').next().and_then(|first| first.parse::<u64>().ok()).unwrap_or(0);
    }
    Ok(Duration::from_nanos(nanoseconds))
}

/// Waits until `done`, at most [`WAIT_MAX`].
pub async fn until(what: &str, mut done: impl AsyncFnMut() -> Result<bool>) -> Result<()> {
    let wait = async {
        while !done().await? {
            tokio::time::sleep(LOOK_EVERY).await;
        }
        Ok(())
    };
    tokio::time::timeout(WAIT_MAX, wait).await.with_context(|| format!("waited {} s for {what}", WAIT_MAX.as_secs()))?
}

/// True if the variable says that what a test needs must be there; without it such a test is skipped, and
/// says so.
#[must_use]
pub fn required(variable: &str) -> bool {
    std::env::var_os(variable).is_some_and(|value| !value.is_empty() && value != "0")
}

/// A running `tandem up` in a state folder of its own.
#[derive(Debug)]
pub struct Up {
    /// The process.
    pub process: Process,
    /// Base address for OpenAI clients, ending in `/v1`.
    pub api: String,
    /// Address of the chat page.
    pub page: String,
    /// Its state folder.
    pub state: TempDir,
}

impl Up {
    /// Starts it on free ports with further arguments, and waits until it serves and the cloud is
    /// connected.
    pub async fn start(extra: &[&str]) -> Result<Self> {
        let state = tempfile::tempdir()?;
        let folder = state.path().to_str().context("the folder for temporary files has a name that is no text")?;
        let fixed =
            ["up", "--listen", "127.0.0.1:0", "--cloud-listen", "127.0.0.1:0", "--router-listen", "127.0.0.1:0"];
        let args: Vec<&str> = fixed.into_iter().chain(["--state", folder]).chain(extra.iter().copied()).collect();
        let process = Process::start(&args).await?;
        let (api, page) = (process.field("api")?, process.field("page")?);
        let up = Self { process, api, page, state };
        if !extra.contains(&"--no-cloud") {
            // The ready line does not wait for a slow cloud.
            until("the edge to reach its cloud", async || Ok(up.status().await?["cloud_connected"] == true))
                .await
                .with_context(|| up.process.stderr())?;
        }
        Ok(up)
    }

    /// Process id of `edge`, `router` or `cloud`.
    pub fn pid(&self, role: &str) -> Result<u32> {
        let pid =
            self.process.ready["pids"][role].as_u64().with_context(|| format!("no {role}: {}", self.process.ready))?;
        Ok(u32::try_from(pid)?)
    }

    /// `GET /tandem/status`.
    pub async fn status(&self) -> Result<Value> {
        status(&self.api).await
    }
}

/// `GET /tandem/status` of the node with this API.
pub async fn status(api: &str) -> Result<Value> {
    Ok(reqwest::get(format!("{}/tandem/status", root(api))).await?.error_for_status()?.json().await?)
}

/// Address of the node without `/v1`.
fn root(api: &str) -> &str {
    api.strip_suffix("/v1").unwrap_or(api)
}

/// A streamed answer as a client sees it.
#[derive(Clone, Debug, Default)]
pub struct Streamed {
    /// The answer.
    pub text: String,
    /// Index and id of each token, in order of arrival.
    pub tokens: Vec<(u64, u64)>,
    /// Why it ended.
    pub finish: Option<String>,
    /// The usage chunk.
    pub usage: Value,
}

impl Streamed {
    /// Fails unless the indices are 0..n once each and the stream ended as it should.
    pub fn check(&self) -> Result<()> {
        for (arrived, (index, _)) in self.tokens.iter().enumerate() {
            ensure!(arrived as u64 == *index, "token {index} arrived as number {arrived}");
        }
        ensure!(!self.tokens.is_empty(), "no tokens");
        ensure!(self.finish.is_some(), "no finish_reason");
        let counted = self.usage["completion_tokens"].as_u64();
        ensure!(counted == Some(self.tokens.len() as u64), "usage counts {counted:?}, {} arrived", self.tokens.len());
        Ok(())
    }

    /// True if the answer says that it did without the cloud for a part.
    #[must_use]
    pub fn degraded(&self) -> bool {
        self.usage["tandem"]["degraded"] == true
    }
}

/// Asks `question` in `mode` and reads the stream to its `[DONE]`; calls `on_token` with the index of
/// each token as it arrives.
pub async fn ask(
    api: &str,
    question: &str,
    mode: &str,
    on_token: impl AsyncFnMut(u64) -> Result<()>,
) -> Result<Streamed> {
    ask_for(api, question, mode, None, on_token).await
}

/// As [`ask`], for an answer of at most `tokens` tokens.
pub async fn ask_for(
    api: &str,
    question: &str,
    mode: &str,
    tokens: Option<usize>,
    mut on_token: impl AsyncFnMut(u64) -> Result<()>,
) -> Result<Streamed> {
    let body = json!({
        "max_completion_tokens": tokens,
        "model": "tandem",
        "messages": [{ "role": "user", "content": question }],
        "temperature": 0,
        "stream": true,
        "stream_options": { "include_usage": true },
        "tandem": { "mode": mode, "tokens": true },
    });
    let mut response = reqwest::Client::new().post(format!("{api}/chat/completions")).json(&body).send().await?;
    if !response.status().is_success() {
        bail!("status {}: {}", response.status(), response.text().await?);
    }
    let mut seen = Streamed::default();
    let mut rest = String::new();
    while let Some(piece) = tokio::time::timeout(WAIT_MAX, response.chunk()).await.context("the stream hangs")?? {
        rest.push_str(std::str::from_utf8(&piece).context("an event was cut inside a character")?);
        while let Some((event, after)) = rest.split_once("\n\n") {
            let data = event.strip_prefix("data: ").unwrap_or_default().to_owned();
            rest = after.to_owned();
            if data == "[DONE]" {
                return Ok(seen);
            }
            if data.is_empty() {
                continue;
            }
            let event: Value = serde_json::from_str(&data)?;
            ensure!(event.get("error").is_none(), "an error in the stream: {event}");
            let choice = &event["choices"][0];
            seen.text.push_str(choice["delta"]["content"].as_str().unwrap_or_default());
            if let Some(finish) = choice["finish_reason"].as_str() {
                seen.finish = Some(finish.to_owned());
            }
            if event["usage"].is_object() {
                seen.usage = event["usage"].clone();
            }
            for token in choice["tandem"]["tokens"].as_array().into_iter().flatten() {
                let index = token["index"].as_u64().context("a token without an index")?;
                seen.tokens.push((index, token["id"].as_u64().context("a token without an id")?));
                on_token(index).await?;
            }
        }
    }
    bail!("the stream ended without [DONE] after {} tokens", seen.tokens.len())
}
