//! A child process of `up`: started, heard out for its ready line, started again when it dies, and
//! ended with its parent.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::failure::{Code, Failure, OrFail as _};
use crate::ready::Ready;

/// Longest time from start to the ready line.
const READY_S_MAX: u64 = 60;
/// Longest ready line, bytes.
const READY_BYTES_MAX: u64 = 16 << 10;
/// First wait before a child is started again; doubles with every death in a row.
const BACKOFF_FIRST: Duration = Duration::from_secs(1);
/// Longest such wait.
const BACKOFF_MAX: Duration = Duration::from_secs(30);
/// A child that lived this long died for a reason of its own: the waits begin anew.
const SETTLED: Duration = Duration::from_secs(60);
/// Time that a child may take to end by itself.
const FAREWELL: Duration = Duration::from_secs(1);

/// How to start a child.
#[derive(Clone, Debug)]
pub(crate) struct ChildSpec {
    /// `router` or `cloud`; the subcommand.
    pub(crate) role: &'static str,
    /// Where it listens; a port of 0 is settled by its first start.
    pub(crate) listen: SocketAddr,
    /// Its other arguments.
    pub(crate) args: Vec<OsString>,
}

/// What happens to a child after its first start.
#[derive(Clone, Debug)]
pub(crate) enum Change {
    /// It died.
    Ended {
        /// How.
        how: String,
        /// When it is started again.
        again_in: Duration,
    },
    /// It serves again.
    Back,
}

/// A child under supervision.
#[derive(Debug)]
pub(crate) struct Supervised {
    /// What it said when it began to serve; none while it is away.
    pub(crate) state: watch::Receiver<Option<Ready>>,
    /// Ends once the child has, after the shutdown.
    pub(crate) task: JoinHandle<()>,
}

struct Running {
    child: Child,
    lifeline: ChildStdin,
    ready: Ready,
    since: Instant,
}

/// Starts a child, waits until it serves, and keeps it running until `shutdown`. Says what happens
/// to it through `changed`.
///
/// # Errors
/// The first start failed; in the child's own words, if it found some.
pub(crate) async fn supervise(
    mut spec: ChildSpec,
    changed: impl Fn(&'static str, Change) + Send + Sync + 'static,
    shutdown: CancellationToken,
) -> Result<Supervised, Failure> {
    let first = start(&spec).await?;
    // Those who know the address find the next one there.
    spec.listen = first.ready.listen.parse().or_fail(Code::Failed)?;
    let (tx, state) = watch::channel(Some(first.ready.clone()));
    let task = tokio::spawn(keep(spec, first, tx, changed, shutdown));
    Ok(Supervised { state, task })
}

async fn keep(
    spec: ChildSpec,
    first: Running,
    state: watch::Sender<Option<Ready>>,
    changed: impl Fn(&'static str, Change),
    shutdown: CancellationToken,
) {
    let mut running = first;
    let mut backoff = BACKOFF_FIRST;
    loop {
        let ended = tokio::select! {
            ended = running.child.wait() => ended,
            () = shutdown.cancelled() => return end(running).await,
        };
        state.send_replace(None);
        if running.since.elapsed() >= SETTLED {
            backoff = BACKOFF_FIRST;
        }
        let mut how = ended.map_or_else(|e| e.to_string(), describe);
        running = loop {
            changed(spec.role, Change::Ended { how, again_in: backoff });
            tokio::select! {
                () = tokio::time::sleep(backoff) => {}
                () = shutdown.cancelled() => return,
            }
            backoff = (backoff * 2).min(BACKOFF_MAX);
            tokio::select! {
                started = start(&spec) => match started {
                    Ok(running) => break running,
                    Err(failure) => how = failure.to_string(),
                },
                () = shutdown.cancelled() => return,
            }
        };
        state.send_replace(Some(running.ready.clone()));
        changed(spec.role, Change::Back);
    }
}

/// Lets a child end by itself: its standard input closes.
async fn end(running: Running) {
    let Running { mut child, lifeline, .. } = running;
    drop(lifeline);
    if tokio::time::timeout(FAREWELL, child.wait()).await.is_err() {
        let _ = child.kill().await;
    }
}

async fn start(spec: &ChildSpec) -> Result<Running, Failure> {
    let role = spec.role;
    let failed_as =
        |code, what: &dyn std::fmt::Display| Failure::new(code, format!("the {role} does not start: {what}"));
    let failed = |what: String| failed_as(Code::Failed, &what);
    let program = std::env::current_exe().map_err(|e| failed(e.to_string()))?;
    let mut child = Command::new(program)
        .arg(role)
        .args(["--listen", &spec.listen.to_string(), "--lifeline", "--json"])
        .args(&spec.args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| failed(e.to_string()))?;
    let (Some(lifeline), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
        return Err(failed("it has no pipes".into()));
    };
    let mut line = String::new();
    let mut output = BufReader::new(output.take(READY_BYTES_MAX));
    let heard = tokio::time::timeout(Duration::from_secs(READY_S_MAX), output.read_line(&mut line)).await;
    match heard {
        Err(_) => return Err(failed(format!("it did not serve within {READY_S_MAX} s"))),
        Ok(Err(e)) => return Err(failed(e.to_string())),
        Ok(Ok(0)) => {
            let status = child.wait().await.map_err(|e| failed(e.to_string()))?;
            return Err(failed(describe(status)));
        }
        Ok(Ok(_)) => {}
    }
    if let Some(failure) = Failure::from_json(&line) {
        return Err(failed_as(failure.code(), &failure));
    }
    let ready = serde_json::from_str(&line).map_err(|e| failed(format!("it said {line:?} ({e})")))?;
    // Nothing more is expected; what comes is dropped, so that the pipe never fills up.
    let mut rest = output.into_inner().into_inner();
    tokio::spawn(async move {
        let mut sink = [0; 1024];
        while matches!(rest.read(&mut sink).await, Ok(read) if read > 0) {}
    });
    Ok(Running { child, lifeline, ready, since: Instant::now() })
}

/// How a process ended, in words.
fn describe(status: ExitStatus) -> String {
    #[cfg(unix)]
    if let Some(signal) = std::os::unix::process::ExitStatusExt::signal(&status) {
        return format!("signal {signal}");
    }
    status.code().map_or_else(|| status.to_string(), |code| format!("exit code {code}"))
}
