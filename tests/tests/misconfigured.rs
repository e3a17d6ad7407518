//! What is misconfigured is said where people look, with what to do: in the edge's log at the default level
//! (once, not at each attempt), by `/ready` and `/tandem/status`, and by `tandem doctor`, which then fails.

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tandem_tests::process::{Process, run, status, until};
use tempfile::TempDir;

const ANY: &str = "127.0.0.1:0";
/// The discard port: no process listens there.
const NOWHERE: &str = "127.0.0.1:9";

/// A state folder; processes that share it share its CA.
struct Folder(TempDir);

impl Folder {
    fn new() -> Result<Self> {
        Ok(Self(tempfile::tempdir()?))
    }

    fn path(&self) -> Result<&str> {
        self.0.path().to_str().context("the folder's name is no text")
    }

    async fn part(&self, role: &str, extra: &[&str]) -> Result<Process> {
        let args: Vec<&str> =
            [role, "--listen", ANY, "--state", self.path()?].into_iter().chain(extra.iter().copied()).collect();
        Process::start(&args).await.with_context(|| format!("{args:?}"))
    }

    /// An edge started with `extra` says `code` everywhere, with an advice that contains `advice`.
    async fn edge_says(&self, extra: &[&str], code: &str, advice: &str) -> Result<()> {
        let edge = self.part("edge", extra).await?;
        self.says(&edge, code, advice).await.with_context(|| format!("{extra:?}: {}", edge.stderr()))
    }

    async fn says(&self, edge: &Process, code: &str, advice: &str) -> Result<()> {
        let api = edge.field("url")?;
        let advises = |cloud: &Value| cloud["what_to_do"].as_str().is_some_and(|what| what.contains(advice));
        until(code, async || Ok(status(&api).await?["cloud"]["state"] == "failed")).await?;
        let cloud = status(&api).await?["cloud"].clone();
        ensure!(cloud["code"] == code && advises(&cloud), "/tandem/status: {cloud}");
        let url = api.trim_end_matches("/v1");
        let ready: Value = reqwest::get(format!("{url}/ready")).await?.error_for_status()?.json().await?;
        ensure!(ready["cloud"]["code"] == code && advises(&ready["cloud"]), "/ready: {ready}");
        let doctor = run(&["doctor", "--state", self.path()?, "--url", url]).await?;
        ensure!(doctor.code == Some(8) && doctor.stdout.contains(advice), "{doctor:?}");
        let node = doctor.stdout.lines().find(|line| line.contains(" node ")).unwrap_or_default();
        ensure!(node.starts_with("FAIL"), "{doctor:?}");
        let said = |log: String| log.lines().filter(|line| line.contains("the cloud cannot take part")).count();
        until("the log", async || Ok(said(edge.stderr()) > 0)).await?;
        ensure!(said(edge.stderr()) == 1, "said at each attempt: {}", edge.stderr());
        ensure!(edge.stderr().contains(advice), "{}", edge.stderr());
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cloud_that_cannot_be_reached_is_said() -> Result<()> {
    let (fleet, stranger) = (Folder::new()?, Folder::new()?);
    let router = fleet.part("router", &[]).await?;
    let cloud = fleet.part("cloud", &["--router", &router.field("listen")?, "--name", "cloud-a"]).await?;
    let (router, cloud) = (router.field("listen")?, cloud.field("listen")?);
    let named = format!("cloud-b.tandem@{cloud}");
    let router_named = format!("router-9.tandem@{router}");
    let table: [(&Folder, &[&str], &str, &str); 8] = [
        (&fleet, &["--cloud", &named], "wrong_server_name", "--name"),
        (&fleet, &["--router", &router_named], "wrong_server_name", "--name"),
        (&stranger, &["--cloud", &cloud], "untrusted_ca", "copy the `ca` folder"),
        (&stranger, &["--router", &router], "untrusted_ca", "copy the `ca` folder"),
        (&fleet, &["--cloud", &cloud, "--cloud-model", "big"], "unknown_model", "--cloud-model demo-cloud"),
        (&fleet, &["--router", &router, "--cloud-model", "big"], "unknown_model", "--cloud-model demo-cloud"),
        (&fleet, &["--cloud", NOWHERE], "cloud_unreachable", "UDP"),
        (&fleet, &["--router", NOWHERE], "router_unreachable", "--router"),
    ];
    for (folder, args, code, advice) in table {
        folder.edge_says(args, code, advice).await?;
    }
    // Without a running edge, doctor dials what the settings name.
    let named = format!("peers.cloud={named}");
    let good = format!("peers.cloud={cloud}");
    for (setting, code, words) in [(named, 8, "NAME.tandem@host:port"), (good, 0, "serves the model")] {
        let doctor = run(&["doctor", "--state", fleet.path()?, "--url", "127.0.0.1:9", "--set", &setting]).await?;
        ensure!(doctor.code == Some(code) && doctor.stdout.contains(words), "{doctor:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn more_edges_of_one_name_than_a_cloud_takes_are_told() -> Result<()> {
    let fleet = Folder::new()?;
    let cloud = fleet.part("cloud", &[]).await?;
    let at = cloud.field("listen")?;
    let mut edges = Vec::new();
    for _ in 0..8 {
        edges.push(fleet.part("edge", &["--cloud", &at]).await?);
    }
    for edge in &edges {
        let api = edge.field("url")?;
        until("the edge to reach the cloud", async || Ok(status(&api).await?["cloud_connected"] == true)).await?;
        until("the log", async || Ok(edge.stderr().contains("connected to a cloud node"))).await?;
    }
    fleet.edge_says(&["--cloud", &at], "name_in_use", "--name").await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_edge_without_a_cloud_is_fine() -> Result<()> {
    let folder = Folder::new()?;
    let edge = folder.part("edge", &[]).await?;
    let api = edge.field("url")?;
    ensure!(status(&api).await?["cloud"]["state"] == "none", "{}", status(&api).await?);
    let url = api.trim_end_matches("/v1");
    let doctor = run(&["doctor", "--state", folder.path()?]).await?;
    ensure!(doctor.stdout.contains("without a cloud by choice"), "found by its state folder: {doctor:?}");
    ensure!(doctor.code == Some(0), "{doctor:?}");
    for model in ["tandem", "tandem:auto", "tandem:local"] {
        let asked = run(&["chat", "What is the capital of Peru?", "--model", model, "--url", url, "--json"]).await?;
        let answer: Value = serde_json::from_str(&asked.stdout)?;
        ensure!(answer["usage"]["tandem"]["degraded"] == false, "{model}: {answer}");
    }
    let exact = run(&["chat", "hello", "--mode", "exact", "--url", url]).await?;
    ensure!(exact.code == Some(7) && exact.stderr.contains("--no-cloud"), "{exact:?}");
    Ok(())
}
