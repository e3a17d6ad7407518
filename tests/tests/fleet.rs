//! A fleet of processes as its operator sees it: which node takes whom, and what logs and metrics say.

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use tandem_cloud_node::metric_definitions as m;
use tandem_tests::process::{Process, status, until};
use tempfile::TempDir;

const ANY: &str = "127.0.0.1:0";

/// A state folder that all processes of a fleet share, with its CA.
struct Fleet(TempDir);

impl Fleet {
    async fn part(&self, role: &str, extra: &[&str]) -> Result<Process> {
        let folder = self.0.path().to_str().context("folder")?;
        let args: Vec<&str> = [role, "--state", folder].into_iter().chain(extra.iter().copied()).collect();
        Process::start(&args).await.with_context(|| format!("{args:?}"))
    }
}

async fn connected(api: &str) -> Result<()> {
    until("the edge to reach a cloud", async || Ok(status(api).await?["cloud_connected"] == true)).await
}

/// Asks for an answer of `tokens` tokens by the cloud.
async fn ask(api: &str, request: &str, prompt: &str, tokens: usize) -> Result<()> {
    let body = json!({
        "model": "tandem:cloud",
        "messages": [{ "role": "user", "content": prompt }],
        "max_tokens": tokens,
        "min_tokens": tokens,
    });
    let url = format!("{api}/chat/completions");
    let response = reqwest::Client::new().post(url).header("x-request-id", request).json(&body).send().await?;
    let (status, text) = (response.status(), response.text().await?);
    ensure!(status.is_success(), "{status}: {text}");
    Ok(())
}

/// The lines of a log that speak of the request.
fn lines<'t>(log: &'t str, request: &str) -> Vec<&'t str> {
    log.lines().filter(|line| line.contains(request)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_found_in_both_logs_and_every_metric_says_what_it_is() -> Result<()> {
    let fleet = Fleet(tempfile::tempdir()?);
    let log = ["--log", "warn,tandem=debug"];
    let cloud = fleet.part("cloud", &[&["--listen", ANY, "--metrics", ANY], &log[..]].concat()).await?;
    let at = cloud.field("listen")?;
    let edge = fleet.part("edge", &[&["--listen", ANY, "--cloud", &at, "--name", "phone"], &log[..]].concat()).await?;
    let api = edge.field("url")?;
    connected(&api).await?;
    ask(&api, "req-of-the-test", "What is the capital of Peru?", 4).await?;

    let said = async |process: &Process, wanted: &[&str]| {
        let all = |line: &&str| wanted.iter().all(|part| line.contains(part));
        until("the log to name the request", async || Ok(lines(&process.stderr(), "req-of-the-test").iter().any(all)))
            .await
            .with_context(|| format!("{wanted:?} in one line of {}", process.stderr()))
    };
    said(&edge, &["answer{", "request=\"req-of-the-test\"", "session=", "device=\"phone\"", "ended"]).await?;
    said(&cloud, &["session{", "request=\"req-of-the-test\"", "id=", "device=", "phone", "opened"]).await?;
    // The session has one name on both sides.
    let (mine, theirs) = (edge.stderr(), cloud.stderr());
    let name = |log: &str, key: &str| -> Result<String> {
        let line = *lines(log, "req-of-the-test").first().context("a line")?;
        let rest = line.split_once(key).with_context(|| format!("no {key} in {line}"))?.1;
        Ok(rest.split([' ', '}']).next().unwrap_or_default().to_owned())
    };
    ensure!(name(&mine, "session=")? == name(&theirs, " id=")?, "{mine}\n{theirs}");

    let metrics = reqwest::get(cloud.field("metrics")?).await?.error_for_status()?.text().await?;
    let typed: Vec<&str> = metrics.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
    ensure!(typed.len() >= 8, "{metrics}");
    for name in typed {
        ensure!(metrics.contains(&format!("# HELP {name} ")), "{name} does not say what it is: {metrics}");
    }
    let gauge = |name: &str| -> Result<f64> {
        let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        Ok(line.with_context(|| format!("no {name}: {metrics}"))?.parse()?)
    };
    ensure!(gauge(m::QUEUE_JOBS)? == 0.0 && gauge(m::QUEUE_ROWS)? == 0.0, "{metrics}");
    let (blocks, free) = (gauge(m::KV_POOL_BLOCKS)?, gauge(m::KV_POOL_FREE_BLOCKS)?);
    ensure!(blocks > 0.0 && free > 0.0 && free <= blocks, "{metrics}");
    Ok(())
}

/// By its name each would come before the one that is chosen.
#[tokio::test(flavor = "multi_thread")]
async fn an_edge_is_placed_on_the_near_node_without_a_queue() -> Result<()> {
    let fleet = Fleet(tempfile::tempdir()?);
    let router = fleet.part("router", &["--listen", ANY]).await?;
    let at = router.field("listen")?;
    let cloud = async |name: &str, region: &str| {
        let region = format!("peers.region={region}");
        fleet.part("cloud", &["--listen", ANY, "--router", &at, "--name", name, "--set", &region]).await
    };
    let far = cloud("a-far", "sea").await?;
    let near = cloud("b-near", "home").await?;
    let edge = async |name: &str| -> Result<Process> {
        let args = ["--listen", ANY, "--router", &at, "--name", name, "--set", "peers.region=home"];
        let edge = fleet.part("edge", &args).await?;
        connected(&edge.field("url")?).await?;
        Ok(edge)
    };
    // A node logs whom it serves.
    let serves = |node: &Process, edge: &str| node.stderr().lines().any(|l| l.contains("opened") && l.contains(edge));
    let first = edge("first").await?;
    until("a node to serve the edge", async || Ok(serves(&far, "first") || serves(&near, "first"))).await?;
    ensure!(!serves(&far, "first"), "the far node was chosen");

    // The near node gets more prompts than it can feed at once, and the next report says so.
    let other = cloud("c-idle", "home").await?;
    let api = first.field("url")?;
    let flood = tokio::spawn(async move {
        for round in 0.. {
            let rest = "Item one costs two dollars. ".repeat(90);
            // No prompt begins as another one does.
            let prompts: Vec<String> = (0..24).map(|n| format!("{round} {n}. {rest}")).collect();
            futures::future::join_all(prompts.iter().map(|prompt| ask(&api, "flood", prompt, 8))).await;
        }
    });
    let busy = async || {
        let name = "second";
        drop(edge(name).await?);
        Ok(serves(&other, name))
    };
    until("an edge to be placed beside the loaded node", busy).await?;
    flood.abort();
    ensure!(!serves(&far, "second"), "the far node was chosen");
    Ok(())
}
