//! Which rows go into the next forward pass. Pure functions: no clock, no model.
//!
//! Decisions that an answer waits for (verification, single decode steps) go first, in order of
//! arrival; prompts fill what is left, in chunks, as far as [`super::fairness`] allows beside the
//! sequences that decode. The oldest prompt always gets a place and the reserved rows, so it cannot starve.

/// Work that waits for the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// Rows left to feed.
    pub rows: usize,
    /// True if the rows are a prompt's.
    pub is_prefill: bool,
    /// Order of arrival.
    pub arrival: u64,
}

/// Bounds of one pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchBounds {
    /// Most rows of a pass.
    pub rows_max: usize,
    /// Most sequences of a pass.
    pub sequences_max: usize,
    /// Most rows of one prompt in a pass.
    pub prefill_chunk: usize,
    /// Rows kept for the oldest prompt when decisions fill the pass.
    pub prefill_reserve: usize,
}

/// Rows to take of one waiting piece of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Take {
    /// Index into the waiting work.
    pub index: usize,
    /// Rows to feed.
    pub rows: usize,
}

/// The decisions of the next pass. They leave rows and a place for a prompt, if one waits.
#[must_use]
pub fn decisions(waiting: &[Waiting], bounds: &BatchBounds) -> Vec<Take> {
    let has_prefill = waiting.iter().any(|w| w.is_prefill && w.rows > 0);
    let reserve = if has_prefill { bounds.prefill_reserve } else { 0 };
    let places = bounds.sequences_max - usize::from(has_prefill && bounds.sequences_max > 1);
    let mut room = bounds.rows_max.saturating_sub(reserve);
    let mut takes = Vec::new();
    for index in in_order(waiting, false) {
        let rows = waiting[index].rows.min(room);
        if rows > 0 && takes.len() < places {
            takes.push(Take { index, rows });
            room -= rows;
        }
    }
    takes
}

/// The prompts of a pass that has `decisions` already, with at most `allowed` rows together: in order of
/// arrival, in equal shares, and what a short one leaves of its share goes to the others. So a short prompt
/// does not wait for a long one to end.
#[must_use]
pub fn prefills(waiting: &[Waiting], bounds: &BatchBounds, decisions: &[Take], allowed: usize) -> Vec<Take> {
    let used: usize = decisions.iter().map(|t| t.rows).sum();
    let mut room = bounds.rows_max.saturating_sub(used).min(allowed);
    let places = bounds.sequences_max.saturating_sub(decisions.len()).min(room);
    let mut fed: Vec<usize> = in_order(waiting, true).into_iter().take(places).collect();
    fed.sort_by_key(|&i| (waiting[i].rows, waiting[i].arrival));
    let mut takes = Vec::with_capacity(fed.len());
    for (at, &index) in fed.iter().enumerate() {
        let rows = waiting[index].rows.min(bounds.prefill_chunk).min(room / (fed.len() - at));
        takes.push(Take { index, rows });
        room -= rows;
    }
    takes
}

/// Indices of the prompts, or of the decisions, that have rows, in order of arrival.
fn in_order(waiting: &[Waiting], is_prefill: bool) -> Vec<usize> {
    let fits = |i: &usize| waiting[*i].rows > 0 && waiting[*i].is_prefill == is_prefill;
    let mut order: Vec<usize> = (0..waiting.len()).filter(fits).collect();
    order.sort_by_key(|&i| waiting[i].arrival);
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: BatchBounds = BatchBounds { rows_max: 64, sequences_max: 4, prefill_chunk: 32, prefill_reserve: 8 };

    /// A row of the table: `v5` is a decision of 5 rows, `p100` a prompt of 100; arrival in order.
    fn waiting(text: &str) -> Vec<Waiting> {
        text.split_whitespace()
            .enumerate()
            .map(|(i, w)| Waiting { rows: w[1..].parse().unwrap(), is_prefill: w.starts_with('p'), arrival: i as u64 })
            .collect()
    }

    fn compose(waiting: &[Waiting], allowed: usize) -> Vec<Take> {
        let mut takes = decisions(waiting, &BOUNDS);
        takes.extend(prefills(waiting, &BOUNDS, &takes, allowed));
        takes
    }

    #[test]
    fn passes_are_composed_as_the_table_says() {
        // What waits, rows of prompts allowed, what is taken.
        let table = [
            ("", 64, ""),
            ("v5", 64, "0:5"),
            ("p100", 64, "0:32"),
            ("p100 v5", 64, "1:5 0:32"),
            ("p100 v5 v1 v1", 64, "1:5 2:1 3:1 0:32"),
            ("v40 v40 v1", 64, "0:40 1:24"),
            ("v40 v40 p100", 64, "0:40 1:16 2:8"),
            ("p40 p40", 64, "0:32 1:32"),
            ("p40 p40 p40", 64, "0:21 1:21 2:22"),
            ("p40 p40 p5", 64, "2:5 0:29 1:30"),
            ("v1 v1 v1 v1 v1", 64, "0:1 1:1 2:1 3:1"),
            ("v1 v1 v1 v1 v1 p100", 64, "0:1 1:1 2:1 5:32"),
            ("p9 v1 v1 v1 v1 p100", 64, "1:1 2:1 3:1 0:9"),
            ("v100", 64, "0:64"),
            ("v0 p0 v2", 64, "2:2"),
            ("p100 v1", 6, "1:1 0:6"),
            ("p100 p3 v1", 8, "2:1 1:3 0:5"),
            ("p100 p100 p100 v1", 1, "3:1 0:1"),
            ("v1 p100", 0, "0:1"),
            ("p100", 0, ""),
        ];
        for (given, allowed, expected) in table {
            let got: Vec<String> =
                compose(&waiting(given), allowed).iter().map(|t| format!("{}:{}", t.index, t.rows)).collect();
            assert_eq!(got.join(" "), expected, "{given}, {allowed} rows of prompts allowed");
        }
    }

    #[test]
    fn a_prompt_is_served_although_decisions_keep_coming() {
        for decisions in ["v64 v64 v64", "v1 v1 v1 v1 v1 v1"] {
            let mut prompt = Waiting { rows: 1000, is_prefill: true, arrival: 0 };
            let mut passes = 0;
            while prompt.rows > 0 {
                assert!(passes < 1000 / BOUNDS.prefill_reserve, "the prompt starves beside {decisions}");
                passes += 1;
                let mut all = waiting(decisions);
                let index = all.len();
                all.push(prompt);
                let takes = compose(&all, usize::MAX);
                assert!(takes.iter().map(|t| t.rows).sum::<usize>() <= BOUNDS.rows_max);
                assert!(takes.len() <= BOUNDS.sequences_max);
                prompt.rows -= takes.iter().find(|t| t.index == index).map_or(0, |t| t.rows);
            }
        }
    }
}
