//! The large model on an engine behind a URL: the real llama-server, over real QUIC.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tandem_tests::llama_server::{LlamaServer, Needs, needs};
use tandem_tests::process::{Up, ask_for, run, until};

const PROMPTS: [&str; 4] = [
    "Name three colours.",
    "Explain why the sky is blue.",
    // Tokens that end inside a character.
    "你好,请介绍一下你自己。",
    "What is 17 + 25? 🙂",
];

/// Tokens of an answer.
const TOKENS: usize = 16;

/// Tokens of an answer in which an engine dies.
const SOME: Option<usize> = Some(40);

/// Starts the pair: the edge's model here, the cloud's at these addresses.
async fn up(needs: &Needs, servers: &[&LlamaServer]) -> Result<Up> {
    let mut args = vec!["--edge-model", needs.smollm2.as_str()];
    servers.iter().for_each(|server| args.extend(["--upstream", server.url.as_str()]));
    Up::start(&args).await
}

/// An answer's token ids, and the whole reply.
async fn answer(up: &Up, mode: &str, prompt: &str, more: &Value) -> Result<(Vec<u64>, Value)> {
    let mut body = json!({
        "model": "tandem",
        "messages": [{ "role": "user", "content": prompt }],
        "max_tokens": TOKENS,
        "tandem": { "mode": mode, "tokens": true },
    });
    for (key, value) in more.as_object().context("an object")? {
        body[key] = value.clone();
    }
    let reply = reqwest::Client::new().post(format!("{}/chat/completions", up.api)).json(&body).send().await?;
    let status = reply.status();
    let reply: Value = reply.json().await?;
    ensure!(status.is_success(), "{mode}: {reply}\n{}", up.process.stderr());
    let tokens = reply["choices"][0]["tandem"]["tokens"].as_array().with_context(|| format!("no tokens: {reply}"))?;
    Ok((tokens.iter().filter_map(|token| token["id"].as_u64()).collect(), reply))
}

/// Ids of the prompt, as the edge sends them.
async fn prompt_ids(up: &Up, prompt: &str) -> Result<Vec<u32>> {
    let url = format!("{}/tokenize", up.api.trim_end_matches("/v1"));
    let body = json!({ "messages": [{ "role": "user", "content": prompt }], "add_generation_prompt": true });
    let reply: Value = reqwest::Client::new().post(url).json(&body).send().await?.json().await?;
    serde_json::from_value(reply["tokens"].clone()).with_context(|| format!("no tokens: {reply}"))
}

/// `cloud` is what the engine writes by itself, `exact` is `cloud`, and so it is where we draw from the engine's
/// probabilities, penalise and constrain, of which the engine knows nothing.
#[tokio::test(flavor = "multi_thread")]
async fn exact_is_what_the_engine_writes() -> Result<()> {
    let Some(needs) = needs().await? else { return Ok(()) };
    let server = LlamaServer::start(&needs, &needs.smollm2, 0).await?;
    let up = up(&needs, &[&server]).await?;
    let mut accepted = 0;
    for prompt in PROMPTS {
        let (cloud, reply) = answer(&up, "cloud", prompt, &json!({ "temperature": 0 })).await?;
        let alone = server.greedy(&prompt_ids(&up, prompt).await?, TOKENS).await?;
        ensure!(alone.starts_with(&cloud), "{prompt}: the engine alone writes {alone:?}, `cloud` is {cloud:?}");
        ensure!(reply["usage"]["tandem"]["exact"] == "up_to_ties", "{reply}");
        ensure!(reply["usage"]["tandem"]["round_trips"] == 1, "a span is asked for once: {reply}");
        let settings = [
            json!({ "temperature": 0 }),
            json!({ "temperature": 0.8, "seed": 11 }),
            json!({ "temperature": 1.0, "seed": 12, "top_p": 0.9, "presence_penalty": 0.5 }),
        ];
        for more in settings {
            let (cloud, _) = answer(&up, "cloud", prompt, &more).await?;
            let (exact, reply) = answer(&up, "exact", prompt, &more).await?;
            ensure!(exact == cloud, "{prompt} {more}: `exact` is {exact:?}, `cloud` {cloud:?}");
            accepted += reply["usage"]["tandem"]["accepted"].as_u64().unwrap_or(0);
        }
        let (auto, reply) = answer(&up, "auto", prompt, &json!({ "temperature": 0 })).await?;
        ensure!(!auto.is_empty() && reply["usage"]["tandem"]["degraded"] == false, "{reply}");
    }
    ensure!(accepted > 0, "no draft was ever accepted");
    let schema =
        json!({ "type": "object", "properties": { "colour": { "enum": ["red", "blue"] } }, "required": ["colour"] });
    let format = json!({ "type": "json_schema", "json_schema": { "name": "c", "schema": schema, "strict": true } });
    let more = json!({ "temperature": 0, "response_format": format });
    let (cloud, reply) = answer(&up, "cloud", PROMPTS[0], &more).await?;
    let (exact, _) = answer(&up, "exact", PROMPTS[0], &more).await?;
    ensure!(exact == cloud, "under a grammar `exact` is {exact:?}, `cloud` {cloud:?}");
    let text = reply["choices"][0]["message"]["content"].as_str().context("text")?;
    let object: Value = serde_json::from_str(text).with_context(|| text.to_owned())?;
    ensure!(object["colour"].is_string(), "{object}");
    // Nothing is left running when nobody waits.
    until("the engine to be idle", async || Ok(server.busy().await? == 0)).await
}

/// Of two engines, the one that works is killed in the middle of an answer: the other one goes on with the tokens
/// that are final. With none left, `auto` ends on the edge and says so.
#[tokio::test(flavor = "multi_thread")]
async fn an_engine_killed_in_an_answer_costs_no_token() -> Result<()> {
    let Some(needs) = needs().await? else { return Ok(()) };
    let mut servers =
        [LlamaServer::start(&needs, &needs.smollm2, 0).await?, LlamaServer::start(&needs, &needs.smollm2, 0).await?];
    let up = up(&needs, &[&servers[0], &servers[1]]).await?;
    let prompt = PROMPTS[1];
    let whole = ask_for(&up.api, prompt, "cloud", SOME, async |_| Ok(())).await?;
    whole.check()?;
    let mut killed = 0;
    for (round, at) in [1, 7, 20].into_iter().enumerate() {
        let mode = ["cloud", "exact"][round % 2];
        let mut victim = None;
        let broken = ask_for(&up.api, prompt, mode, SOME, async |index| {
            if index == at {
                for (which, server) in servers.iter_mut().enumerate() {
                    if victim.is_none() && server.busy().await? > 0 {
                        server.kill().await?;
                        victim = Some(which);
                    }
                }
            }
            Ok(())
        })
        .await?;
        broken.check()?;
        ensure!(broken.tokens == whole.tokens, "{mode}, killed at {at}: {broken:?}\n{}", up.process.stderr());
        ensure!(!broken.degraded(), "{mode}, killed at {at}: {:?}", broken.usage);
        if let Some(which) = victim {
            let port = servers[which].port();
            servers[which] = LlamaServer::start(&needs, &needs.smollm2, port).await?;
        }
        println!("{mode}, token {at}: killed {victim:?}");
        killed += usize::from(victim.is_some());
    }
    // An engine may have run ahead to the end of what it was asked for.
    ensure!(killed > 0, "no engine was working at any of the tokens");
    let alone = ask_for(&up.api, prompt, "cloud", SOME, async |index| {
        if index == 3 {
            for server in &mut servers {
                server.kill().await?;
            }
        }
        Ok(())
    })
    .await?;
    alone.check()?;
    ensure!(alone.degraded() && alone.usage["tandem"]["exact"] == "none", "{:?}", alone.usage);
    ensure!(alone.tokens[..4] == whole.tokens[..4], "the tokens that were sent stay");
    let auto = ask_for(&up.api, prompt, "auto", SOME, async |_| Ok(())).await?;
    auto.check()?;
    ensure!(auto.degraded(), "{:?}", auto.usage);
    // Another model behind the same URL is not taken for the one that was there.
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/tests/goldens/tiny-llama-f16.gguf");
    let tiny = tiny.to_str().context("the path is no text")?;
    let _other = LlamaServer::start(&needs, tiny, servers[0].port()).await?;
    until("the other model to be noticed", async || {
        let answer = ask_for(&up.api, prompt, "exact", SOME, async |_| Ok(())).await?;
        ensure!(answer.degraded(), "{:?}", answer.usage);
        Ok(up.process.stderr().contains("it serves") && up.process.stderr().contains("start this node again"))
    })
    .await
}

/// What cannot work is said at the start, by name.
#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_fit_is_refused_at_the_start() -> Result<()> {
    let Some(needs) = needs().await? else { return Ok(()) };
    let server = LlamaServer::start(&needs, &needs.smollm2, 0).await?;
    let state = tempfile::tempdir()?;
    let folder = state.path().to_str().context("the path is no text")?;
    let cloud = |more: &[&str]| {
        let args = ["cloud", "--state", folder, "--listen", "127.0.0.1:0"];
        args.iter().chain(more).map(|arg| (*arg).to_owned()).collect::<Vec<_>>()
    };
    let edge = Up::start(&["--no-cloud"]).await?;
    let root = edge.api.trim_end_matches("/v1");
    for (args, words) in [
        (vec!["--upstream", &server.url], "--upstream-tokenizer"),
        (vec!["--upstream", &server.url, "--upstream-tokenizer", "demo-cloud"], "other tokens of"),
        (vec!["--upstream", "gpu:8000", "--upstream-tokenizer", &needs.smollm2], "http://"),
        (vec!["--upstream", root, "--upstream-tokenizer", &needs.smollm2], "no llama-server"),
        (vec!["--upstream-tokenizer", &needs.smollm2], "--upstream <URL>"),
    ] {
        let ended = run(&cloud(&args)).await?;
        ensure!(matches!(ended.code, Some(2 | 3)), "{args:?}: {ended:?}");
        ensure!(ended.stderr.contains(words), "{args:?}: {}", ended.stderr);
    }
    Ok(())
}
