//! What the edge model says of a position: computed on the engine's thread, read by the task that gave the job.

use tandem_engine::runner::{Job, RowOutput};
use tandem_engine::uncertainty::{self, Uncertainty};
use tandem_engine::{EngineError, sampling};
use tandem_proto::message::Alternative;

/// The edge model's choice for one position.
#[derive(Clone, Debug)]
pub(crate) struct EdgeChoice {
    pub(crate) token: u32,
    pub(crate) logprob: f32,
    /// Over the tokens that the grammar leaves.
    pub(crate) uncertainty: Uncertainty,
    /// The grammar leaves this token only, so the cloud could choose no other.
    pub(crate) forced: bool,
    pub(crate) alternatives: Vec<Alternative>,
    /// Hidden state above the last layer, for policies that look at it.
    pub(crate) hidden: Vec<f32>,
}

/// Runs on the engine thread. Where the token is known (a prompt is scored), that is the choice.
pub(crate) fn choose(job: &Job, row: RowOutput<'_>) -> Result<EdgeChoice, EngineError> {
    if let Some(&next) = job.sequence.get(row.position) {
        return scored(job, &row, next);
    }
    let (allowed, before) = (job.allowed(row.position)?, job.before(row.position));
    let pick = sampling::pick(row.logits, allowed.as_ref(), &job.sampling, before, row.position as u32)?;
    let alternatives =
        if job.top_logprobs == 0 { Vec::new() } else { sampling::top_alternatives(row.logits, job.top_logprobs)? };
    Ok(EdgeChoice {
        token: pick.token,
        logprob: pick.logprob,
        uncertainty: match &allowed {
            Some(mask) => uncertainty::measure_allowed(row.logits, mask)?,
            None => uncertainty::measure(row.logits)?,
        },
        forced: allowed.is_some_and(|mask| mask.sole().is_some()),
        alternatives,
        hidden: row.hidden.to_vec(),
    })
}

/// The choice that a prompt has made already.
fn scored(job: &Job, row: &RowOutput<'_>, token: u32) -> Result<EdgeChoice, EngineError> {
    Ok(EdgeChoice {
        token,
        logprob: sampling::logprob(row.logits, token)?,
        uncertainty: uncertainty::measure(row.logits)?,
        forced: true,
        alternatives: sampling::top_alternatives(row.logits, job.top_logprobs)?,
        hidden: Vec::new(),
    })
}
