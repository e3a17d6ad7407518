//! Answers of a cluster, for tests that compare them token for token.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};
use tandem_edge_node::node::EdgeNode;
use tandem_edge_node::request::{Controls, Event, FinishReason, GenerateRequest, Mode, RouteSummary, TokenEvent};
use tandem_engine::chat::Message;
use tandem_lab::cluster::Cluster;
use tandem_proto::message::SamplingParams;
use tokio::sync::Semaphore;

use crate::process::{WAIT_MAX, until};

/// A complete answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Its tokens.
    pub tokens: Vec<TokenEvent>,
    /// Why it ended.
    pub finish: FinishReason,
    /// What it took.
    pub route: RouteSummary,
}

impl Answer {
    /// Token ids.
    #[must_use]
    pub fn ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|t| t.id).collect()
    }
}

/// The first `n` questions of the evaluation data, all splits in turn.
pub fn questions(n: usize) -> Result<Vec<String>> {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/data");
    let mut splits = Vec::new();
    for split in ["eval_heldout", "eval_dialogue", "eval_seen_facts"] {
        let text = std::fs::read_to_string(data.join(format!("{split}.jsonl")))?;
        let rows: Vec<String> = text
            .lines()
            .map(|line| {
                let row: serde_json::Value = serde_json::from_str(line)?;
                Ok(row["prompt"].as_str().context("a row without a prompt")?.to_owned())
            })
            .collect::<Result<_>>()?;
        splits.push(rows);
    }
    Ok((0..n).filter_map(|i| splits[i % 3].get(i / 3).cloned()).collect())
}

/// Prompt tokens of a question.
pub fn prompt(edge: &EdgeNode, question: &str) -> Result<Vec<u32>> {
    let text = edge.chat_template().render(&[Message::new("user", question)], true, 0)?;
    Ok(edge.tokenizer().encode(&text)?)
}

/// A request for an answer to `question`.
pub fn request(edge: &EdgeNode, question: &str, mode: Mode, sampling: &SamplingParams) -> Result<GenerateRequest> {
    Ok(GenerateRequest {
        request_id: format!("test-{}", mode.name()),
        prompt: prompt(edge, question)?,
        mode,
        sampling: sampling.clone(),
        tokens_max: 64,
        threshold: None,
        top_logprobs: 0,
        grammar: None,
    })
}

/// Runs a request to its end and checks that indices are 0..n once each. `on_token` is called after
/// each token.
pub async fn answer(
    edge: &EdgeNode,
    request: GenerateRequest,
    mut on_token: impl FnMut(&TokenEvent),
) -> Result<Answer> {
    let mut generation = edge.submit(request)?;
    let mut tokens: Vec<TokenEvent> = Vec::new();
    while let Some(event) = generation.events.recv().await {
        match event {
            Event::Token(t) => {
                if t.index as usize != tokens.len() {
                    bail!("token {} arrived as number {}", t.index, tokens.len());
                }
                on_token(&t);
                tokens.push(t);
            }
            Event::Done(done) => return Ok(Answer { tokens, finish: done.finish, route: done.route }),
            Event::Failed(e) => return Err(e.into()),
        }
    }
    bail!("the answer ended without an end")
}

/// Answers all questions, at most `at_once` at a time, in order.
pub async fn answers(
    edge: &EdgeNode,
    questions: &[String],
    mode: Mode,
    sampling: &SamplingParams,
    at_once: usize,
) -> Result<Vec<Answer>> {
    let gate = Arc::new(Semaphore::new(at_once));
    let mut tasks = Vec::new();
    for question in questions {
        let request = request(edge, question, mode, sampling)?;
        let (edge, gate) = (edge.clone(), gate.clone());
        tasks.push(tokio::spawn(async move {
            let _turn = gate.acquire_owned().await?;
            answer(&edge, request, |_| {}).await
        }));
    }
    let mut all = Vec::new();
    for task in tasks {
        all.push(task.await??);
    }
    Ok(all)
}

/// Cuts the cloud off, or lets it back.
pub fn cut(cluster: &Cluster, cut: bool) {
    cluster.edge.set_controls(&Controls { cut: Some(cut), ..Controls::default() });
}

/// Waits until the edge has its cloud.
pub async fn connected(cluster: &Cluster) -> Result<()> {
    until("the edge to reach its cloud", async || Ok(cluster.edge.status().cloud_connected)).await
}

/// Cuts the cloud off, sees the link go, and lets the cloud back. True if the link went and an answer
/// was under way then. Blocks its thread, so that it can stand between two tokens of an answer.
fn cut_and_restore(cluster: &Cluster) -> Result<bool> {
    let begun = Instant::now();
    cut(cluster, true);
    while cluster.edge.status().cloud_connected {
        ensure!(begun.elapsed() < WAIT_MAX, "the link outlives its cut");
        std::thread::yield_now();
    }
    let under_way = cluster.edge.status().active_requests > 0;
    cut(cluster, false);
    Ok(under_way)
}

/// Asks for one answer again and again, and takes the link away after every `step`th of its tokens: it
/// must stay what it is without that, and the cloud must be in it to the end. `what` names the case.
pub async fn cuts_change_nothing(
    cluster: &Cluster,
    what: &str,
    step: usize,
    make: impl Fn() -> Result<GenerateRequest>,
) -> Result<()> {
    let undisturbed = answer(&cluster.edge, make()?, |_| {}).await?;
    let (mut cuts, mut under_way) = (0, 0);
    for k in (0..undisturbed.tokens.len()).step_by(step) {
        connected(cluster).await?;
        let mut seen = None;
        let disturbed = answer(&cluster.edge, make()?, |token| {
            if token.index as usize == k {
                seen = Some(cut_and_restore(cluster));
            }
        });
        let disturbed = disturbed.await.with_context(|| format!("{what}, cut after token {k}"))?;
        ensure!(
            disturbed.ids() == undisturbed.ids(),
            "{what}, cut after token {k}: {:?} instead of {:?}",
            disturbed.ids(),
            undisturbed.ids()
        );
        let why = &disturbed.route.degraded_reason;
        ensure!(!disturbed.route.degraded, "{what}, cut after token {k}: went on without the cloud: {why:?}");
        let seen = seen.with_context(|| format!("{what}: token {k} never came"))?;
        cuts += 1;
        under_way += usize::from(seen.with_context(|| format!("{what}, cut after token {k}"))?);
    }
    println!("{what}: {cuts} links lost, {under_way} of them while the answer was under way");
    ensure!(under_way > 0, "{what}: no cut came before an answer's end");
    Ok(())
}
