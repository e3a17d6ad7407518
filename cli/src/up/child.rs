//! A child process of `up`: started, its ready line read, started again when it dies, and
//! ended with its parent.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::failure::{Code, Failure};
use crate::ready::Ready;

/// How often it is said that a child is not ready yet.
const LOADING_EVERY: Duration = Duration::from_secs(10);
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
    /// What to run: this program.
    pub(crate) program: PathBuf,
    /// `router` or `cloud`; the subcommand.
    pub(crate) role: &'static str,
    /// Where it listens; a port of 0 is settled by its first start.
    pub(crate) listen: SocketAddr,
    /// Its other arguments.
    pub(crate) args: Vec<OsString>,
}

/// Where a child is.
#[derive(Clone, Debug)]
pub(crate) enum State {
    /// It runs and does not serve yet.
    Begun {
        /// Process id; none before the system has started it.
        pid: Option<u32>,
    },
    /// It serves.
    Serving(Ready),
    /// It died, or could not be started, and is started again after a while.
    Away(Failure),
}

/// What happens to a child.
#[derive(Clone, Debug)]
pub(crate) enum Change {
    /// It runs, and has not been ready for this long.
    Loading(Duration),
    /// It serves.
    Serves {
        /// Its address.
        url: String,
        /// True if it was away before.
        again: bool,
    },
    /// It died, or could not be started.
    Ended {
        /// How.
        how: String,
        /// When it is started again.
        again_in: Duration,
    },
}

/// A child under supervision.
#[derive(Debug)]
pub(crate) struct Supervised {
    /// Where it is.
    pub(crate) state: watch::Receiver<State>,
    /// Ends once the child has, after the shutdown.
    pub(crate) task: JoinHandle<()>,
}

impl Supervised {
    /// Waits until it serves.
    ///
    /// # Errors
    /// Its start failed; in the child's own words, if it found some.
    pub(crate) async fn serving(&self) -> Result<Ready, Failure> {
        let mut state = self.state.clone();
        let settled = state.wait_for(|state| !matches!(state, State::Begun { .. })).await;
        match settled.as_deref() {
            Ok(State::Serving(ready)) => Ok(ready.clone()),
            Ok(State::Away(failure)) => Err(failure.clone()),
            _ => Err(Failure::new(Code::Failed, "a child was ended before it served")),
        }
    }

    /// Waits until it cannot be started, or dies.
    pub(crate) async fn failure(&self) -> Failure {
        let mut state = self.state.clone();
        if let Ok(State::Away(failure)) = state.wait_for(|state| matches!(state, State::Away(_))).await.as_deref() {
            return failure.clone();
        }
        // Nobody watches it any more: it ends with everything else.
        std::future::pending().await
    }
}

struct Running {
    child: Child,
    lifeline: ChildStdin,
    ready: Ready,
    listen: SocketAddr,
}

/// Starts a child and keeps it running until `shutdown`. Says what happens to it through `changed`.
pub(crate) fn supervise(
    spec: ChildSpec,
    changed: impl Fn(&'static str, Change) + Send + Sync + 'static,
    shutdown: CancellationToken,
) -> Supervised {
    let (tx, state) = watch::channel(State::Begun { pid: None });
    let task = tokio::spawn(keep(spec, tx, changed, shutdown));
    Supervised { state, task }
}

async fn keep(
    mut spec: ChildSpec,
    state: watch::Sender<State>,
    changed: impl Fn(&'static str, Change) + Send + Sync,
    shutdown: CancellationToken,
) {
    let mut backoff = BACKOFF_FIRST;
    let mut again = false;
    loop {
        let started = tokio::select! {
            started = start(&spec, &state, &changed) => started,
            // A child that is not ready dies with its handle.
            () = shutdown.cancelled() => return,
        };
        let (how, failure) = match started {
            Ok(mut running) => {
                // Those who know the address find the next one there.
                spec.listen = running.listen;
                let since = Instant::now();
                state.send_replace(State::Serving(running.ready.clone()));
                changed(spec.role, Change::Serves { url: running.ready.url.clone(), again });
                let ended = tokio::select! {
                    ended = running.child.wait() => ended,
                    () = shutdown.cancelled() => return end(running).await,
                };
                if since.elapsed() >= SETTLED {
                    backoff = BACKOFF_FIRST;
                }
                let how = ended.map_or_else(|e| e.to_string(), describe);
                let failure = Failure::new(Code::Failed, format!("the {} ended ({how})", spec.role));
                (how, failure)
            }
            Err(failure) => (failure.to_string(), failure),
        };
        again = true;
        state.send_replace(State::Away(failure));
        changed(spec.role, Change::Ended { how, again_in: backoff });
        tokio::select! {
            () = tokio::time::sleep(backoff) => {}
            () = shutdown.cancelled() => return,
        }
        backoff = (backoff * 2).min(BACKOFF_MAX);
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

/// Starts the child and waits until it serves, for as long as it lives: a large model takes its time.
async fn start(
    spec: &ChildSpec,
    state: &watch::Sender<State>,
    changed: &(impl Fn(&'static str, Change) + Send + Sync),
) -> Result<Running, Failure> {
    let role = spec.role;
    let failed_as =
        |code, what: &dyn std::fmt::Display| Failure::new(code, format!("the {role} does not start: {what}"));
    let failed = |what: String| failed_as(Code::Failed, &what);
    let mut child = Command::new(&spec.program)
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
    state.send_replace(State::Begun { pid: child.id() });
    let mut line = String::new();
    let mut output = BufReader::new(output.take(READY_BYTES_MAX));
    let begun = Instant::now();
    let heard = {
        let mut reading = std::pin::pin!(output.read_line(&mut line));
        loop {
            match tokio::time::timeout(LOADING_EVERY, &mut reading).await {
                Ok(heard) => break heard,
                Err(_) => changed(role, Change::Loading(begun.elapsed())),
            }
        }
    };
    if heard.map_err(|e| failed(e.to_string()))? == 0 {
        let status = child.wait().await.map_err(|e| failed(e.to_string()))?;
        return Err(failed(describe(status)));
    }
    if let Some(failure) = Failure::from_json(&line) {
        return Err(failed_as(failure.code(), &failure));
    }
    let ready: Ready = serde_json::from_str(&line).map_err(|e| failed(format!("it said {line:?} ({e})")))?;
    let listen = ready.listen.parse().map_err(|e| failed(format!("it said {line:?} ({e})")))?;
    // Nothing more is expected; what comes is dropped, so that the pipe never fills up.
    let mut rest = output.into_inner().into_inner();
    tokio::spawn(async move {
        let mut sink = [0; 1024];
        while matches!(rest.read(&mut sink).await, Ok(read) if read > 0) {}
    });
    Ok(Running { child, lifeline, ready, listen })
}

/// How a process ended, in words.
fn describe(status: ExitStatus) -> String {
    #[cfg(unix)]
    if let Some(signal) = std::os::unix::process::ExitStatusExt::signal(&status) {
        return format!("signal {signal}");
    }
    status.code().map_or_else(|| status.to_string(), |code| format!("exit code {code}"))
}

#[cfg(all(test, unix))]
mod tests {
    use std::path::Path;
    use std::sync::{Arc, Mutex, PoisonError};

    use super::*;

    /// What happened, as `changed` heard it.
    #[derive(Clone, Default)]
    struct Heard(Arc<Mutex<Vec<Change>>>);

    impl Heard {
        fn all(&self) -> Vec<Change> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
        }

        fn count(&self, which: impl Fn(&Change) -> bool) -> usize {
            self.all().iter().filter(|change| which(change)).count()
        }
    }

    /// A child that is a shell script with this body, in a folder of its own.
    fn child(dir: &Path, body: &str, heard: &Heard, shutdown: &CancellationToken) -> Supervised {
        use std::os::unix::fs::PermissionsExt as _;
        let program = dir.join("child");
        let ready =
            r#"{"ready":true,"role":"cloud","node":"c","listen":"127.0.0.1:7","url":"quic://127.0.0.1:7","pid":1}"#;
        let script = format!("#!/bin/sh\ncd {}\nready() {{ echo '{ready}'; }}\n{body}\n", dir.display());
        std::fs::write(&program, script).expect("written");
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).expect("executable");
        let spec = ChildSpec { program, role: "cloud", listen: ([127, 0, 0, 1], 0).into(), args: Vec::new() };
        let heard = heard.clone();
        let note = move |_, change| heard.0.lock().unwrap_or_else(PoisonError::into_inner).push(change);
        supervise(spec, note, shutdown.clone())
    }

    /// The clock stands still but for timers, so these minutes take none.
    #[tokio::test(start_paused = true)]
    async fn a_child_may_load_for_minutes() {
        let dir = tempfile::tempdir().expect("a folder");
        let (heard, shutdown) = (Heard::default(), CancellationToken::new());
        let body = "while [ ! -e go ]; do sleep 0.01; done; ready; cat > /dev/null";
        let cloud = child(dir.path(), body, &heard, &shutdown);
        while heard.count(|change| matches!(change, Change::Loading(_))) < 30 {
            assert!(matches!(*cloud.state.borrow(), State::Begun { .. }), "{:?}", heard.all());
            tokio::time::sleep(LOADING_EVERY).await;
        }
        std::fs::write(dir.path().join("go"), "").expect("written");
        let ready = cloud.serving().await.expect("it serves");
        assert_eq!(ready.listen, "127.0.0.1:7");
        assert!(heard.count(|change| matches!(change, Change::Ended { .. })) == 0, "{:?}", heard.all());
        shutdown.cancel();
        cloud.task.await.expect("it ends");
    }

    #[tokio::test(start_paused = true)]
    async fn a_child_that_dies_is_away_and_comes_back() {
        let dir = tempfile::tempdir().expect("a folder");
        let (heard, shutdown) = (Heard::default(), CancellationToken::new());
        // Dies before it serves, then after, then stays.
        let body = "echo >> starts; case $(grep -c '' starts) in \
            1) exit 3 ;; \
            2) ready; exit 4 ;; \
            *) ready; cat > /dev/null ;; \
            esac";
        let cloud = child(dir.path(), body, &heard, &shutdown);
        let failure = cloud.serving().await.expect_err("the first start");
        assert!(failure.to_string().contains("does not start: exit code 3"), "{failure}");
        while heard.count(|change| matches!(change, Change::Serves { .. })) < 2 {
            tokio::time::sleep(BACKOFF_FIRST).await;
        }
        let ended: Vec<String> = heard
            .all()
            .into_iter()
            .filter_map(|change| if let Change::Ended { how, .. } = change { Some(how) } else { None })
            .collect();
        assert_eq!(ended, ["the cloud does not start: exit code 3", "exit code 4"]);
        assert!(heard.count(|change| matches!(change, Change::Serves { again: false, .. })) == 0);
        assert!(matches!(*cloud.state.borrow(), State::Serving(_)));
        shutdown.cancel();
        cloud.task.await.expect("it ends");
    }

    #[tokio::test(start_paused = true)]
    async fn a_child_says_itself_why_it_cannot_start() {
        let dir = tempfile::tempdir().expect("a folder");
        let (heard, shutdown) = (Heard::default(), CancellationToken::new());
        let said = Failure::new(Code::Listen, "the port is taken").to_json();
        let cloud = child(dir.path(), &format!("echo '{said}'; exit 4"), &heard, &shutdown);
        let failure = cloud.serving().await.expect_err("it cannot");
        assert_eq!((failure.code(), failure.to_string().contains("the port is taken")), (Code::Listen, true));
        shutdown.cancel();
        cloud.task.await.expect("it ends");
    }
}
