//! Nodes that have just not worked. Pure: the time is passed in.

use std::time::{Duration, Instant};

/// Nodes remembered; the one longest known gives way.
pub const SUSPECTS_MAX: usize = 16;
/// How long a node that did not work is left for others.
pub const COOL_DOWN: Duration = Duration::from_secs(30);

/// Nodes that are left for others until their cool-down is over.
#[derive(Debug, Default)]
pub(crate) struct Suspects {
    /// The latest first.
    nodes: Vec<(String, Instant)>,
}

impl Suspects {
    /// `node` did not work at `now`.
    pub(crate) fn add(&mut self, node: &str, now: Instant) {
        self.nodes.retain(|(known, _)| known != node);
        self.nodes.insert(0, (node.to_owned(), now));
        self.nodes.truncate(SUSPECTS_MAX);
    }

    /// Whether `node` is to be left for others at `now`.
    pub(crate) fn has(&self, node: &str, now: Instant) -> bool {
        self.nodes.iter().any(|(known, since)| known == node && now.duration_since(*since) < COOL_DOWN)
    }

    /// The nodes to be left for others at `now`, the latest first.
    pub(crate) fn names(&mut self, now: Instant) -> Vec<String> {
        self.nodes.retain(|(_, since)| now.duration_since(*since) < COOL_DOWN);
        self.nodes.iter().map(|(node, _)| node.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_left_for_others_until_its_cool_down_is_over() {
        let start = Instant::now();
        let mut suspects = Suspects::default();
        suspects.add("a", start);
        suspects.add("b", start + COOL_DOWN / 2);
        assert_eq!(suspects.names(start + COOL_DOWN / 2), ["b", "a"]);
        suspects.add("a", start + COOL_DOWN / 2);
        assert_eq!(suspects.names(start + COOL_DOWN), ["a", "b"], "the latest first");
        assert!(suspects.has("a", start + COOL_DOWN) && !suspects.has("c", start));
        assert!(!suspects.has("a", start + 2 * COOL_DOWN));
        assert!(suspects.names(start + 2 * COOL_DOWN).is_empty());
        for node in 0..2 * SUSPECTS_MAX {
            suspects.add(&node.to_string(), start);
        }
        assert_eq!(suspects.names(start).len(), SUSPECTS_MAX);
    }
}
