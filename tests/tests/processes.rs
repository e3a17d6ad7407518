//! A fleet of separate processes, and what happens when one of them is killed.

use anyhow::{Context as _, Result, ensure};
use tandem_tests::freeze::freeze;
use tandem_tests::process::{Process, ask, run, status, until};
use tandem_transport::{Faults, UdpProxy};
use tempfile::TempDir;

/// A question with a long answer in all modes: there is time to kill a process.
const QUESTION: &str = "Calculate 936 + 181.";
/// Rate of the link while an answer runs, bytes per second: tokens then come one after the other.
const SLOW: u64 = 6_000;
/// A dead peer is noticed soon, so that a test over many tokens ends.
const IMPATIENT: [&str; 4] = ["--set", "link.idle_ms=600", "--set", "link.keep_alive_ms=150"];
const ANY: &str = "127.0.0.1:0";
/// The discard port: no process listens there.
const NOWHERE: &str = "127.0.0.1:9";

/// A state folder that all processes of a fleet share, with its CA.
struct Fleet {
    folder: TempDir,
}

impl Fleet {
    fn new() -> Result<Self> {
        Ok(Self { folder: tempfile::tempdir()? })
    }

    async fn part(&self, role: &str, extra: &[&str]) -> Result<Process> {
        let folder = self.folder.path().to_str().context("folder")?;
        let args: Vec<&str> = [role, "--state", folder].into_iter().chain(extra.iter().copied()).collect();
        Process::start(&args).await.with_context(|| format!("{args:?}"))
    }

    /// A cloud node that is reached through `proxy`.
    async fn cloud_behind(&self, proxy: &UdpProxy) -> Result<Process> {
        let cloud = self.part("cloud", &["--listen", ANY]).await?;
        proxy.handle().set_target(cloud.field("listen")?.parse()?);
        Ok(cloud)
    }
}

async fn connected(api: &str, wanted: bool) -> Result<()> {
    let what = if wanted { "the edge to reach a cloud" } else { "the edge to miss its cloud" };
    until(what, async || Ok(status(api).await?["cloud_connected"] == wanted)).await
}

fn slow(proxy: &UdpProxy, bytes_per_s: Option<u64>) {
    proxy.handle().update(|faults| faults.bytes_per_s = bytes_per_s);
}

#[tokio::test(flavor = "multi_thread")]
async fn edge_router_and_clouds_as_separate_processes() -> Result<()> {
    let fleet = Fleet::new()?;
    let mut router = fleet.part("router", &["--listen", ANY, "--metrics", ANY]).await?;
    let at = router.field("listen")?;
    let mut first =
        fleet.part("cloud", &["--listen", ANY, "--router", &at, "--name", "cloud-a", "--metrics", ANY]).await?;
    let mut edge_args = vec!["--listen", ANY, "--router", &at, "--api-key", "secret"];
    edge_args.extend(IMPATIENT);
    let keyed = fleet.part("edge", &edge_args).await?;
    ensure!(run(&["chat", "hello", "--url", &keyed.field("url")?]).await?.code == Some(7), "the key is asked for");
    let with_key = run(&["chat", QUESTION, "--url", &keyed.field("url")?, "--api-key", "secret"]).await?;
    ensure!(with_key.code == Some(0), "{with_key:?}");
    let folder = fleet.folder.path().to_str().context("folder")?;
    let url = keyed.field("url")?;
    let elsewhere = tempfile::tempdir()?;
    let elsewhere = elsewhere.path().to_str().context("folder")?;
    let doctor = run(&["doctor", "--state", elsewhere, "--url", &url]).await?;
    ensure!(doctor.stdout.contains("but refuses; set TANDEM_API_KEY"), "{doctor:?}");
    let doctor = run(&["doctor", "--state", elsewhere, "--url", &url, "--api-key", "secret"]).await?;
    ensure!(doctor.stdout.contains("one is running"), "{doctor:?}");
    // Whoever may read its state folder finds the node and its key there.
    let doctor = run(&["doctor", "--state", folder]).await?;
    ensure!(doctor.stdout.contains("one is running"), "{doctor:?}");
    drop(keyed);

    edge_args.truncate(4);
    edge_args.extend(IMPATIENT);
    let mut edge = fleet.part("edge", &edge_args).await?;
    let api = edge.field("url")?;
    connected(&api, true).await?;
    let exact = ask(&api, QUESTION, "exact", async |_| Ok(())).await?;
    exact.check()?;
    ensure!(!exact.degraded(), "{exact:?}");
    for part in [&router, &first] {
        let metrics = reqwest::get(part.field("metrics")?).await?.error_for_status()?.text().await?;
        ensure!(metrics.contains("tandem_"), "{metrics}");
    }

    // A second node takes over when the first one leaves; the router may be away by then and back.
    let mut second = fleet.part("cloud", &["--listen", ANY, "--router", &at, "--name", "cloud-b"]).await?;
    first.signal("TERM").await?;
    let moved = async || {
        let answer = ask(&api, QUESTION, "cloud", async |_| Ok(())).await?;
        answer.check()?;
        Ok(!answer.degraded() && answer.text == exact.text)
    };
    until("the second cloud node to answer", moved).await?;
    router.kill().await?;
    let alone = ask(&api, QUESTION, "exact", async |_| Ok(())).await?;
    ensure!(!alone.degraded() && alone.text == exact.text, "without the router: {alone:?}");
    for part in [&mut edge, &mut second] {
        let status = part.signal("TERM").await?;
        ensure!(status.code() == Some(0), "{status}: {}", part.stderr());
    }
    Ok(())
}

/// SIGKILL at every token index of a stream; the node stays away: the edge ends the answer alone.
/// The modes that use the cloud share the indices, each with a fleet of its own.
#[tokio::test(flavor = "multi_thread")]
async fn a_cloud_killed_at_any_token_leaves_a_whole_stream() -> Result<()> {
    let (cloud, exact, auto) = tokio::try_join!(killed("cloud", 0), killed("exact", 1), killed("auto", 2))?;
    println!("went on without the cloud, of answers: cloud {cloud:?}, exact {exact:?}, auto {auto:?}");
    // Ends that were on their way already are whole, and `auto` asks the cloud for few tokens; but
    // these two need it to the end.
    for (degraded, answers) in [cloud, exact] {
        ensure!(degraded >= answers / 3, "only {degraded} of {answers} answers say that the cloud was away");
    }
    Ok(())
}

/// Kills the cloud at token `first`, and at every third one after it, of answers in `mode`. Returns
/// how many answers said that they did without it, and how many there were.
async fn killed(mode: &str, first: u64) -> Result<(usize, usize)> {
    let fleet = Fleet::new()?;
    let proxy = UdpProxy::start(ANY.parse()?, NOWHERE.parse()?, Faults::default(), first)?;
    let mut cloud = fleet.cloud_behind(&proxy).await?;
    let at = proxy.local_addr().to_string();
    let mut args = vec!["--listen", ANY, "--cloud", &at, "--set", "edge.reconnect_ms_max=100"];
    args.extend(IMPATIENT);
    let edge = fleet.part("edge", &args).await?;
    let api = edge.field("url")?;
    connected(&api, true).await?;
    let tokens = ask(&api, QUESTION, "cloud", async |_| Ok(())).await?.tokens.len() as u64;
    let (mut degraded, mut answers) = (0, 0);
    for k in (first..tokens).step_by(3) {
        connected(&api, true).await?;
        slow(&proxy, Some(SLOW));
        let answer =
            ask(&api, QUESTION, mode, async |index| if index == k { cloud.kill().await } else { Ok(()) }).await;
        let answer =
            answer.with_context(|| format!("{mode}, killed at token {k}; the edge said: {}", edge.stderr()))?;
        answer.check().with_context(|| format!("{mode}, killed at token {k}"))?;
        answers += 1;
        degraded += usize::from(answer.degraded());
        slow(&proxy, None);
        // The answer may have ended before token k.
        cloud.kill().await.ok();
        connected(&api, false).await?;
        cloud = fleet.cloud_behind(&proxy).await?;
    }
    Ok((degraded, answers))
}

/// SIGKILL and a fresh start: the session is resumed, and the text is that of an undisturbed answer.
#[tokio::test(flavor = "multi_thread")]
async fn a_cloud_that_restarts_in_time_changes_no_token() -> Result<()> {
    let fleet = Fleet::new()?;
    let proxy = UdpProxy::start(ANY.parse()?, NOWHERE.parse()?, Faults::default(), 2)?;
    let mut cloud = fleet.cloud_behind(&proxy).await?;
    let at = proxy.local_addr().to_string();
    let mut args = vec!["--listen", ANY, "--cloud", &at, "--set", "edge.reconnect_ms_max=60000"];
    args.extend(IMPATIENT);
    let edge = fleet.part("edge", &args).await?;
    let api = edge.field("url")?;
    connected(&api, true).await?;
    let undisturbed = ask(&api, QUESTION, "cloud", async |_| Ok(())).await?;
    undisturbed.check()?;
    for (mode, k) in [("cloud", 0), ("cloud", 7), ("exact", 3), ("exact", 11)] {
        connected(&api, true).await?;
        slow(&proxy, Some(SLOW));
        let answer = ask(&api, QUESTION, mode, async |index| {
            if index == k {
                cloud.kill().await?;
                slow(&proxy, None);
                cloud = fleet.cloud_behind(&proxy).await?;
            }
            Ok(())
        });
        let answer = answer.await.with_context(|| format!("{mode}, restarted at token {k}"))?;
        answer.check()?;
        ensure!(answer.tokens == undisturbed.tokens, "{mode}, restarted at token {k}: {answer:?}");
        ensure!(!answer.degraded(), "{mode}, restarted at token {k}: {answer:?}");
    }
    Ok(())
}

/// The engine of the node stands still, its network side lives: another node takes over, in all modes, and
/// nothing is lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_whose_engine_hangs_is_left_for_another_one() -> Result<()> {
    let fleet = Fleet::new()?;
    let router = fleet.part("router", &["--listen", ANY]).await?;
    let at = router.field("listen")?;
    let first = fleet.part("cloud", &["--listen", ANY, "--router", &at, "--name", "cloud-a"]).await?;
    // The edge has time to reach the other node on a busy machine; the default is two seconds.
    let patient = ["--set", "edge.reconnect_ms_max=60000"];
    let edge_args: Vec<&str> = ["--listen", ANY, "--router", &at].into_iter().chain(patient).collect();
    let edge = fleet.part("edge", &edge_args).await?;
    let api = edge.field("url")?;
    connected(&api, true).await?;
    let exact = ask(&api, QUESTION, "exact", async |_| Ok(())).await?;
    exact.check()?;
    let _second = fleet.part("cloud", &["--listen", ANY, "--router", &at, "--name", "cloud-b"]).await?;
    let _frozen = freeze(first.pid()?, "engine")?;
    for mode in ["exact", "cloud", "auto"] {
        let answer = ask(&api, QUESTION, mode, async |_| Ok(())).await?;
        answer.check()?;
        ensure!(!answer.degraded(), "{mode}: {answer:?}; the edge said: {}", edge.stderr());
        ensure!(mode == "auto" || answer.text == exact.text, "{mode}: {answer:?}");
    }
    Ok(())
}

/// SIGTERM in the middle of an answer that takes far longer than the node waits: the stream says why it ends.
#[tokio::test(flavor = "multi_thread")]
async fn an_edge_that_is_stopped_ends_its_streams() -> Result<()> {
    let fleet = Fleet::new()?;
    let proxy = UdpProxy::start(ANY.parse()?, NOWHERE.parse()?, Faults::default(), 3)?;
    let _cloud = fleet.cloud_behind(&proxy).await?;
    let at = proxy.local_addr().to_string();
    let mut edge = fleet.part("edge", &["--listen", ANY, "--cloud", &at]).await?;
    let api = edge.field("url")?;
    connected(&api, true).await?;
    slow(&proxy, Some(SLOW / 6));
    let body = serde_json::json!({
        "model": "tandem:cloud", "stream": true, "messages": [{ "role": "user", "content": QUESTION }],
    });
    let mut response = reqwest::Client::new().post(format!("{api}/chat/completions")).json(&body).send().await?;
    let mut text = String::new();
    let stopping = loop {
        let piece = response.chunk().await?.context("the stream ended before it was stopped")?;
        text.push_str(std::str::from_utf8(&piece)?);
        if text.contains("\"content\":\"") {
            break edge.signal("TERM");
        }
    };
    let reading = async {
        while let Some(piece) = response.chunk().await? {
            text.push_str(std::str::from_utf8(&piece)?);
        }
        anyhow::Ok(text)
    };
    let (status, text) = tokio::join!(stopping, reading);
    ensure!(status?.code() == Some(0));
    let text = text.context("the stream was cut")?;
    ensure!(text.ends_with("data: [DONE]\n\n"), "{text}");
    ensure!(text.contains("\"finish_reason\":\"") || text.contains("shutting down"), "{text}");
    Ok(())
}
