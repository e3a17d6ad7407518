//! How fast each mode is over links of different length, and what the exchanges between edge and
//! cloud save: overlapped drafting, the trunk's hidden states, the prompt's state, the pulled trunk.
//! Two real nodes over QUIC; the link's length comes from a UDP proxy between them.

mod table;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tandem_edge_node::pacing::ExactStrategy;
use tandem_edge_node::request::Mode;
use tandem_engine::chat::Message;
use tandem_router::exchange::Exchange;
use tandem_transport::Faults;

use crate::cluster::{Cluster, ClusterOptions};
use crate::error::LabError;
use crate::eval::{Answer, Asked, SPLITS, ask, closed_prompt, median};
use crate::pair::PairReport;
use crate::policy_report::PolicyReport;
use crate::progress::Progress;
use crate::questions::{DataReport, ReadOptions, read};
use crate::rows::{Row, reference_subset};
use crate::score::ScorerName;

/// Answers before the measured ones: the nodes learn the link and their own speed.
const WARM_UP: usize = 3;
/// Tokens of the long prompt, about.
const LONG_PROMPT_TOKENS: usize = 700;
/// Tokens of an answer to the long prompt.
const LONG_ANSWER_TOKENS: usize = 32;
/// After this many tokens the link gets slow in the measurement of the pulled trunk,
const PULL_AFTER_TOKENS: usize = 4;
/// at least this slow, so that the edge stops drafting.
const PULL_RTT_MS: u64 = 100;

/// What to measure.
#[derive(Clone, Debug)]
pub struct LinkOptions {
    /// A file of questions, or the folder with the splits.
    pub data: PathBuf,
    /// Round-trip times, milliseconds; 0 is the bare loopback and must be among them.
    pub rtts_ms: Vec<u64>,
    /// Answers per measurement.
    pub answers: usize,
}

impl Default for LinkOptions {
    fn default() -> Self {
        Self { data: PathBuf::from("models/data"), rtts_ms: vec![0, 50], answers: 12 }
    }
}

/// A mode, and for `exact` how its answers are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Way {
    /// The mode.
    pub mode: Mode,
    /// The strategy of `exact`.
    pub strategy: ExactStrategy,
}

/// Every way that is measured.
pub const WAYS: [Way; 7] = {
    const fn way(mode: Mode, strategy: ExactStrategy) -> Way {
        Way { mode, strategy }
    }
    [
        way(Mode::Local, ExactStrategy::Auto),
        way(Mode::Auto, ExactStrategy::Auto),
        way(Mode::Cloud, ExactStrategy::Auto),
        way(Mode::Exact, ExactStrategy::Auto),
        way(Mode::Exact, ExactStrategy::Draft),
        way(Mode::Exact, ExactStrategy::Synchronous),
        way(Mode::Exact, ExactStrategy::Stream),
    ]
};

impl Way {
    /// Name in tables.
    #[must_use]
    pub fn name(&self) -> String {
        match (self.mode, self.strategy) {
            (Mode::Exact, strategy) => format!("exact ({})", format!("{strategy:?}").to_lowercase()),
            (mode, _) => mode.name().to_owned(),
        }
    }
}

/// One way over one link.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SpeedRow {
    /// The way.
    pub way: Way,
    /// Round-trip time added, milliseconds.
    pub rtt_ms: u64,
    /// Tokens per second over whole answers, median.
    pub tokens_per_s: f64,
    /// Time to the first token, milliseconds, median.
    pub first_token_ms: f64,
    /// Sum over the answers, seconds.
    pub seconds: f64,
    /// Tokens of the answers.
    pub tokens: usize,
    /// Verdicts and spans per answer.
    pub round_trips: f64,
    /// Bytes up and down per answer.
    pub bytes: [f64; 2],
    /// Drafts thrown away per answer.
    pub rolled_back: f64,
    /// Share of the time of all round trips that answers did not wait for, 0 … 1; none on the
    /// loopback and for ways without round trips.
    pub hidden_share: Option<f64>,
    /// True if every answer equals the `cloud` answer; none where it need not.
    pub equals_cloud: Option<bool>,
}

/// An exchange, switched on or off.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExchangeRow {
    /// Which.
    pub exchange: String,
    /// On or off.
    pub on: bool,
    /// Round-trip time added, milliseconds.
    pub rtt_ms: u64,
    /// Tokens per second, median.
    pub tokens_per_s: f64,
    /// Time to the first token, milliseconds, median.
    pub first_token_ms: f64,
    /// Bytes up and down per answer.
    pub bytes: [f64; 2],
    /// Rows that the cloud fed per answer.
    pub cloud_rows: f64,
    /// Time the cloud's model worked per answer, milliseconds.
    pub cloud_ms: f64,
    /// True if the answers are those of the other setting.
    pub same_text: bool,
}

/// A link experiment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinkReport {
    /// The models.
    pub pair: PairReport,
    /// The rule that decides in `auto`.
    pub policy: PolicyReport,
    /// The file that the prompts come from.
    pub data: DataReport,
    /// Threads of each model.
    pub threads: usize,
    /// Answers per measurement.
    pub answers: usize,
    /// Ways over links.
    pub speeds: Vec<SpeedRow>,
    /// Exchanges on and off; none for a pair that runs without a trunk.
    pub exchanges: Vec<ExchangeRow>,
    /// Tokens of the long prompt.
    pub long_prompt_tokens: usize,
}

/// What a measurement saw.
struct Seen {
    answers: Vec<Answer>,
    cloud_rows: u64,
    cloud_us: u64,
}

impl Seen {
    fn mean(&self, of: impl Fn(&Answer) -> f64) -> f64 {
        self.answers.iter().map(of).sum::<f64>() / self.answers.len().max(1) as f64
    }

    fn bytes(&self) -> [f64; 2] {
        [self.mean(|a| a.route.bytes_up as f64), self.mean(|a| a.route.bytes_down as f64)]
    }

    fn median(&self, of: impl Fn(&Answer) -> f64) -> f64 {
        median(&mut self.answers.iter().map(of).collect::<Vec<_>>())
    }

    fn tokens(&self) -> Vec<&[u32]> {
        self.answers.iter().map(|a| a.tokens.as_slice()).collect()
    }
}

struct Bench<'a> {
    options: &'a LinkOptions,
    nodes: &'a ClusterOptions,
    pair: OnceLock<PairReport>,
    rows: Vec<Row>,
    progress: Progress,
}

/// Runs the experiment on nodes like `nodes`, whose policy decides in `auto`.
///
/// # Errors
/// Data that cannot be read, nodes that do not start, a rule fitted for other models, an answer that fails.
pub async fn measure(options: &LinkOptions, nodes: &ClusterOptions) -> Result<LinkReport, LabError> {
    if !options.rtts_ms.contains(&0) || options.answers == 0 {
        return Err(LabError::Empty(
            "the round-trip times need a 0 to compare with, and answers must be at least 1".into(),
        ));
    }
    let file = match options.data.is_dir() {
        true => options.data.join(format!("{}.jsonl", SPLITS[0])),
        false => options.data.clone(),
    };
    // Nothing is scored here, so no row needs a scorer.
    let (rows, data) = read(&file, &ReadOptions { scorer: Some(ScorerName::Exact), ..ReadOptions::default() })?;
    let rows = reference_subset(rows, options.answers + WARM_UP);
    let policy = PolicyReport::of(&*nodes.policy.build(nodes.policy_file.as_ref())?);
    let steps = options.rtts_ms.len() * (WAYS.len() + 8);
    let pair = OnceLock::new();
    let bench = Bench { options, nodes, pair, rows, progress: Progress::new("links", steps as u64) };
    let mut speeds = Vec::new();
    let mut rtts = options.rtts_ms.clone();
    rtts.sort_unstable();
    rtts.dedup();
    for &rtt_ms in &rtts {
        let rows = bench.speeds(rtt_ms, &speeds).await?;
        speeds.extend(rows);
    }
    let mut exchanges = Vec::new();
    let mut long_prompt_tokens = 0;
    // Without a trunk there is nothing to exchange.
    let shared = bench.pair.get().map_or(0, |pair| pair.shared_layers);
    let trunk = shared > 0 && ![nodes.edge.trunk_layers, nodes.cloud.trunk_layers].contains(&Some(0));
    for &rtt_ms in rtts.iter().filter(|_| trunk) {
        exchanges.extend(bench.hidden(rtt_ms).await?);
        let (rows, tokens) = bench.fetch(rtt_ms).await?;
        exchanges.extend(rows);
        long_prompt_tokens = tokens;
    }
    if trunk {
        exchanges.extend(bench.pull(rtts.last().copied().unwrap_or(0).max(PULL_RTT_MS)).await?);
    }
    bench.progress.finish();
    let pair = bench.pair.into_inner().ok_or_else(|| LabError::Empty("no nodes were started".into()))?;
    Ok(LinkReport {
        pair,
        policy,
        data,
        threads: nodes.threads,
        answers: options.answers,
        speeds,
        exchanges,
        long_prompt_tokens,
    })
}

impl Bench<'_> {
    /// Every answer stands for a conversation of its own: nothing is kept of the prompts, which begin alike.
    fn nodes(&self, rtt_ms: u64) -> ClusterOptions {
        let mut options = ClusterOptions {
            link: (rtt_ms > 0).then(|| Faults::rtt(Duration::from_millis(rtt_ms))),
            ..self.nodes.clone()
        };
        options.edge.prefix_cache_mib_max = 0;
        options.cloud.bounds.prefix_cache_mib_max = 0;
        options
    }

    /// Starts nodes, and notes which models they run.
    async fn start(&self, options: ClusterOptions) -> Result<Cluster, LabError> {
        let policy = options.policy.build(options.policy_file.as_ref())?;
        let cluster = Cluster::start(options).await?;
        if let Some(file) = policy.file() {
            file.check_pair(&cluster.edge_card.digest, &cluster.cloud_card.digest)?;
        }
        self.pair.get_or_init(|| PairReport::of(&cluster.edge_card, &cluster.cloud_card));
        Ok(cluster)
    }

    /// Answers one after the other; the first [`WARM_UP`] are not counted.
    async fn answers(
        &self,
        cluster: &Cluster,
        mode: Mode,
        prompts: &[Vec<u32>],
        tokens_max: usize,
    ) -> Result<Seen, LabError> {
        let mut answers = Vec::new();
        let mut before = cluster.cloud.load();
        for (at, prompt) in prompts.iter().enumerate() {
            if at == WARM_UP {
                before = cluster.cloud.load();
            }
            let asked = Asked { tokens_max, ..Asked::greedy(prompt.clone(), mode) };
            let failed = |problem| LabError::Answer { prompt: at, mode: mode.name(), problem };
            answers.push(ask(&cluster.edge, asked).await.map_err(failed)?);
        }
        let after = cluster.cloud.load();
        self.progress.advance(1);
        Ok(Seen {
            answers: answers.split_off(WARM_UP.min(answers.len())),
            cloud_rows: after.rows - before.rows,
            cloud_us: after.busy_us - before.busy_us,
        })
    }

    fn questions(&self, cluster: &Cluster) -> Result<Vec<Vec<u32>>, LabError> {
        self.rows.iter().map(|r| closed_prompt(&cluster.edge, r)).collect()
    }

    async fn speeds(&self, rtt_ms: u64, nearer: &[SpeedRow]) -> Result<Vec<SpeedRow>, LabError> {
        let mut out: Vec<SpeedRow> = Vec::new();
        let mut cloud: Vec<Vec<u32>> = Vec::new();
        for way in WAYS {
            let mut options = self.nodes(rtt_ms);
            options.edge.exact = way.strategy;
            let cluster = self.start(options).await?;
            let prompts = self.questions(&cluster)?;
            let seen = self.answers(&cluster, way.mode, &prompts, crate::explore::ANSWER_TOKENS_MAX).await?;
            if way.mode == Mode::Cloud {
                cloud = seen.answers.iter().map(|a| a.tokens.clone()).collect();
            }
            let seconds: f64 = seen.answers.iter().map(|a| a.seconds).sum();
            let trips: f64 = seen.answers.iter().map(|a| f64::from(a.route.round_trips)).sum();
            let near = nearer.iter().find(|r| r.rtt_ms == 0 && r.way == way);
            let waited = trips * rtt_ms as f64 / 1000.0;
            // `exact` by itself may stream on one link and draft on another: no difference to speak of.
            let drafts = match way.mode {
                Mode::Auto => true,
                Mode::Exact => matches!(way.strategy, ExactStrategy::Draft | ExactStrategy::Synchronous),
                Mode::Local | Mode::Cloud => false,
            };
            out.push(SpeedRow {
                way,
                rtt_ms,
                tokens_per_s: seen.median(Answer::tokens_per_s),
                first_token_ms: 1000.0 * seen.median(|a| a.first_token_s),
                seconds,
                tokens: seen.answers.iter().map(|a| a.tokens.len()).sum(),
                round_trips: trips / seen.answers.len().max(1) as f64,
                bytes: seen.bytes(),
                rolled_back: seen.mean(|a| f64::from(a.route.rolled_back)),
                hidden_share: near
                    .filter(|_| drafts && waited > 0.0)
                    .map(|n| (1.0 - (seconds - n.seconds) / waited).clamp(0.0, 1.0)),
                equals_cloud: (way.mode == Mode::Exact).then(|| seen.tokens() == cloud),
            });
        }
        Ok(out)
    }

    /// The trunk's hidden states with every frame, or the cloud runs the trunk itself.
    async fn hidden(&self, rtt_ms: u64) -> Result<Vec<ExchangeRow>, LabError> {
        let mut seen = Vec::new();
        for setting in [Exchange::Always, Exchange::Never] {
            let mut options = self.nodes(rtt_ms);
            options.edge.send_hidden = setting;
            options.edge.exact = ExactStrategy::Draft;
            let cluster = self.start(options).await?;
            let prompts = self.questions(&cluster)?;
            seen.push(self.answers(&cluster, Mode::Exact, &prompts, crate::explore::ANSWER_TOKENS_MAX).await?);
        }
        Ok(exchange_rows("hidden states with drafts", rtt_ms, &seen))
    }

    /// The prompt's state from the cloud, or computed on the edge.
    async fn fetch(&self, rtt_ms: u64) -> Result<(Vec<ExchangeRow>, usize), LabError> {
        let (mut seen, mut tokens) = (Vec::new(), 0);
        for setting in [Exchange::Always, Exchange::Never] {
            let mut options = self.nodes(rtt_ms);
            options.edge.fetch_prompt = setting;
            options.edge.exact = ExactStrategy::Draft;
            let cluster = self.start(options).await?;
            let prompts = self.long_prompts(&cluster)?;
            tokens = prompts.first().map_or(0, Vec::len);
            seen.push(self.answers(&cluster, Mode::Exact, &prompts, LONG_ANSWER_TOKENS).await?);
        }
        Ok((exchange_rows("state of a long prompt from the cloud", rtt_ms, &seen), tokens))
    }

    /// The trunk's state from the edge when the cloud has to go on alone, or computed there: the
    /// link gets slow in the middle of an answer, so that drafting no longer pays.
    async fn pull(&self, rtt_ms: u64) -> Result<Vec<ExchangeRow>, LabError> {
        let mut seen = Vec::new();
        for setting in [Exchange::Always, Exchange::Never] {
            let mut options = self.nodes(rtt_ms);
            options.link = Some(Faults::default());
            options.edge.send_hidden = Exchange::Always;
            options.cloud.pull_trunk = setting;
            let cluster = self.start(options).await?;
            let prompts = self.long_prompts(&cluster)?;
            let mut all = Seen { answers: Vec::new(), cloud_rows: 0, cloud_us: 0 };
            for prompt in &prompts {
                let proxy = cluster.proxy.clone();
                let slow_down = move |tokens: usize| {
                    if let Some(proxy) = proxy.as_ref().filter(|_| tokens == PULL_AFTER_TOKENS) {
                        proxy.set(Faults::rtt(Duration::from_millis(rtt_ms)));
                    }
                };
                let before = cluster.cloud.load();
                let asked = Asked { tokens_max: LONG_ANSWER_TOKENS, ..Asked::greedy(prompt.clone(), Mode::Exact) };
                let failed = |problem| LabError::Answer { prompt: 0, mode: "exact", problem };
                let answer = crate::eval::ask_watched(&cluster.edge, asked, slow_down).await.map_err(failed)?;
                let after = cluster.cloud.load();
                all.answers.push(answer);
                all.cloud_rows += after.rows - before.rows;
                all.cloud_us += after.busy_us - before.busy_us;
                if let Some(proxy) = &cluster.proxy {
                    proxy.set(Faults::default());
                }
            }
            self.progress.advance(1);
            seen.push(all);
        }
        Ok(exchange_rows("trunk state pulled by the cloud", rtt_ms, &seen))
    }

    /// Conversations of about [`LONG_PROMPT_TOKENS`] tokens, all different.
    fn long_prompts(&self, cluster: &Cluster) -> Result<Vec<Vec<u32>>, LabError> {
        let answers = self.options.answers.min(5) + WARM_UP;
        (0..answers).map(|at| long_prompt(cluster, &self.rows, at)).collect()
    }
}

fn long_prompt(cluster: &Cluster, rows: &[Row], from: usize) -> Result<Vec<u32>, LabError> {
    let mut messages = Vec::new();
    let mut tokens = Vec::new();
    for turn in 0.. {
        let row = &rows[(from + turn) % rows.len()];
        messages.push(Message::new("user", row.prompt.clone()));
        let text = cluster.edge.chat_template().render(&messages, true, 0)?;
        tokens = cluster.edge.tokenizer().encode(&text)?;
        if tokens.len() >= LONG_PROMPT_TOKENS {
            break;
        }
        messages.push(Message::new("assistant", row.answer.clone()));
    }
    Ok(tokens)
}

/// Rows of one exchange; `seen` are on and off.
fn exchange_rows(exchange: &str, rtt_ms: u64, seen: &[Seen]) -> Vec<ExchangeRow> {
    let same_text = seen.windows(2).all(|w| w[0].tokens() == w[1].tokens());
    let row = |(at, seen): (usize, &Seen)| ExchangeRow {
        exchange: exchange.to_owned(),
        on: at == 0,
        rtt_ms,
        tokens_per_s: seen.median(Answer::tokens_per_s),
        first_token_ms: 1000.0 * seen.median(|a| a.first_token_s),
        bytes: seen.bytes(),
        cloud_rows: seen.cloud_rows as f64 / seen.answers.len().max(1) as f64,
        cloud_ms: seen.cloud_us as f64 / 1000.0 / seen.answers.len().max(1) as f64,
        same_text,
    };
    seen.iter().enumerate().map(row).collect()
}
