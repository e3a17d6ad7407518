//! At the default settings a live second cloud node takes over, whatever becomes of the first one, and the answer is
//! the same.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use tandem_tests::process::{Process, ask, status, until};
use tempfile::TempDir;

const QUESTION: &str = "Calculate 936 + 181.";
const ANY: &str = "127.0.0.1:0";

/// Two cloud nodes, a router and an edge, none of which is told anything but whom to talk to.
struct Fleet {
    folder: TempDir,
    router: Process,
    clouds: BTreeMap<String, Process>,
    edge: Process,
}

async fn part(folder: &TempDir, role: &str, extra: &[&str]) -> Result<Process> {
    let folder = folder.path().to_str().context("folder")?;
    let args: Vec<&str> = [role, "--state", folder].into_iter().chain(extra.iter().copied()).collect();
    Process::start(&args).await.with_context(|| format!("{args:?}"))
}

impl Fleet {
    async fn new() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let router = part(&folder, "router", &["--listen", ANY]).await?;
        let at = router.field("listen")?;
        let mut clouds = BTreeMap::new();
        for name in ["cloud-a", "cloud-b"] {
            let cloud = part(&folder, "cloud", &["--listen", ANY, "--router", &at, "--name", name]).await?;
            clouds.insert(name.to_owned(), cloud);
        }
        let edge = part(&folder, "edge", &["--listen", ANY, "--router", &at, "--set", "edge.threshold=0"]).await?;
        let fleet = Self { folder, router, clouds, edge };
        fleet.connected().await?;
        Ok(fleet)
    }

    async fn connected(&self) -> Result<()> {
        let api = self.edge.field("url")?;
        until("the edge to reach a cloud", async || Ok(status(&api).await?["cloud_connected"] == true)).await
    }

    /// The node that the edge is connected to: the one that has noted a link last.
    async fn current(&self) -> Result<String> {
        self.connected().await?;
        let mut latest = None;
        for (name, cloud) in &self.clouds {
            // Lines begin with the time.
            if let Some(line) = cloud.stderr().lines().rfind(|line| line.contains("link opened")) {
                latest = latest.max(Some((line.to_owned(), name.clone())));
            }
        }
        Ok(latest.context("a node that has noted a link")?.1)
    }

    /// Ends `node` and starts another process of the name at the same address.
    async fn restart(&mut self, node: &str, signal: &str) -> Result<()> {
        let cloud = self.clouds.get_mut(node).context("a node")?;
        let (listen, at) = (cloud.field("listen")?, self.router.field("listen")?);
        // It may have been killed already.
        let _ = cloud.signal(signal).await;
        let again = part(&self.folder, "cloud", &["--listen", &listen, "--router", &at, "--name", node]).await?;
        self.clouds.insert(node.to_owned(), again);
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_node_takes_over_at_the_default_settings() -> Result<()> {
    let mut fleet = Fleet::new().await?;
    let api = fleet.edge.field("url")?;
    let undisturbed = ask(&api, QUESTION, "cloud", async |_| Ok(())).await?;
    undisturbed.check()?;
    // `auto` asks about each token here, so its text is the cloud's, too.
    let table = [
        ("exact", "KILL"),
        ("cloud", "TERM"),
        ("auto", "KILL"),
        ("cloud", "KILL"),
        ("exact", "TERM"),
        ("auto", "TERM"),
    ];
    for (mode, how) in table {
        let node = fleet.current().await?;
        let cloud = fleet.clouds.get_mut(&node).context("a node")?;
        cloud.signal(how).await?;
        let answer = ask(&api, QUESTION, mode, async |_| Ok(())).await?;
        let told = || format!("{mode}, {node} ended with SIG{how}: {answer:?}; {}", fleet.edge.stderr());
        answer.check()?;
        ensure!(!answer.degraded(), "{}", told());
        ensure!(answer.tokens == undisturbed.tokens, "{}", told());
        let next = fleet.current().await?;
        ensure!(next != node, "{} still: {}", next, told());
        fleet.restart(&node, how).await?;
    }

    // The edge learns from the restarted node itself that its link is no more.
    let node = fleet.current().await?;
    fleet.restart(&node, "KILL").await?;
    let answer = ask(&api, QUESTION, "exact", async |_| Ok(())).await?;
    answer.check()?;
    ensure!(!answer.degraded() && answer.tokens == undisturbed.tokens, "{node} restarted: {answer:?}");
    Ok(())
}
