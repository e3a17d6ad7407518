//! Which layers the rows of a pass run through together: rows may begin above the first layer, where a peer gave the
//! hidden states, or end below the last one, where only skipped layers are caught up on.

use std::collections::BTreeSet;
use std::ops::Range;

/// The way of one sequence's rows through the layers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Way {
    /// First layer.
    pub(super) from: usize,
    /// One past the last layer.
    pub(super) to: usize,
    /// The hidden states above this many layers are kept.
    pub(super) keep: Option<usize>,
}

impl Way {
    /// Whether the rows run through the layers `range`, one of [`layer_runs`].
    pub(super) fn runs(&self, range: &Range<usize>) -> bool {
        self.from <= range.start && range.end <= self.to
    }
}

/// The layers from bottom to top, cut wherever rows come, leave or are kept: through each run go the same rows.
pub(super) fn layer_runs(ways: &[Way]) -> Vec<Range<usize>> {
    let cuts: BTreeSet<usize> = ways.iter().flat_map(|way| [way.from, way.to].into_iter().chain(way.keep)).collect();
    let cuts: Vec<usize> = cuts.into_iter().collect();
    let runs = cuts.windows(2).map(|pair| pair[0]..pair[1]);
    runs.filter(|run| ways.iter().any(|way| way.runs(run))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_cut_where_rows_come_leave_or_are_kept() {
        let way = |from, to, keep| Way { from, to, keep };
        let whole = way(0, 30, None);
        let table = [
            ("nothing", vec![], vec![]),
            ("nobody shares a trunk", vec![whole, whole], vec![(0, 30)]),
            ("one keeps the hidden states", vec![whole, way(0, 30, Some(2))], vec![(0, 2), (2, 30)]),
            ("all hidden states are given", vec![way(2, 30, None)], vec![(2, 30)]),
            ("trunks of two depths", vec![way(2, 30, None), way(28, 30, None)], vec![(2, 28), (28, 30)]),
            ("one catches up beside another", vec![way(0, 2, None), whole], vec![(0, 2), (2, 30)]),
            ("two that have no layer in common", vec![way(0, 2, None), way(28, 30, None)], vec![(0, 2), (28, 30)]),
            ("a trunk of all layers, given", vec![way(30, 30, None)], vec![]),
            ("a trunk of all layers, kept", vec![way(0, 30, Some(30))], vec![(0, 30)]),
        ];
        for (name, ways, runs) in table {
            let found: Vec<_> = layer_runs(&ways).into_iter().map(|run| (run.start, run.end)).collect();
            assert_eq!(found, runs, "{name}");
        }
    }
}
