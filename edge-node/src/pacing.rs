//! How far to draft ahead and how to cut drafts into frames. Pure: times in, a plan out.
//!
//! Model (per token, seconds): with α the chance that the cloud accepts a draft, t_d an edge step,
//! t_v a verification and R the round trip, drafting that goes on while verdicts are in flight takes
//! `t_d + (1 − α)(R + t_v)`, for only a rejection makes the edge wait. Streaming from the cloud takes
//! its own decode step t_ar whatever R is. Drafting with a stop at every chunk of k takes
//! `(k·t_d + R + t_v) / (1 + Σ α^j)` (Leviathan et al., arXiv:2211.17192, with a round trip).

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};

/// What is known of the link and the models.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Conditions {
    /// Round-trip time, seconds.
    pub rtt_s: f64,
    /// One edge step, seconds.
    pub draft_s: f64,
    /// One verification pass, seconds, queueing included.
    pub verify_s: f64,
    /// One decode step of the cloud, seconds.
    pub decode_s: f64,
    /// Chance that a draft is accepted, 0 … 1.
    pub acceptance: f64,
}

/// How to write the next stretch of an `exact` answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plan {
    /// Draft in frames of `chunk` tokens, at most `window` tokens ahead of the verdicts.
    Draft {
        /// Tokens of a frame.
        chunk: usize,
        /// Tokens ahead of the last verdict.
        window: usize,
    },
    /// Let the cloud decode; the edge would only slow it down.
    Stream,
}

/// Operator's choice for `exact`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, Default, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ExactStrategy {
    /// Whatever the conditions favour.
    #[default]
    Auto,
    /// Always draft ahead.
    Draft,
    /// Always stream from the cloud.
    Stream,
    /// Draft, but wait for each verdict: the baseline of the link experiments, which no setting names.
    #[schemars(skip)]
    Synchronous,
    /// Draft the first [`HANDOVER_TOKENS`] tokens, then stream: for experiments with the transfer of KV
    /// state, which no setting names.
    #[schemars(skip)]
    Handover,
}

impl ExactStrategy {
    /// The strategy that a setting names.
    ///
    /// # Errors
    /// It is an experiment's, or unknown.
    pub fn of_setting<'de, D: Deserializer<'de>>(setting: D) -> Result<Self, D::Error> {
        match Self::deserialize(setting)? {
            Self::Synchronous | Self::Handover => Err(D::Error::custom("expected `auto`, `draft` or `stream`")),
            strategy => Ok(strategy),
        }
    }
}

/// Tokens that [`ExactStrategy::Handover`] drafts.
pub const HANDOVER_TOKENS: usize = 6;
/// Largest frame of drafts, tokens.
pub const CHUNK_MAX: usize = 16;
/// Furthest the edge drafts ahead, tokens.
pub const WINDOW_MAX: usize = 256;
/// Streaming must be this much faster before the edge stops drafting: the estimates are rough and
/// drafting saves cloud passes.
const STREAM_MARGIN: f64 = 0.8;

/// Seconds per token when drafting goes on during verification.
#[must_use]
pub fn pipelined_s(c: &Conditions) -> f64 {
    c.draft_s.max(c.verify_s / CHUNK_MAX as f64) + (1.0 - c.acceptance) * (c.rtt_s + c.verify_s)
}

/// Seconds per token when every chunk of `k` waits for its verdict.
#[must_use]
pub fn synchronous_s(c: &Conditions, k: usize) -> f64 {
    let expected: f64 = 1.0 + (1..=k as i32).map(|j| c.acceptance.powi(j)).sum::<f64>();
    (k as f64 * c.draft_s + c.rtt_s + c.verify_s) / expected
}

/// Chooses the plan for an answer of which `written` tokens are final.
#[must_use]
pub fn plan(c: &Conditions, strategy: ExactStrategy, written: usize) -> Plan {
    match strategy {
        ExactStrategy::Stream => Plan::Stream,
        ExactStrategy::Handover if written >= HANDOVER_TOKENS => Plan::Stream,
        ExactStrategy::Auto if c.decode_s < STREAM_MARGIN * pipelined_s(c) => Plan::Stream,
        ExactStrategy::Auto | ExactStrategy::Draft | ExactStrategy::Handover => {
            // The cloud keeps up if a frame takes longer to draft than to verify.
            let draft = c.draft_s.max(1e-6);
            let chunk = ((c.verify_s / draft).ceil() as usize).clamp(1, CHUNK_MAX);
            let frames = ((c.rtt_s + c.verify_s) / (chunk as f64 * draft)).ceil() as usize + 1;
            // Beyond the expected run of accepted drafts more of them are waste.
            let run = (4.0 / (1.0 - c.acceptance).max(0.01)).round() as usize;
            Plan::Draft { chunk, window: (frames * chunk).min(run).clamp(chunk, WINDOW_MAX) }
        }
        ExactStrategy::Synchronous => {
            let chunk =
                (1..=CHUNK_MAX).min_by(|&a, &b| synchronous_s(c, a).total_cmp(&synchronous_s(c, b))).unwrap_or(1);
            Plan::Draft { chunk, window: chunk }
        }
    }
}

/// What must be saved on average before the cloud prefills a prompt of `auto` unasked, seconds.
const AHEAD_S_MIN: f64 = 0.1;

/// Whether the cloud is to prefill a prompt of `auto` beside the edge, before a token of it is in doubt: if
/// it is likely to be asked, and would take long then. Short prompts leave nothing on the wire for that.
#[must_use]
pub fn opens_ahead(estimates: &Estimates, prompt_tokens: usize) -> bool {
    estimates.asks * estimates.cloud_row_s() * prompt_tokens as f64 >= AHEAD_S_MIN
}

/// Running estimates of what [`Conditions`] needs, from observations.
#[derive(Clone, Copy, Debug)]
pub struct Estimates {
    draft_s: f64,
    verify_s: f64,
    decode_s: f64,
    acceptance: f64,
    prefill_row_s: f64,
    asks: f64,
}

/// Weight of a new observation.
const GAIN: f64 = 0.1;

impl Default for Estimates {
    fn default() -> Self {
        // Priors; a few observations replace them.
        Self { draft_s: 1e-3, verify_s: 2e-3, decode_s: 2e-3, acceptance: 0.85, prefill_row_s: 2e-4, asks: 0.5 }
    }
}

impl Estimates {
    fn learn(value: &mut f64, seen: f64) {
        *value += GAIN * (seen - *value);
    }

    /// An edge step took this long.
    pub fn saw_draft(&mut self, seconds: f64) {
        Self::learn(&mut self.draft_s, seconds);
    }

    /// The edge took this long for `rows` tokens of a prompt.
    pub fn saw_prefill(&mut self, seconds: f64, rows: usize) {
        Self::learn(&mut self.prefill_row_s, seconds / rows.max(1) as f64);
    }

    /// Seconds per token of a prompt on the edge.
    #[must_use]
    pub fn prefill_row_s(&self) -> f64 {
        self.prefill_row_s
    }

    /// Seconds per token of a prompt in the cloud: what is seen of its decode steps, as many rows
    /// share a pass.
    #[must_use]
    pub fn cloud_row_s(&self) -> f64 {
        self.decode_s * (self.prefill_row_s / self.draft_s).min(1.0)
    }

    /// The cloud took this long for `rows` tokens in one pass.
    pub fn saw_verify(&mut self, seconds: f64, rows: usize) {
        Self::learn(&mut self.verify_s, seconds);
        if rows <= 1 {
            Self::learn(&mut self.decode_s, seconds);
        }
    }

    /// Two tokens of a cloud stream arrived this far apart.
    pub fn saw_stream_gap(&mut self, seconds: f64) {
        Self::learn(&mut self.decode_s, seconds);
    }

    /// Of `judged` drafts `accepted` were right.
    pub fn saw_verdict(&mut self, judged: usize, accepted: usize) {
        for i in 0..judged.min(accepted + 1) {
            Self::learn(&mut self.acceptance, f64::from(u8::from(i < accepted)));
        }
    }

    /// An `auto` answer has ended; `asked` says whether it needed the cloud.
    pub fn saw_auto(&mut self, asked: bool) {
        Self::learn(&mut self.asks, f64::from(u8::from(asked)));
    }

    /// Share of accepted drafts.
    #[must_use]
    pub fn acceptance(&self) -> f64 {
        self.acceptance
    }

    /// Seconds of an edge step.
    #[must_use]
    pub fn draft_s(&self) -> f64 {
        self.draft_s
    }

    /// Conditions at a round-trip time.
    #[must_use]
    pub fn at(&self, rtt_s: f64) -> Conditions {
        Conditions {
            rtt_s,
            draft_s: self.draft_s,
            verify_s: self.verify_s,
            decode_s: self.decode_s,
            acceptance: self.acceptance,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: Conditions =
        Conditions { rtt_s: 0.0005, draft_s: 0.0005, verify_s: 0.002, decode_s: 0.002, acceptance: 0.9 };

    #[test]
    fn the_plan_follows_the_link() {
        use ExactStrategy::{Auto, Draft, Stream, Synchronous};
        let far = Conditions { rtt_s: 0.05, ..BASE };
        let slow_cloud = Conditions { rtt_s: 0.05, decode_s: 0.1, verify_s: 0.1, draft_s: 0.005, ..BASE };
        let table = [
            ("near", BASE, Auto, Plan::Draft { chunk: 4, window: 12 }),
            ("far, and the cloud is as fast as the edge", far, Auto, Plan::Stream),
            ("far, told to draft", far, Draft, Plan::Draft { chunk: 4, window: 40 }),
            ("far, and the cloud is slow", slow_cloud, Auto, Plan::Draft { chunk: 16, window: 40 }),
            ("told to stream", BASE, Stream, Plan::Stream),
            ("textbook", BASE, Synchronous, Plan::Draft { chunk: 7, window: 7 }),
        ];
        for (name, conditions, strategy, expected) in table {
            assert_eq!(plan(&conditions, strategy, 0), expected, "{name}");
        }
    }

    proptest::proptest! {
        /// What may be drafted before a verdict is enough to ask for one; else an edge that waits at
        /// its window would never ask.
        #[test]
        fn a_full_window_is_a_frame(
            rtt_s in 0.0..10.0f64,
            draft_s in 0.0..1.0f64,
            verify_s in 0.0..10.0f64,
            decode_s in 0.0..10.0f64,
            acceptance in 0.0..=1.0f64,
            written in 0..20usize,
        ) {
            use ExactStrategy::{Auto, Draft, Handover, Stream, Synchronous};
            let c = Conditions { rtt_s, draft_s, verify_s, decode_s, acceptance };
            for strategy in [Auto, Draft, Synchronous, Stream, Handover] {
                if let Plan::Draft { chunk, window } = plan(&c, strategy, written) {
                    assert!(0 < chunk && chunk <= CHUNK_MAX, "{strategy:?}: {chunk}");
                    assert!(chunk <= window && window <= WINDOW_MAX, "{strategy:?}: {chunk}, {window}");
                }
            }
        }
    }

    #[test]
    fn overlap_never_loses_to_waiting() {
        for rtt_ms in [0, 1, 5, 20, 50, 100, 200] {
            for acceptance in [0.5, 0.7, 0.9, 0.99] {
                let c = Conditions { rtt_s: f64::from(rtt_ms) / 1000.0, acceptance, ..BASE };
                let best = (1..=CHUNK_MAX).map(|k| synchronous_s(&c, k)).fold(f64::MAX, f64::min);
                assert!(pipelined_s(&c) <= best * 1.01, "{c:?}: {} vs {best}", pipelined_s(&c));
            }
        }
    }

    #[test]
    fn a_long_prompt_is_prefilled_ahead_where_the_cloud_is_likely_to_be_asked() {
        // Share of answers that asked, seconds of a decode step of the cloud, tokens of the prompt.
        let table = [
            (0.5, 2e-3, 30, false),
            (0.5, 2e-3, 400, false),
            (0.5, 2e-3, 600, true),
            (0.02, 2e-3, 2000, false),
            (1.0, 2e-3, 300, true),
            (0.5, 50e-3, 30, true),
            (0.5, 50e-3, 8, false),
            (0.0, 50e-3, 100_000, false),
        ];
        for (asks, decode_s, tokens, expected) in table {
            let e = Estimates { asks, decode_s, ..Estimates::default() };
            assert_eq!(opens_ahead(&e, tokens), expected, "{asks} {decode_s} {tokens}");
        }
        let mut e = Estimates::default();
        (0..100).for_each(|_| e.saw_auto(false));
        assert!(!opens_ahead(&e, 5000), "answers that never ask");
    }

    #[test]
    fn estimates_follow_what_is_seen() {
        let mut e = Estimates::default();
        for _ in 0..200 {
            e.saw_draft(0.01);
            e.saw_verify(0.03, 1);
            e.saw_verdict(4, 4);
        }
        let c = e.at(0.02);
        assert!((c.draft_s - 0.01).abs() < 1e-4 && (c.verify_s - 0.03).abs() < 1e-3 && c.acceptance > 0.99, "{c:?}");
        for _ in 0..200 {
            e.saw_verdict(4, 0);
        }
        assert!(e.acceptance() < 0.01);
    }

    #[test]
    fn settings_name_no_experiment() {
        let read = |text: &str| ExactStrategy::of_setting(&serde_json::Value::from(text)).ok();
        assert_eq!(read("draft"), Some(ExactStrategy::Draft));
        assert_eq!(["synchronous", "handover", "fast"].map(read), [None; 3]);
    }
}
