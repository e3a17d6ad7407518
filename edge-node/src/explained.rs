//! Why each token of the last answers stayed or went, kept within bounds of number and memory.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tandem_engine::tokenizer::Tokenizer;

use crate::request::{Mode, RouteSummary, TokenEvent};

/// Memory that kept answers take at most, bytes.
pub(crate) const EXPLAIN_BYTES_MAX: usize = 4 << 20;

/// An answer that has ended.
pub(crate) struct Answered {
    pub(crate) request_id: String,
    pub(crate) mode: Mode,
    pub(crate) prompt_tokens: usize,
    pub(crate) route: RouteSummary,
    pub(crate) took: Duration,
    pub(crate) tokens: Vec<TokenEvent>,
}

/// The last answers, the oldest first.
pub(crate) struct Explained {
    kept: VecDeque<Arc<Answered>>,
    bytes: usize,
    answers_max: usize,
}

impl Answered {
    /// Without what `explain` does not show, and without room to grow.
    fn compact(mut self) -> Self {
        for token in &mut self.tokens {
            token.alternatives = Vec::new();
        }
        self.tokens.shrink_to_fit();
        self
    }

    fn bytes(&self) -> usize {
        let reason = self.route.degraded_reason.as_ref().map_or(0, String::capacity);
        size_of::<Self>() + self.request_id.capacity() + reason + self.tokens.capacity() * size_of::<TokenEvent>()
    }

    /// As `tandem explain` and the page take it.
    pub(crate) fn json(&self, tokenizer: &Tokenizer) -> Value {
        let token = |token: &TokenEvent| {
            let bytes = tokenizer.token_bytes(token.id).unwrap_or_default();
            let mut value = serde_json::to_value(token).unwrap_or_default();
            value["text"] = json!(String::from_utf8_lossy(&bytes));
            value
        };
        json!({
            "request_id": self.request_id,
            "mode": self.mode,
            "prompt_tokens": self.prompt_tokens,
            "route": self.route,
            "seconds": self.took.as_secs_f64(),
            "tokens": self.tokens.iter().map(token).collect::<Vec<Value>>(),
        })
    }
}

impl Explained {
    pub(crate) fn new(answers_max: usize) -> Self {
        Self { kept: VecDeque::new(), bytes: 0, answers_max }
    }

    /// Keeps an answer; the oldest ones go for it. One that is too large by itself is not kept.
    pub(crate) fn push(&mut self, answered: Answered) {
        let answered = answered.compact();
        self.bytes += answered.bytes();
        self.kept.push_back(Arc::new(answered));
        while self.kept.len() > self.answers_max || self.bytes > EXPLAIN_BYTES_MAX {
            let Some(oldest) = self.kept.pop_front() else { return };
            self.bytes -= oldest.bytes();
        }
    }

    /// The last answer with this request id, or the last of all.
    pub(crate) fn find(&self, id: Option<&str>) -> Option<Arc<Answered>> {
        match id {
            Some(id) => self.kept.iter().rev().find(|answered| answered.request_id == id),
            None => self.kept.back(),
        }
        .cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::Origin;

    fn answered(id: usize, tokens: usize) -> Answered {
        let token = |index| TokenEvent {
            index: index as u32,
            id: 1,
            origin: Origin::Edge,
            logprob: 0.0,
            edge_top1: None,
            edge_entropy: None,
            risk: None,
            reason: "local",
            alternatives: vec![tandem_proto::message::Alternative { id: 2, logprob: 0.0 }; 20],
        };
        Answered {
            request_id: id.to_string(),
            mode: Mode::Local,
            prompt_tokens: 1,
            route: RouteSummary::default(),
            took: Duration::ZERO,
            tokens: (0..tokens).map(token).collect(),
        }
    }

    #[test]
    fn answers_are_kept_within_number_and_memory() {
        let mut kept = Explained::new(3);
        for id in 0..5 {
            kept.push(answered(id, 1));
        }
        let ids = |kept: &Explained| kept.kept.iter().map(|a| a.request_id.clone()).collect::<Vec<_>>();
        assert_eq!(ids(&kept), ["2", "3", "4"]);
        assert_eq!(kept.find(Some("3")).expect("kept").request_id, "3");
        assert_eq!(kept.find(None).expect("kept").request_id, "4");
        assert!(kept.find(Some("1")).is_none());

        let many = EXPLAIN_BYTES_MAX / size_of::<TokenEvent>();
        let mut kept = Explained::new(64);
        for id in 0..64 {
            kept.push(answered(id, many / 5));
            let held: usize = kept.kept.iter().map(|a| a.bytes()).sum();
            assert!(held <= EXPLAIN_BYTES_MAX && held == kept.bytes, "{held}");
        }
        assert_eq!(ids(&kept), ["60", "61", "62", "63"], "20 alternatives per token do not count: they are not kept");
        kept.push(answered(64, many + 1));
        assert_eq!(ids(&kept), Vec::<String>::new());
        assert_eq!(kept.bytes, 0);
    }
}
