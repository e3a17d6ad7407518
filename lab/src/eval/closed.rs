//! The closed loop: answers of a real edge node that asks a real cloud node over QUIC.

use std::collections::BTreeMap;
use std::time::Instant;

use tandem_edge_node::node::EdgeNode;
use tandem_edge_node::request::{Event, GenerateRequest, Mode, RouteSummary};
use tandem_proto::message::SamplingParams;
use tokio::task::JoinSet;

use super::{CategoryReport, EvalOptions, Interval, Measure, ModeReport, SplitReport, TOTAL};
use crate::cluster::Cluster;
use crate::error::LabError;
use crate::explore::ANSWER_TOKENS_MAX;
use crate::pair::check_room;
use crate::progress::Progress;
use crate::questions::DataReport;
use crate::rows::Row;

/// What to ask a node.
#[derive(Clone, Debug)]
pub struct Asked {
    /// Prompt tokens.
    pub prompt: Vec<u32>,
    /// Mode.
    pub mode: Mode,
    /// Sampling; the default is greedy.
    pub sampling: SamplingParams,
    /// Most tokens of the answer.
    pub tokens_max: usize,
    /// Threshold instead of the policy's.
    pub threshold: Option<f32>,
}

impl Asked {
    /// A greedy answer of the length of the reference evaluation.
    #[must_use]
    pub fn greedy(prompt: Vec<u32>, mode: Mode) -> Self {
        Self { prompt, mode, sampling: SamplingParams::default(), tokens_max: ANSWER_TOKENS_MAX, threshold: None }
    }
}

/// What a node answered.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    /// Tokens, the one that ends the answer included.
    pub tokens: Vec<u32>,
    /// What it took.
    pub route: RouteSummary,
    /// Time to the first token, seconds.
    pub first_token_s: f64,
    /// Time to the end, seconds.
    pub seconds: f64,
}

impl Answer {
    /// Tokens per second over the whole answer.
    #[must_use]
    pub fn tokens_per_s(&self) -> f64 {
        self.tokens.len() as f64 / self.seconds.max(1e-9)
    }
}

/// Asks a node and waits for the end of its answer.
///
/// # Errors
/// What the node says, as text.
pub async fn ask(edge: &EdgeNode, asked: Asked) -> Result<Answer, String> {
    ask_watched(edge, asked, |_| {}).await
}

/// As [`ask`]; `saw` is told the number of tokens after each.
///
/// # Errors
/// What the node says, as text.
pub async fn ask_watched(edge: &EdgeNode, asked: Asked, saw: impl Fn(usize)) -> Result<Answer, String> {
    let begun = Instant::now();
    let mut generation = edge
        .submit(GenerateRequest {
            request_id: "lab".into(),
            prompt: asked.prompt,
            mode: asked.mode,
            sampling: asked.sampling,
            tokens_max: asked.tokens_max,
            threshold: asked.threshold,
            top_logprobs: 0,
            grammar: None,
        })
        .map_err(|e| e.to_string())?;
    let mut answer = Answer::default();
    while let Some(event) = generation.events.recv().await {
        match event {
            Event::Token(token) => {
                if token.index as usize != answer.tokens.len() {
                    return Err(format!("token {} came after {} tokens", token.index, answer.tokens.len()));
                }
                if answer.tokens.is_empty() {
                    answer.first_token_s = begun.elapsed().as_secs_f64();
                }
                answer.tokens.push(token.id);
                saw(answer.tokens.len());
            }
            Event::Done(done) => {
                answer.route = done.route;
                answer.seconds = begun.elapsed().as_secs_f64();
                return Ok(answer);
            }
            Event::Failed(e) => return Err(e.to_string()),
        }
    }
    Err("the answer has no end".into())
}

/// Prompt tokens of a question on this node.
pub(crate) fn prompt(edge: &EdgeNode, row: &Row) -> Result<Vec<u32>, LabError> {
    let text = edge.chat_template().render(&row.conversation(), true, 0)?;
    Ok(edge.tokenizer().encode(&text)?)
}

/// Answers of one mode, in the order of the prompts.
async fn answers(
    edge: &EdgeNode,
    prompts: &[Vec<u32>],
    mode: Mode,
    options: &EvalOptions,
    progress: &Progress,
) -> Result<Vec<Answer>, LabError> {
    let mut running = JoinSet::new();
    let mut out = vec![Answer::default(); prompts.len()];
    let mut next = 0;
    while next < prompts.len() || !running.is_empty() {
        while next < prompts.len() && running.len() < options.at_once.max(1) {
            let asked = Asked { tokens_max: options.answer_tokens, ..Asked::greedy(prompts[next].clone(), mode) };
            let (edge, at) = (edge.clone(), next);
            running.spawn(async move { (at, ask(&edge, asked).await) });
            next += 1;
        }
        if let Some(ended) = running.join_next().await {
            let failed = |prompt, problem| LabError::Answer { prompt, mode: mode.name(), problem };
            let (at, answer) = ended.map_err(|e| failed(next, e.to_string()))?;
            out[at] = answer.map_err(|problem| failed(at, problem))?;
            progress.advance(1);
        }
    }
    Ok(out)
}

/// Evaluates all modes on one split.
pub(super) async fn split(
    cluster: &Cluster,
    name: &str,
    (rows, data): (&[Row], &DataReport),
    options: &EvalOptions,
) -> Result<SplitReport, LabError> {
    let edge = &cluster.edge;
    let prompts = rows.iter().map(|row| prompt(edge, row)).collect::<Result<Vec<_>, _>>()?;
    let context = cluster.edge_card.context_tokens.min(cluster.cloud_card.context_tokens) as usize;
    check_room(rows, &prompts, options.answer_tokens, context)?;
    let measure = Measure::of(rows);
    let progress = Progress::new(name, (rows.len() * options.modes.len()) as u64);
    let mut of_modes: Vec<(Mode, Vec<Answer>)> = Vec::new();
    for &mode in &options.modes {
        of_modes.push((mode, answers(edge, &prompts, mode, options, &progress).await?));
    }
    progress.finish();
    let of_mode = |wanted| of_modes.iter().find(|(mode, _)| *mode == wanted).map(|(_, answers)| answers);
    let cloud = of_mode(Mode::Cloud);
    let equal = |at: usize, answer: &Answer| cloud.is_some_and(|cloud| cloud[at].tokens == answer.tokens);
    let mut modes = Vec::new();
    for (mode, answers) in &of_modes {
        let mut scores = Vec::with_capacity(rows.len());
        for (at, (row, answer)) in rows.iter().zip(answers).enumerate() {
            let reply = edge.tokenizer().decode(&answer.tokens)?;
            // A command may take its time.
            scores.push(tokio::task::block_in_place(|| measure.score(row, &reply, equal(at, answer)))?);
        }
        modes.push(report(*mode, rows, answers, &scores, options.at_once <= 1));
    }
    let mut report = SplitReport {
        split: name.to_owned(),
        data: data.clone(),
        measure,
        prompts: rows.len(),
        modes,
        recovered: None,
        exact_equals_cloud: None,
        baselines: Vec::new(),
        curves: Vec::new(),
    };
    let match_of = |mode| report.total(mode).map(|t| t.exact_match);
    if let (Some(local), Some(auto), Some(cloud)) = (match_of(Mode::Local), match_of(Mode::Auto), match_of(Mode::Cloud))
    {
        report.recovered = (cloud > local).then(|| (auto - local) / (cloud - local));
    }
    if let (Some(exact), Some(_)) = (of_mode(Mode::Exact), cloud) {
        let equal = exact.iter().enumerate().filter(|(at, answer)| equal(*at, answer)).count();
        report.exact_equals_cloud = Some(equal as f64 / rows.len().max(1) as f64);
    }
    Ok(report)
}

fn report(mode: Mode, rows: &[Row], answers: &[Answer], scores: &[f64], one_by_one: bool) -> ModeReport {
    let mut members: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (at, row) in rows.iter().enumerate() {
        members.entry(row.category.as_str()).or_default().push(at);
    }
    let all: Vec<usize> = (0..rows.len()).collect();
    let groups = std::iter::once((TOTAL, &all)).chain(members.iter().map(|(c, m)| (*c, m)));
    let categories =
        groups.map(|(category, members)| category_report(category, members, answers, scores, one_by_one)).collect();
    ModeReport { mode, degraded: answers.iter().filter(|a| a.route.degraded).count(), categories }
}

fn category_report(
    category: &str,
    members: &[usize],
    answers: &[Answer],
    scores: &[f64],
    one_by_one: bool,
) -> CategoryReport {
    let n = members.len().max(1) as f64;
    let hits: Vec<f64> = members.iter().map(|&i| scores[i]).collect();
    let sum = |of: &dyn Fn(&Answer) -> f64| members.iter().map(|&i| of(&answers[i])).sum::<f64>();
    let tokens = sum(&|a| a.tokens.len() as f64);
    let written = sum(&|a| f64::from(a.route.cloud_tokens));
    let judged = sum(&|a| f64::from(a.route.accepted));
    let mut speeds: Vec<f64> = members.iter().map(|&i| answers[i].tokens_per_s()).collect();
    CategoryReport {
        category: category.to_owned(),
        prompts: members.len(),
        exact_match: hits.iter().sum::<f64>() / n,
        interval: Interval::of_mean(&hits),
        cloud_share: (written + judged) / tokens.max(1.0),
        written_by_cloud: written / tokens.max(1.0),
        round_trips: sum(&|a| f64::from(a.route.round_trips)) / n,
        bytes_up: sum(&|a| a.route.bytes_up as f64) / n,
        bytes_down: sum(&|a| a.route.bytes_down as f64) / n,
        tokens: tokens / n,
        tokens_per_s: if one_by_one { median(&mut speeds) } else { 0.0 },
    }
}

/// The middle value; 0 of none.
pub(crate) fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}
