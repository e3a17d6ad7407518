//! Pairs of own models whose leading layers are equal: both ends find the trunk by the layers' digests and exchange
//! hidden states and KV state above it, without a setting, and `exact` stays what the cloud alone writes.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Map, Value, json};
use tandem_cloud_node::metric_definitions as cloud_metrics;
use tandem_edge_node::metric_definitions as edge_metrics;
use tandem_tests::process::{Process, status, until};
use tempfile::TempDir;

const ANY: &str = "127.0.0.1:0";

fn cloud_model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/cloud")
}

/// A model made of the first `layers` layers of the embedded cloud model, with its norm and head.
/// `change` gets the name and the bytes of each tensor.
fn first_layers(layers: usize, change: impl Fn(&str, &mut [u8])) -> Result<TempDir> {
    let (folder, from) = (tempfile::tempdir()?, cloud_model());
    for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"] {
        std::fs::copy(from.join(name), folder.path().join(name))?;
    }
    let mut config: Value = serde_json::from_slice(&std::fs::read(from.join("config.json"))?)?;
    config["num_hidden_layers"] = layers.into();
    std::fs::write(folder.path().join("config.json"), config.to_string())?;

    let file = std::fs::read(from.join("model.safetensors"))?;
    let (length, rest) = file.split_first_chunk::<8>().context("a length")?;
    let (header, data) = rest.split_at(usize::try_from(u64::from_le_bytes(*length))?);
    let header: Map<String, Value> = serde_json::from_slice(header)?;
    let (mut kept, mut bytes) = (Map::new(), Vec::new());
    for (name, mut entry) in header {
        let layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
        if layer.is_some_and(|layer| layer >= layers) {
            continue;
        }
        if let Ok([from, to]) = serde_json::from_value::<[usize; 2]>(entry["data_offsets"].clone()) {
            let mut tensor = data[from..to].to_vec();
            change(&name, &mut tensor);
            entry["data_offsets"] = json!([bytes.len(), bytes.len() + tensor.len()]);
            bytes.append(&mut tensor);
        }
        kept.insert(name, entry);
    }
    let header = serde_json::to_vec(&kept)?;
    let file = [&(header.len() as u64).to_le_bytes()[..], &header, &bytes].concat();
    std::fs::write(folder.path().join("model.safetensors"), file)?;
    Ok(folder)
}

/// Ids of an answer's tokens, and its usage.
async fn ask(api: &str, mode: &str, prompt: &str, temperature: f64) -> Result<(Vec<u64>, Value)> {
    let body = json!({
        "model": format!("tandem:{mode}"),
        "messages": [{ "role": "user", "content": prompt }],
        "temperature": temperature,
        "seed": 7,
        "max_tokens": 40,
        "tandem": { "tokens": true },
    });
    let response = reqwest::Client::new().post(format!("{api}/chat/completions")).json(&body).send().await?;
    let (code, reply) = (response.status(), response.json::<Value>().await?);
    ensure!(code.is_success(), "{mode}: {reply}");
    let tokens = reply["choices"][0]["tandem"]["tokens"].as_array().with_context(|| format!("no tokens: {reply}"))?;
    Ok((tokens.iter().filter_map(|token| token["id"].as_u64()).collect(), reply["usage"]["tandem"].clone()))
}

/// Sum of a counter's series whose labels contain `label`.
async fn count(metrics: &str, name: &str, label: &str) -> Result<f64> {
    let text = reqwest::get(metrics).await?.error_for_status()?.text().await?;
    let series = text.lines().filter(|line| line.starts_with(name) && line.contains(label));
    Ok(series.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trunk_is_found_by_itself_and_used() -> Result<()> {
    let state = tempfile::tempdir()?;
    let folder = state.path().to_str().context("folder")?;
    let part = async |role: &str, extra: &[&str]| -> Result<Process> {
        let args: Vec<&str> = [role, "--state", folder, "--listen", ANY].iter().chain(extra).copied().collect();
        Process::start(&args).await.with_context(|| format!("{args:?}"))
    };
    let cloud = part("cloud", &["--metrics", ANY, "--set", "cloud.pull_trunk=always"]).await?;
    let (at, cloud_metrics_at) = (cloud.field("listen")?, cloud.field("metrics")?);

    let cut = first_layers(5, |_, _| {})?;
    let other = first_layers(5, |name, tensor| {
        if name.starts_with("model.layers.0.") {
            tensor[0] ^= 1;
        }
    })?;
    let whole = cloud_model();
    let embedded = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/edge");
    // (the edge's model, a setting, layers of the trunk, why there is none)
    let table = [
        ("the first five of seven layers", cut.path(), "edge.exact=draft", 5, None),
        ("the same, at most three", cut.path(), "edge.trunk_layers=3", 3, None),
        ("the cloud's own model", &whole, "edge.exact=draft", 7, None),
        ("the embedded edge model", &embedded, "edge.exact=draft", 2, None),
        ("another first layer", other.path(), "edge.exact=draft", 0, Some("the models differ")),
        ("none wanted", cut.path(), "edge.trunk_layers=0", 0, Some("`trunk_layers` is 0")),
    ];
    let prompts = ["What is the capital of Peru?", "What is 12 plus 30? Reply with the number. ", "Name a colour."];
    for (index, (name, model, setting, layers, why)) in table.into_iter().enumerate() {
        let (model, own) = (model.to_str().context("text")?, format!("edge-{index}"));
        let always = ["--set", "edge.send_hidden=always", "--set", "edge.fetch_prompt=always"];
        let args = ["--cloud", &at, "--name", &own, "--model", model, "--set", setting];
        let edge = part("edge", &[&args[..], &always[..]].concat()).await?;
        let api = edge.field("url")?;
        until("the edge to reach the cloud", async || Ok(status(&api).await?["cloud_connected"] == true)).await?;
        let said = status(&api).await?;
        ensure!(said["trunk_layers"] == layers, "{name}: {said}");
        let note = said["trunk_note"].as_str();
        ensure!(note.is_some() == why.is_some(), "{name}: {said}");
        ensure!(note.unwrap_or_default().contains(why.unwrap_or_default()), "{name}: {said}");

        let edge_metrics_at = format!("{}/metrics", api.trim_end_matches("/v1"));
        let given = async || count(&cloud_metrics_at, cloud_metrics::ROWS, "trunk=\"edge\"").await;
        let lent = async || {
            count(&cloud_metrics_at, cloud_metrics::KV_BLOCKS, "direction=\"sent\",result=\"published\"").await
        };
        let before = (given().await?, lent().await?);
        for prompt in prompts {
            for temperature in [0.0, 0.8] {
                let (wanted, _) = ask(&api, "cloud", prompt, temperature).await?;
                let (got, usage) = ask(&api, "exact", prompt, temperature).await?;
                ensure!(usage["degraded"] == false, "{name}: {usage}");
                ensure!(got == wanted && !got.is_empty(), "{name}, {prompt:?}: {got:?} instead of {wanted:?}");
            }
        }
        let (rows, blocks) = (given().await? - before.0, lent().await? - before.1);
        let fetched = count(&edge_metrics_at, edge_metrics::PROMPTS_FETCHED, "").await?;
        println!(
            "{name}: {rows} rows with hidden states of the edge, {blocks} blocks and {fetched} prompts lent to it"
        );
        if layers == 0 {
            ensure!(rows == 0.0 && blocks == 0.0 && fetched == 0.0, "{name}");
        } else {
            ensure!(rows > 0.0 && blocks > 0.0 && fetched > 0.0, "{name}: {rows}, {blocks}, {fetched}");
        }
    }
    Ok(())
}
