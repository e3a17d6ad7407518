//! What the page says of a cloud that is not there, by choice or by fault.

use anyhow::{Result, ensure};
use serde_json::json;
use tandem_edge_node::diagnosis::{CloudState, LinkState};
use tandem_edge_node::request::NodeStatus;
use tandem_tests::browser::Browser;

use super::unrig;

/// Makes the node's status this one.
async fn status(browser: &Browser, model: &str, cloud: CloudState) -> Result<()> {
    let status = NodeStatus {
        edge_model: model.into(),
        cloud_problem: cloud.failure(),
        cloud,
        threshold: 0.1,
        ..NodeStatus::default()
    };
    let script = format!(
        "window.realFetch ??= window.fetch;
         window.fetch = (url, init) => String(url).startsWith('/tandem/status') ? Promise.resolve(new Response({})) : window.realFetch(url, init)",
        json!(serde_json::to_string(&status)?),
    );
    browser.script(&script).await.map(drop)
}

pub(crate) async fn states(browser: &Browser) -> Result<()> {
    let link = |wanted: &str| format!("return document.getElementById('pill').dataset.link === '{wanted}'");
    // Without a cloud by choice: no outage, no mode that needs one, and no examples for other models.
    status(browser, "my-model", CloudState::of(LinkState::None)).await?;
    browser.until("no cloud by choice", &link("alone")).await?;
    ensure!(browser.script("return document.getElementById('banner').hidden").await? == true, "a choice is no outage");
    let text = browser.text("body").await?;
    ensure!(text.contains("--no-cloud") && !text.contains("away"), "{text}");
    let modes = "return [...document.querySelectorAll('[name=mode]')].filter((mode) => !mode.disabled).map((mode) => mode.value).join()";
    ensure!(browser.script(modes).await? == "local");
    ensure!(browser.script("return document.querySelector('[name=mode]:checked').value").await? == "local");
    ensure!(browser.text("#chips").await?.is_empty(), "examples of the demo pair for another model");

    // A fault: what it is and what to do, in the node's words, as text.
    let cloud = CloudState {
        state: LinkState::Failed,
        code: Some("untrusted_ca".into()),
        problem: Some("the certificate of <b>cloud-a</b> is of another CA".into()),
        what_to_do: Some("copy ca/ from the first machine".into()),
    };
    status(browser, "demo-edge", cloud).await?;
    browser.until("the fault", &link("failed")).await?;
    let banner = browser.text("#banner").await?;
    for part in ["<b>cloud-a</b> is of another CA", "What to do: copy ca/ from the first machine"] {
        ensure!(banner.contains(part), "{banner}");
    }
    ensure!(browser.text("#chips").await?.contains("Peru"), "no examples for the demo pair");

    unrig(browser).await?;
    browser.until("the cloud", &link("up")).await?;
    ensure!(browser.script("return document.getElementById('banner').hidden").await? == true);
    Ok(())
}
