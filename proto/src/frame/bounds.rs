//! Bounds of every variable-length field, checked on the archive before it is copied out.

use super::FrameError;
use crate::{
    limits::{
        DRAFT_TOKENS_MAX, GRAMMAR_BYTES_MAX, KV_OFFER_BLOCKS_MAX, LAYERS_MAX, LOGIT_BIAS_MAX, MODELS_MAX,
        NAME_BYTES_MAX, SESSION_TOKENS_MAX, STOP_TOKENS_MAX, TEXT_BYTES_MAX, TOKENIZER_MARKS_MAX, TOP_LOGPROBS_MAX,
    },
    message::{
        ArchivedClose, ArchivedDraft, ArchivedEnd, ArchivedGenerate, ArchivedHello, ArchivedKvAck, ArchivedKvBlock,
        ArchivedKvOffer, ArchivedKvPull, ArchivedKvWant, ArchivedOpen, ArchivedOpened, ArchivedProgress,
        ArchivedRefuse, ArchivedToken, ArchivedVerdict,
    },
};

type Checked = Result<(), FrameError>;

/// An archived message whose lengths can be checked.
pub(super) trait Bounded {
    /// Typed error for the first field past its bound.
    fn check(&self) -> Checked {
        Ok(())
    }
}

fn at_most(field: &'static str, value: usize, max: usize) -> Checked {
    if value > max {
        return Err(FrameError::LimitExceeded { field, value, max });
    }
    Ok(())
}

impl Bounded for ArchivedHello {
    fn check(&self) -> Checked {
        at_most("Hello.node", self.node.len(), NAME_BYTES_MAX)?;
        at_most("Hello.models", self.models.len(), MODELS_MAX)?;
        self.models.iter().try_for_each(|model| {
            at_most("Hello.models.name", model.name.len(), NAME_BYTES_MAX)?;
            at_most("Hello.models.numerics", model.numerics.len(), NAME_BYTES_MAX)?;
            at_most("Hello.models.tokenizer_marks", model.tokenizer_marks.len(), TOKENIZER_MARKS_MAX)?;
            // Entry 0 is the embedding alone, hence one more than layers.
            at_most("Hello.models.layers", model.layers.len(), LAYERS_MAX + 1)
        })
    }
}

impl Bounded for ArchivedOpen {
    fn check(&self) -> Checked {
        at_most("Open.model", self.model.len(), NAME_BYTES_MAX)?;
        at_most("Open.request_id", self.request_id.len(), NAME_BYTES_MAX)?;
        at_most("Open.stop_tokens", self.stop_tokens.len(), STOP_TOKENS_MAX)?;
        at_most("Open.sampling.logit_bias", self.sampling.logit_bias.len(), LOGIT_BIAS_MAX)?;
        at_most("Open.top_logprobs", self.top_logprobs.to_native() as usize, TOP_LOGPROBS_MAX)?;
        if let Some(grammar) = self.grammar.as_ref() {
            at_most("Open.grammar", grammar.text.len(), GRAMMAR_BYTES_MAX)?;
        }
        let prompt = self.prompt_tokens.to_native() as usize;
        let tokens = prompt.saturating_add(self.committed_tokens.to_native() as usize);
        at_most("Open.prompt_tokens + committed_tokens", tokens, SESSION_TOKENS_MAX)
    }
}

impl Bounded for ArchivedDraft {
    fn check(&self) -> Checked {
        at_most("Draft.tokens", self.tokens.len(), DRAFT_TOKENS_MAX)
    }
}

impl Bounded for ArchivedGenerate {
    fn check(&self) -> Checked {
        at_most("Generate.tail", self.tail.len(), DRAFT_TOKENS_MAX)
    }
}

impl Bounded for ArchivedVerdict {
    fn check(&self) -> Checked {
        // One more than drafts: the correction or bonus token.
        at_most("Verdict.logprobs", self.logprobs.len(), DRAFT_TOKENS_MAX + 1)?;
        at_most("Verdict.alternatives", self.alternatives.len(), DRAFT_TOKENS_MAX + 1)?;
        self.alternatives.iter().try_for_each(|at| at_most("Verdict.alternatives[i]", at.len(), TOP_LOGPROBS_MAX))
    }
}

impl Bounded for ArchivedToken {
    fn check(&self) -> Checked {
        at_most("Token.alternatives", self.alternatives.len(), TOP_LOGPROBS_MAX)
    }
}

impl Bounded for ArchivedRefuse {
    fn check(&self) -> Checked {
        at_most("Refuse.message", self.message.len(), TEXT_BYTES_MAX)
    }
}

impl Bounded for ArchivedKvOffer {
    fn check(&self) -> Checked {
        at_most("KvOffer.ids", self.ids.len(), KV_OFFER_BLOCKS_MAX)
    }
}

impl Bounded for ArchivedKvWant {
    fn check(&self) -> Checked {
        at_most("KvWant.indices", self.indices.len(), KV_OFFER_BLOCKS_MAX)
    }
}

// Fixed size: the archive's own validation bounds them.
impl Bounded for ArchivedOpened {}
impl Bounded for ArchivedEnd {}
impl Bounded for ArchivedClose {}
impl Bounded for ArchivedProgress {}
impl Bounded for ArchivedKvPull {}
impl Bounded for ArchivedKvBlock {}
impl Bounded for ArchivedKvAck {}
