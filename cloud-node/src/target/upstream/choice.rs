//! The choice at a position from what an engine returned of its distribution, and what to ask for.

use tandem_engine::sampling::Before;
use tandem_engine::sampling::sparse::{self, SparseChoice, SparseRow};
use tandem_proto::message::SamplingParams;
use tandem_proto::session::Decided;
use tandem_upstream::{Abilities, Row};

use super::super::{Job, TargetError};
use super::{DRAWN_AHEAD_MAX, GREEDY_AHEAD_MAX};

/// Likeliest tokens asked for where the choice is the likeliest one: a tie shows.
const GREEDY_TOP: usize = 4;

/// Likeliest tokens asked for where a mask forbids some, or penalties move them.
const MASKED_TOP: usize = 64;

/// Likeliest tokens asked for where the choice is drawn. llama-server writes 1024 in 5 ms, the 49 152 of a small
/// vocabulary in 250; with 1024, nine in ten draws at temperature 1 are decided.
const DRAWN_TOP: usize = 1024;

/// How many times more are asked for where those do not decide.
const MORE: usize = 8;

/// What is asked of an engine for one position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Asked {
    /// Likeliest tokens.
    pub(super) top: usize,
    /// This position and none after it.
    alone: bool,
}

/// True where the likeliest token is the choice.
fn is_plain(p: &SamplingParams) -> bool {
    p.temperature == 0.0
        && p.logit_bias.is_empty()
        && p.repetition_penalty == 1.0
        && p.presence_penalty == 0.0
        && p.frequency_penalty == 0.0
}

impl Asked {
    /// What a job's positions are asked for with at first.
    pub(super) fn first(job: &Job, abilities: &Abilities) -> Self {
        let p = &job.sampling;
        // With top-k, the tokens up to the first that is out of the running decide.
        let drawn = if p.top_k > 0 { (p.top_k as usize + 1).clamp(MASKED_TOP, DRAWN_TOP) } else { DRAWN_TOP };
        let wanted = match (p.temperature > 0.0, is_plain(p) && job.constraint.is_none()) {
            (true, _) => drawn,
            (false, true) => GREEDY_TOP,
            (false, false) => MASKED_TOP,
        };
        let top = wanted.max(job.top_logprobs).min(abilities.top_max);
        Self { top, alone: false }
    }

    /// What to ask for where that did not decide; none if the engine returns no more. With a whole
    /// distribution every position is decided.
    pub(super) fn more(self, abilities: &Abilities) -> Option<Self> {
        let top = self.top.saturating_mul(MORE).min(abilities.top_max);
        (top > self.top).then_some(Self { top, alone: true })
    }

    /// Asks for one position, which an engine that left it out on its way may return; none if it was asked for
    /// alone already.
    pub(super) fn alone(self) -> Option<Self> {
        (!self.alone).then_some(Self { alone: true, ..self })
    }

    /// Whether one position is asked for.
    pub(super) fn is_alone(&self) -> bool {
        self.alone
    }

    /// How far the engine may run ahead.
    pub(super) fn ahead(&self, job: &Job, abilities: &Abilities) -> usize {
        let most = if is_plain(&job.sampling) && job.constraint.is_none() { GREEDY_AHEAD_MAX } else { DRAWN_AHEAD_MAX };
        let room = abilities.context_tokens.saturating_sub(job.tokens.len() + 1);
        job.ahead.min(most).min(room)
    }
}

/// What a row says at a position.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Choice {
    /// The choice.
    Made(Decided),
    /// It does not decide: more of the distribution must be known.
    NeedsMore,
}

/// Chooses the token at `position` of the job's sequence from `row`.
pub(super) fn choose(
    job: &Job,
    position: usize,
    row: &Row,
    vocabulary: usize,
    head_rows: usize,
) -> Result<Choice, TargetError> {
    let failed = |e: tandem_engine::EngineError| TargetError::Failed(e.to_string());
    let row = SparseRow::new(&row.top, &row.named, vocabulary, head_rows).map_err(failed)?;
    let prompt_len = job.prompt_len.min(position);
    let (prompt, answer) = job.tokens[..position].split_at(prompt_len);
    let mask = job.constraint.as_ref().map(|followed| followed.allowed(answer)).transpose();
    let mask = mask.map_err(|e| TargetError::Failed(e.to_string()))?;
    let before = Before { prompt, answer };
    let at = u32::try_from(position).unwrap_or(u32::MAX);
    Ok(match sparse::choose(&row, mask.as_ref(), &job.sampling, before, at).map_err(failed)? {
        SparseChoice::Chosen(pick) => Choice::Made(Decided {
            id: pick.token,
            logprob: pick.logprob,
            alternatives: row.top_alternatives(job.top_logprobs),
        }),
        SparseChoice::NeedMore { .. } => Choice::NeedsMore,
    })
}
