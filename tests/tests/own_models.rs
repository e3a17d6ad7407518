//! Models that a person brings: a GGUF file, a folder in Hugging Face layout, a name in the store.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use reqwest::StatusCode;
use serde_json::{Value, json};
use tandem_tests::process::{Ended, Up, finish, run, tandem};

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/tests/goldens")
}

/// A seeded Llama of 80 KB (`make_tiny_llama.py`).
fn tiny() -> Result<String> {
    Ok(goldens().join("tiny-llama-f16.gguf").to_str().context("the path is no text")?.to_owned())
}

struct Reply {
    status: StatusCode,
    mode: String,
    reason: String,
    policy: String,
    body: Value,
}

/// Asks for a greedy answer of `tokens` tokens.
async fn chat(up: &Up, model: &str, prompt: &str, tokens: usize) -> Result<Reply> {
    let body = json!({
        "model": model,
        "messages": [{ "role": "user", "content": prompt }],
        "temperature": 0,
        "max_tokens": tokens,
        "tandem": { "tokens": true },
    });
    let url = format!("{}/chat/completions", up.api);
    let response = reqwest::Client::new().post(url).json(&body).send().await?;
    let header =
        |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned();
    let (mode, reason, policy) = (header("x-tandem-mode"), header("x-tandem-reason"), header("x-tandem-policy"));
    Ok(Reply { status: response.status(), mode, reason, policy, body: response.json().await? })
}

/// Every prompt of the golden file gets llama.cpp's answer, from whom the mode promises it. Returns how
/// many tokens the cloud chose or judged.
async fn answers_like_llama_cpp(up: &Up, model: &str) -> Result<u64> {
    let mut by_cloud = 0;
    let golden: Value = serde_json::from_slice(&std::fs::read(goldens().join("tiny-llama.json"))?)?;
    for row in golden["prompts"].as_array().context("prompts")? {
        let prompt = row["prompt"].as_str().context("prompt")?;
        let wanted: Vec<u64> = serde_json::from_value(row["greedy"].clone())?;
        let reply = chat(up, model, prompt, wanted.len()).await?;
        ensure!(reply.status == StatusCode::OK, "{model}: {}", reply.body);
        let choice = &reply.body["choices"][0];
        let got: Vec<u64> = choice["tandem"]["tokens"]
            .as_array()
            .with_context(|| format!("no tokens in {}", reply.body))?
            .iter()
            .filter_map(|token| token["id"].as_u64())
            .collect();
        ensure!(got == wanted, "{model}, {prompt:?}: {got:?} instead of {wanted:?}");
        ensure!(reply.body["usage"]["prompt_tokens"] == row["ids"].as_array().map_or(0, Vec::len), "{}", reply.body);
        let route = &reply.body["usage"]["tandem"];
        ensure!(route["degraded"] == false, "{model}: {}", reply.body);
        let count = |name: &str| route[name].as_u64().with_context(|| format!("no {name} in {}", reply.body));
        by_cloud += count("cloud_tokens")? + count("accepted")?;
    }
    Ok(by_cloud)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gguf_alone_serves_local() -> Result<()> {
    let up = Up::start(&["--no-cloud", "--edge-model", &tiny()?]).await?;
    answers_like_llama_cpp(&up, "tandem").await?;
    answers_like_llama_cpp(&up, "tiny-llama-f16:local").await?;
    let reply = chat(&up, "tandem", "a", 4).await?;
    ensure!((reply.mode.as_str(), reply.reason.as_str()) == ("local", "default"), "{} {}", reply.mode, reply.reason);
    ensure!(reply.body["usage"]["tandem"]["degraded"] == false, "{}", reply.body);
    let refused = chat(&up, "tandem:exact", "a", 4).await?;
    ensure!(refused.status == StatusCode::BAD_REQUEST && refused.body["error"]["code"] == "no_cloud");

    let models: Value = reqwest::get(format!("{}/models", up.api)).await?.json().await?;
    let listed: Vec<&str> =
        models["data"].as_array().into_iter().flatten().filter_map(|model| model["id"].as_str()).collect();
    ensure!(listed.contains(&"tiny-llama-f16:local"), "{listed:?}");
    ensure!(!listed.iter().any(|id| id.starts_with("demo-")), "nothing is offered that is not there: {listed:?}");

    let too_long = chat(&up, "tandem", &"word ".repeat(200), 4).await?;
    ensure!(too_long.body["error"]["code"] == "context_length_exceeded", "{}", too_long.body);
    let page = reqwest::get(&up.page).await?.error_for_status()?.text().await?;
    ensure!(page.contains("<html"), "{page}");
    let state = up.state.path().to_str().context("state")?;
    let asked = run(&["chat", "hello", "--max-tokens", "8", "--state", state]).await?;
    ensure!(asked.code == Some(0) && asked.stdout.contains("8 tokens edge"), "{asked:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn one_model_on_both_ends_is_exact_and_uses_the_baseline() -> Result<()> {
    let model = tiny()?;
    let up = Up::start(&["--edge-model", &model, "--cloud-model", &model]).await?;
    for mode in ["local", "exact", "cloud"] {
        let by_cloud = answers_like_llama_cpp(&up, &format!("tandem:{mode}")).await.context(mode)?;
        ensure!((by_cloud > 0) == (mode != "local"), "{mode}: {by_cloud} tokens by the cloud");
    }
    let reply = chat(&up, "tandem", "a", 4).await?;
    ensure!(reply.mode == "auto" && reply.policy.starts_with("entropy"), "{} {}", reply.mode, reply.policy);
    ensure!(up.status().await?["cloud_problem"].is_null(), "{}", up.status().await?);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pair_with_two_tokenizers_answers_alone_and_says_why() -> Result<()> {
    let up = Up::start(&["--edge-model", &tiny()?]).await?;
    answers_like_llama_cpp(&up, "tandem").await?;
    let reply = chat(&up, "tandem", "a", 4).await?;
    ensure!((reply.mode.as_str(), reply.reason.as_str()) == ("local", "tokenizers-differ"), "{}", reply.reason);
    for mode in ["auto", "exact", "cloud"] {
        let refused = chat(&up, &format!("tandem:{mode}"), "a", 4).await?;
        ensure!(refused.status == StatusCode::BAD_REQUEST, "{mode}: {}", refused.body);
        ensure!(refused.body["error"]["code"] == "tokenizers_differ", "{mode}: {}", refused.body);
        let message = refused.body["error"]["message"].as_str().unwrap_or_default();
        ensure!(message.contains("tiny-llama-f16") && message.contains("demo-cloud"), "{message}");
        ensure!(message.contains("differ first in token 0 (here `"), "{message}");
    }
    let ready: Value = reqwest::get(format!("{}ready", up.page)).await?.error_for_status()?.json().await?;
    ensure!(ready["modes"] == json!(["local"]), "{ready}");
    ensure!(ready["cloud_problem"].as_str().is_some_and(|problem| problem.contains("tokenizers")), "{ready}");
    let doctor = run(&["doctor", "--state", up.state.path().to_str().context("state")?]).await?;
    ensure!(doctor.stdout.contains("cannot take part"), "{doctor:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn folders_and_names_of_the_store_are_models_too() -> Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/edge");
    let up = Up::start(&["--no-cloud", "--edge-model", folder.to_str().context("text")?]).await?;
    let reply = chat(&up, "edge", "What is the capital of Peru?", 16).await?;
    let text = reply.body["choices"][0]["message"]["content"].as_str().unwrap_or_default();
    ensure!(text.contains("Lima"), "{}", reply.body);
    drop(up);

    let cache = tempfile::tempdir()?;
    let repo = cache.path().join("models--org--tiny");
    let commit = "0123456789abcdef0123456789abcdef01234567";
    std::fs::create_dir_all(repo.join("snapshots").join(commit))?;
    std::fs::create_dir_all(repo.join("refs"))?;
    std::fs::write(repo.join("refs/main"), commit)?;
    std::fs::copy(tiny()?, repo.join("snapshots").join(commit).join("tiny-F16.gguf"))?;
    let engine = |model: &str| -> Result<_> {
        let mut command =
            tandem(&["bench", "engine", "--model", model, "--prompt", "16", "--decode", "4", "--rounds", "1"])?;
        command.env("HF_HUB_CACHE", cache.path());
        Ok(command)
    };
    for name in ["org/tiny", "org/tiny:f16"] {
        let ended = finish(&mut engine(name)?).await?;
        ensure!(ended.code == Some(0), "{name}: {}", ended.stderr);
    }
    let Ended { code, stderr: said, .. } = finish(&mut engine("org/other")?).await?;
    ensure!(code == Some(2), "{said}");
    ensure!(said.contains("org/tiny") && said.contains("tandem model pull org/other"), "{said}");
    Ok(())
}
