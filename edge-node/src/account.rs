//! What an answer took, counted once: `usage`, `explain`, the totals of `/tandem/status` and the metrics
//! all have it from here.
//!
//! The tokens of an answer are those that its reader took: up to the one that completed a stop string, or
//! the last before the client went away. What had become final past them is `discarded`. So an account is
//! closed when both are done: the node with its work, and the reader with the answer.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

use crate::context::NodeContext;
use crate::request::{GenerateRequest, Origin, RouteSummary, TokenEvent};

/// What the node has done for an answer.
pub(crate) struct Written {
    pub(crate) request: GenerateRequest,
    pub(crate) route: RouteSummary,
    /// Every token that became final.
    pub(crate) trace: Vec<TokenEvent>,
    pub(crate) took: Duration,
}

#[derive(Default)]
struct Parts {
    written: Option<Written>,
    /// Tokens that the reader took.
    taken: Option<usize>,
    closed: Option<oneshot::Sender<RouteSummary>>,
}

/// The account of one answer.
pub(crate) struct Account {
    node: Arc<NodeContext>,
    parts: Mutex<Parts>,
}

impl Account {
    /// An open account; the receiver gets the sum once it is closed.
    pub(crate) fn open(node: Arc<NodeContext>) -> (Arc<Self>, oneshot::Receiver<RouteSummary>) {
        let (closed, sum) = oneshot::channel();
        let parts = Mutex::new(Parts { closed: Some(closed), ..Parts::default() });
        (Arc::new(Self { node, parts }), sum)
    }

    /// The node has done its work.
    pub(crate) fn written(&self, written: Written) {
        self.close(|parts| parts.written = Some(written));
    }

    /// The reader wants no more and has taken so many tokens.
    pub(crate) fn taken(&self, tokens: usize) {
        self.close(|parts| parts.taken = Some(tokens));
    }

    /// Notes something, and books the answer if that was the last thing to come.
    fn close(&self, note: impl FnOnce(&mut Parts)) {
        let (written, taken, closed) = {
            let mut parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
            note(&mut parts);
            let Some(taken) = parts.taken else { return };
            let Some(written) = parts.written.take() else { return };
            (written, taken, parts.closed.take())
        };
        let Written { request, route, mut trace, took } = written;
        let final_tokens = trace.len();
        trace.truncate(taken);
        let route = delivered(&route, &trace, final_tokens);
        self.node.book(&request, &route, trace, final_tokens, took);
        // No task waits for it.
        let _ = closed.map(|closed| closed.send(route));
    }
}

/// What an answer took of which the reader took `trace` and the node wrote `final_tokens`.
fn delivered(route: &RouteSummary, trace: &[TokenEvent], final_tokens: usize) -> RouteSummary {
    let of = |origin| trace.iter().filter(|token| token.origin == origin).count() as u32;
    RouteSummary {
        edge_tokens: of(Origin::Edge),
        accepted: of(Origin::Verified),
        cloud_tokens: of(Origin::Cloud),
        discarded: (final_tokens - trace.len()) as u32,
        ..route.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_that_nobody_read_are_discarded() {
        let token = |index, origin| TokenEvent {
            index,
            id: 7,
            origin,
            logprob: -0.1,
            edge_top1: None,
            edge_entropy: None,
            risk: None,
            reason: "sure",
            alternatives: Vec::new(),
        };
        let trace = [token(0, Origin::Edge), token(1, Origin::Verified), token(2, Origin::Edge)];
        let all = RouteSummary {
            edge_tokens: 4,
            accepted: 2,
            cloud_tokens: 3,
            bytes_up: 90,
            rolled_back: 5,
            ..RouteSummary::default()
        };
        let wanted = RouteSummary { edge_tokens: 2, accepted: 1, cloud_tokens: 0, discarded: 6, ..all.clone() };
        assert_eq!(delivered(&all, &trace, 9), wanted);
        assert_eq!(delivered(&all, &trace, 3).discarded, 0);
    }
}
