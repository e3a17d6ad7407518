//! `tandem up` as a person runs it.

use std::net::{TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use tandem_tests::process::{
    Ended, Process, Up, WAIT_MAX, ask, cpu_time, find, finish, required, run, runs, signal, tandem, until,
};
use tokio::io::{AsyncBufReadExt as _, BufReader};

const QUESTION: &str = "What is the capital of Peru?";

/// From the first command to an answer, in every form that the README shows.
#[tokio::test(flavor = "multi_thread")]
async fn up_answers_and_ends_on_sigterm() -> Result<()> {
    let mut up = Up::start(&[]).await?;
    for mode in ["local", "auto", "exact", "cloud"] {
        let answer = ask(&up.api, QUESTION, mode, async |_| Ok(())).await.context(mode)?;
        answer.check().context(mode)?;
        ensure!(answer.text.contains("Lima"), "{mode}: {answer:?}");
        ensure!(!answer.degraded(), "{mode}: {answer:?}");
    }
    let page = reqwest::get(&up.page).await?.error_for_status()?.text().await?;
    ensure!(page.contains("<html"), "{page}");

    // The other commands find the node through the state folder.
    let state = up.state.path().to_str().context("state")?.to_owned();
    let chat = run(&["chat", QUESTION, "--mode", "auto", "--state", &state]).await?;
    ensure!(chat.code == Some(0) && chat.stdout.contains("Lima"), "{chat:?}");
    ensure!(chat.stdout.contains("tokens edge") && chat.stdout.contains("ttft"), "{chat:?}");
    let chat = run(&["chat", QUESTION, "--mode", "local", "--json", "--state", &state]).await?;
    let value: Value = serde_json::from_str(&chat.stdout)?;
    ensure!(value["usage"]["tandem"]["bytes_up"] == 0, "local sends nothing: {value}");
    let explained = run(&["explain", "last", "--state", &state]).await?;
    ensure!(explained.code == Some(0) && explained.stdout.contains("mode local"), "{explained:?}");
    ensure!(explained.stdout.contains("reason"), "{explained:?}");
    let doctor = run(&["doctor", "--state", &state]).await?;
    ensure!(doctor.code == Some(0), "{doctor:?}");
    let metrics = reqwest::get(format!("{}metrics", up.page)).await?.error_for_status()?.text().await?;
    ensure!(metrics.contains("tandem_edge_requests_total"), "{metrics}");

    // A second one on the same folder would share its files.
    let second = run(&["up", "--listen", "127.0.0.1:0", "--state", &state]).await?;
    ensure!(second.code == Some(5) && second.stderr.contains("--state"), "{second:?}");

    let children = [up.pid("router")?, up.pid("cloud")?];
    let status = up.process.signal("TERM").await?;
    ensure!(status.code() == Some(0), "{status}; {}", up.process.stderr());
    ensure!(!children.into_iter().any(runs), "children outlive `up`");
    let gone = run(&["chat", QUESTION, "--state", &state, "--url", &up.api]).await?;
    ensure!(gone.code == Some(6) && gone.stderr.contains("tandem up"), "{gone:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn up_ends_on_sigint() -> Result<()> {
    let mut up = Up::start(&["--no-cloud"]).await?;
    let answer = ask(&up.api, QUESTION, "auto", async |_| Ok(())).await?;
    answer.check()?;
    let status = up.process.signal("INT").await?;
    ensure!(status.code() == Some(0), "{status}; {}", up.process.stderr());
    Ok(())
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn no_child_outlives_an_up_that_is_killed() -> Result<()> {
    let mut up = Up::start(&[]).await?;
    let children = [up.pid("router")?, up.pid("cloud")?];
    ensure!(children.into_iter().all(runs), "the children run");
    up.process.kill().await?;
    until("the children to end", async || Ok(!children.into_iter().any(runs))).await
}

/// A stopped process, which goes on at the latest when the test ends.
#[cfg(target_os = "linux")]
struct Stopped(u32);

#[cfg(target_os = "linux")]
impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = std::process::Command::new("kill").args(["-CONT", &self.0.to_string()]).status();
    }
}

/// A cloud may load for as long as it likes: here it is stopped as soon as it is there.
#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn the_edge_answers_while_the_cloud_loads() -> Result<()> {
    let state = tempfile::tempdir()?;
    let folder = state.path().to_str().context("state")?;
    let any = "127.0.0.1:0";
    let args = ["up", "--listen", any, "--cloud-listen", any, "--router-listen", any, "--state", folder];
    let stop = async {
        let mut found = None;
        until("the cloud's process", async || {
            found = find("cloud", folder)?;
            Ok(found.is_some())
        })
        .await?;
        let pid = found.context("the cloud's process")?;
        signal(pid, "STOP").await?;
        anyhow::Ok(Stopped(pid))
    };
    let (up, cloud) = tokio::try_join!(Process::start(&args), stop)?;
    let api = up.field("api")?;
    let alone = ask(&api, QUESTION, "local", async |_| Ok(())).await?;
    alone.check()?;
    ensure!(alone.text.contains("Lima"), "{alone:?}");
    ensure!(up.ready["pids"]["cloud"] == cloud.0, "{}", up.ready);
    drop(cloud);
    until("an answer by the cloud", async || {
        let answer = ask(&api, QUESTION, "cloud", async |_| Ok(())).await?;
        answer.check()?;
        Ok(!answer.degraded())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_child_that_dies_is_reported_and_comes_back_while_the_edge_answers() -> Result<()> {
    let up = Up::start(&[]).await?;
    signal(up.pid("cloud")?, "KILL").await?;
    until("the loss to be seen", async || Ok(up.status().await?["cloud_connected"] == false)).await?;
    let alone = ask(&up.api, QUESTION, "auto", async |_| Ok(())).await?;
    alone.check()?;
    until("the cloud to come back", async || Ok(up.status().await?["cloud_connected"] == true)).await?;
    let again = ask(&up.api, QUESTION, "cloud", async |_| Ok(())).await?;
    again.check()?;
    ensure!(!again.degraded(), "{again:?}");
    until("`up` to say so", async || Ok(up.process.stderr().contains("is back"))).await?;
    let said = up.process.stderr();
    ensure!(said.contains("cloud") && said.contains("signal 9"), "{said}");

    // Neither does the router's death touch what is under way: the ticket is in the edge's hands.
    signal(up.pid("router")?, "KILL").await?;
    let without = ask(&up.api, QUESTION, "cloud", async |_| Ok(())).await?;
    without.check()?;
    ensure!(!without.degraded(), "{without:?}");
    until("the router to come back", async || Ok(up.process.stderr().matches("is back").count() >= 2)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_taken_port_is_one_line_that_says_what_to_do() -> Result<()> {
    let taken = TcpListener::bind("127.0.0.1:0")?;
    let address = taken.local_addr()?.to_string();
    let state = tempfile::tempdir()?;
    let state = state.path().to_str().context("state")?;
    let ended = run(&["up", "--listen", &address, "--state", state]).await?;
    ensure!(ended.code == Some(4), "{ended:?}");
    ensure!(ended.stderr.contains(&address) && ended.stderr.contains("--listen"), "{ended:?}");
    ensure!(ended.stderr.trim_end().lines().count() == 1, "{ended:?}");
    let ended = run(&["up", "--listen", "127.0.0.1:0", "--router-listen", &address, "--state", state]).await?;
    ensure!(ended.code == Some(4) && ended.stderr.contains("--router-listen"), "{ended:?}");
    ensure!(ended.stderr.trim_end().lines().count() == 1, "{ended:?}");
    let taken = UdpSocket::bind("127.0.0.1:0")?;
    let address = taken.local_addr()?.to_string();
    let ended = run(&["up", "--listen", "127.0.0.1:0", "--cloud-listen", &address, "--state", state]).await?;
    ensure!(ended.code == Some(4) && ended.stderr.contains("the cloud does not start"), "{ended:?}");
    ensure!(ended.stderr.contains(&address), "{ended:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unusable_state_folder_is_one_line_that_says_what_to_do() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("file");
    std::fs::write(&file, "")?;
    // A path through a file cannot be written, not even by root.
    let state = file.join("state");
    let ended = run(&["up", "--listen", "127.0.0.1:0", "--state", state.to_str().context("state")?]).await?;
    ensure!(ended.code == Some(5) && ended.stderr.contains("--state"), "{ended:?}");
    ensure!(ended.stderr.trim_end().lines().count() == 1, "{ended:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_address_needs_a_key() -> Result<()> {
    let state = tempfile::tempdir()?;
    let state = state.path().to_str().context("state")?;
    let ended = run(&["up", "--listen", "0.0.0.0:0", "--state", state]).await?;
    ensure!(ended.code == Some(4) && ended.stderr.contains("--insecure"), "{ended:?}");
    Ok(())
}

/// An idle fleet costs nothing worth speaking of. CPU time, not wall time: a busy machine does not
/// change it.
#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn idle_processes_take_less_than_a_hundredth_of_a_core() -> Result<()> {
    const WATCHED: Duration = Duration::from_secs(5);
    let up = Up::start(&[]).await?;
    ask(&up.api, QUESTION, "auto", async |_| Ok(())).await?.check()?;
    let pids = [up.pid("edge")?, up.pid("router")?, up.pid("cloud")?];
    let spent = || -> Result<Duration> { pids.into_iter().map(cpu_time).sum::<Result<Duration>>() };
    let mut shares = Vec::new();
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let before = spent()?;
        tokio::time::sleep(WATCHED).await;
        let share = (spent()? - before).as_secs_f64() / WATCHED.as_secs_f64();
        println!("idle: {:.2} % of a core", share * 100.0);
        shares.push(share);
        if share < 0.01 {
            return Ok(());
        }
    }
    bail!("idle processes take these shares of a core: {shares:?}")
}

/// Unchanged clients, each in its default form: plain, streamed, with a tool, with a schema. They must be
/// there in CI.
#[tokio::test(flavor = "multi_thread")]
async fn real_clients() -> Result<()> {
    const PYTHON: [&str; 4] =
        ["openai_client.py", "responses_client.py", "frameworks_client.py", "described_client.py"];
    const NODE: [&str; 2] = ["openai_client.mjs", "responses_client.mjs"];
    let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients");
    let python = python(&scripts).await;
    let node = works("node", &["--input-type=module", "-e", "import 'openai'"], &scripts).await;
    for (clients, there) in [(PYTHON.as_slice(), python.is_some()), (NODE.as_slice(), node)] {
        let what = format!("{clients:?} have nothing to run them; tests/clients/README.md says how to install them");
        ensure!(there || !required("TANDEM_REQUIRE_CLIENTS"), "{what}");
        if !there {
            println!("SKIPPED: {what}");
        }
    }
    let up = Up::start(&[]).await?;
    let python = python.iter().flat_map(|python| PYTHON.map(|script| (python.clone(), script)));
    let node = NODE.into_iter().filter(|_| node).map(|script| (PathBuf::from("node"), script));
    for (program, script) in python.chain(node) {
        let mut command = tokio::process::Command::new(&program);
        let Ended { code, stdout, stderr } = finish(command.arg(scripts.join(script)).arg(&up.api)).await?;
        let said = stdout + &stderr;
        ensure!(code == Some(0), "{script}: {code:?}\n{said}");
        println!("{script}: {}", said.lines().last().unwrap_or_default());
    }
    Ok(())
}

/// A Python that has the clients: the one of tests/clients/README.md, or the system's.
async fn python(scripts: &Path) -> Option<PathBuf> {
    const HAS_ALL: &str = "import importlib.util, sys
names = ['openai', 'agents', 'anthropic', 'autogen_ext', 'haystack', 'huggingface_hub', 'strands', 'schemathesis']
sys.exit(not all(importlib.util.find_spec(name) for name in names))";
    let own = scripts.join("../../target/clients/bin/python");
    for python in [own, PathBuf::from("python3")] {
        if works(&python, &["-c", HAS_ALL], scripts).await {
            return Some(python);
        }
    }
    None
}

async fn works(program: impl AsRef<std::ffi::OsStr>, args: &[&str], folder: &Path) -> bool {
    let run = tokio::process::Command::new(program).args(args).current_dir(folder).output().await;
    run.is_ok_and(|output| output.status.success())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_question_can_be_piped_in() -> Result<()> {
    use tokio::io::AsyncWriteExt as _;
    let up = Up::start(&["--no-cloud"]).await?;
    let mut chat = tandem(&["chat", "--url", &up.api])?.stdin(std::process::Stdio::piped()).spawn()?;
    let mut input = chat.stdin.take().context("stdin")?;
    input.write_all(format!("{QUESTION}\n").as_bytes()).await?;
    drop(input);
    let output = tokio::time::timeout(WAIT_MAX, chat.wait_with_output()).await.context("the chat does not end")??;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success() && said.contains("Lima"), "{said} {}", String::from_utf8_lossy(&output.stderr));

    // `tandem chat … | head` ends without a word.
    let mut chat = tandem(&["chat", QUESTION, "--url", &up.api])?.spawn()?;
    drop(chat.stdout.take());
    let output = tokio::time::timeout(WAIT_MAX, chat.wait_with_output()).await.context("the chat does not end")??;
    ensure!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Whatever port, state folder and key: the printed command asks this node, in any shell of this machine.
#[tokio::test(flavor = "multi_thread")]
async fn the_hint_works_as_printed() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let state = folder.path().join("it's a state");
    let args = ["up", "--no-cloud", "--listen", "127.0.0.1:0", "--api-key", "secret", "--state"];
    let mut command = tandem(&args)?;
    let mut up = command.arg(&state).stderr(std::process::Stdio::null()).spawn()?;
    let mut lines = BufReader::new(up.stdout.take().context("standard output")?).lines();
    let hint = loop {
        let line = tokio::time::timeout(WAIT_MAX, lines.next_line()).await??.context("the end, and no hint")?;
        if let Some(hint) = line.strip_prefix(" Ask it:  ") {
            break hint.split("     Ctrl-C").next().unwrap_or_default().to_owned();
        }
    };
    let mut shell = tokio::process::Command::new("sh");
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("TANDEM_")) {
        shell.env_remove(name);
    }
    let asked = finish(shell.args(["-c", &hint]).current_dir("/").stdin(std::process::Stdio::null())).await?;
    ensure!(asked.code == Some(0) && asked.stdout.contains("Lima"), "{hint}: {asked:?}");
    up.kill().await?;
    Ok(())
}
