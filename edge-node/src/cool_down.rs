//! A cloud node that failed an answer is left alone for a while, by all answers: the next ones must not find
//! out anew. Pure: the time is passed in.

use std::time::{Duration, Instant};

use tandem_proto::message::Hello;

/// How long a node is left alone that has failed once.
pub const COOL_DOWN_MIN: Duration = Duration::from_secs(2);
/// How long at most, however often it fails in a row.
pub const COOL_DOWN_MAX: Duration = Duration::from_secs(30);

/// A run of a node: one that was started again may work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NodeRun {
    name: String,
    boot_epoch: u64,
}

impl NodeRun {
    pub(crate) fn of(hello: &Hello) -> Self {
        Self { name: hello.node.clone(), boot_epoch: hello.boot_epoch }
    }
}

/// The node that failed last.
#[derive(Clone, Debug)]
pub(crate) struct CoolDown {
    node: NodeRun,
    failures: u32,
    pub(crate) until: Instant,
    pub(crate) why: String,
}

impl CoolDown {
    /// `node` has failed at `now`. `before` is what was known until then.
    pub(crate) fn after(before: Option<Self>, node: NodeRun, why: &str, now: Instant) -> Self {
        // Several answers may find out about one failure.
        let again = before.filter(|known| known.node == node);
        let failures = again.map_or(1, |known| known.failures + u32::from(known.until <= now));
        let pause = COOL_DOWN_MIN.saturating_mul(1 << (failures - 1).min(16)).min(COOL_DOWN_MAX);
        Self { node, failures, until: now + pause, why: why.to_owned() }
    }

    /// Whether `node` is to be left alone at `now`.
    pub(crate) fn holds(&self, node: &NodeRun, now: Instant) -> bool {
        self.node == *node && now < self.until
    }

    /// Whether this is about `node`.
    pub(crate) fn is_about(&self, node: &NodeRun) -> bool {
        self.node == *node
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_fails_again_is_left_alone_for_longer() {
        let node = |name: &str, boot_epoch| NodeRun { name: name.into(), boot_epoch };
        let start = Instant::now();
        let mut known = CoolDown::after(None, node("a", 1), "it hangs", start);
        assert!(known.holds(&node("a", 1), start) && !known.holds(&node("a", 1), start + COOL_DOWN_MIN));
        assert!(!known.holds(&node("b", 1), start), "another node");
        assert!(!known.holds(&node("a", 2), start), "it was started again");
        known = CoolDown::after(Some(known), node("a", 1), "it hangs", start);
        assert_eq!(known.until, start + COOL_DOWN_MIN, "the same failure, found by another answer");
        let mut pauses = Vec::new();
        for _ in 0..6 {
            let now = known.until;
            known = CoolDown::after(Some(known), node("a", 1), "it hangs", now);
            pauses.push(known.until.duration_since(now).as_secs());
        }
        assert_eq!(pauses, [4, 8, 16, 30, 30, 30]);
        assert_eq!(CoolDown::after(Some(known), node("b", 1), "it hangs", start).until, start + COOL_DOWN_MIN);
    }
}
