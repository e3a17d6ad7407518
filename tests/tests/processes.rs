//! A fleet of separate processes, and what happens when one of them is killed.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use tandem_tests::process::{Process, ask, run, status, until};
use tandem_transport::{Faults, UdpProxy};
use tempfile::TempDir;

/// A question with a long answer in all modes: there is time to kill somebody.
const QUESTION: &str = "Calculate 936 + 181.";
/// Rate of the link while an answer runs, bytes per second: tokens then come one after the other.
const SLOW: u64 = 6_000;
/// A dead peer is noticed soon, so that a test over many tokens ends.
const IMPATIENT: [&str; 4] = ["--set", "link.idle_ms=800", "--set", "link.keep_alive_ms=200"];
const ANY: &str = "127.0.0.1:0";

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
#[tokio::test(flavor = "multi_thread")]
async fn a_cloud_killed_at_any_token_leaves_a_whole_stream() -> Result<()> {
    let fleet = Fleet::new()?;
    let nowhere: SocketAddr = "127.0.0.1:9".parse()?;
    let proxy = UdpProxy::start(ANY.parse()?, nowhere, Faults::default(), 1)?;
    let mut cloud = fleet.cloud_behind(&proxy).await?;
    let at = proxy.local_addr().to_string();
    let mut args = vec!["--listen", ANY, "--cloud", &at, "--set", "edge.reconnect_ms_max=100"];
    args.extend(IMPATIENT);
    let edge = fleet.part("edge", &args).await?;
    let api = edge.field("url")?;
    connected(&api, true).await?;
    let undisturbed = ask(&api, QUESTION, "cloud", async |_| Ok(())).await?;
    let mut degraded = 0;
    for k in 0..undisturbed.tokens.len() as u64 {
        // All modes that use the cloud take turns.
        let mode = ["cloud", "exact", "auto"][(k % 3) as usize];
        connected(&api, true).await?;
        slow(&proxy, Some(SLOW));
        let answer =
            ask(&api, QUESTION, mode, async |index| if index == k { cloud.kill().await } else { Ok(()) }).await;
        let answer =
            answer.with_context(|| format!("{mode}, killed at token {k}; the edge said: {}", edge.stderr()))?;
        answer.check().with_context(|| format!("{mode}, killed at token {k}"))?;
        degraded += u32::from(answer.degraded());
        slow(&proxy, None);
        // `auto` may end before it reaches token k.
        cloud.kill().await.ok();
        connected(&api, false).await?;
        cloud = fleet.cloud_behind(&proxy).await?;
    }
    // Ends that were on their way already are whole; most were not.
    println!("{degraded} of {} answers went on without the cloud", undisturbed.tokens.len());
    ensure!(degraded as usize >= undisturbed.tokens.len() / 4, "only {degraded} answers say that the cloud was away");
    Ok(())
}

/// SIGKILL and a fresh start: the session is resumed, and the text is that of an undisturbed answer.
#[tokio::test(flavor = "multi_thread")]
async fn a_cloud_that_restarts_in_time_changes_no_token() -> Result<()> {
    let fleet = Fleet::new()?;
    let proxy = UdpProxy::start(ANY.parse()?, "127.0.0.1:9".parse()?, Faults::default(), 2)?;
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
