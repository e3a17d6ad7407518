//! Which rows go into the next forward pass. A pure function: no clock, no model.
//!
//! Decisions that somebody waits for (verification, single decode steps) go first, in order of
//! arrival; prompts fill what is left, in chunks, so that a long prompt delays nobody for more than
//! one pass. The oldest prompt always gets a place and the reserved rows, so it cannot starve.

/// Work that waits for the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// Rows left to feed.
    pub rows: usize,
    /// True if nobody waits for an answer yet, or the rows are a prompt.
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

/// Composes the next pass.
#[must_use]
pub fn compose(waiting: &[Waiting], bounds: &BatchBounds) -> Vec<Take> {
    let mut order: Vec<usize> = (0..waiting.len()).filter(|&i| waiting[i].rows > 0).collect();
    order.sort_by_key(|&i| (waiting[i].is_prefill, waiting[i].arrival));
    let has_prefill = order.last().is_some_and(|&i| waiting[i].is_prefill);
    let reserve = if has_prefill { bounds.prefill_reserve.min(bounds.rows_max) } else { 0 };
    let mut takes: Vec<Take> = Vec::new();
    let mut used = 0;
    for index in order {
        let w = &waiting[index];
        // Decisions leave a place for a prompt.
        let kept = usize::from(has_prefill && bounds.sequences_max > 1 && !w.is_prefill);
        if takes.len() + kept >= bounds.sequences_max {
            continue;
        }
        let room = if w.is_prefill { bounds.rows_max - used } else { (bounds.rows_max - reserve).saturating_sub(used) };
        let chunk = if w.is_prefill { bounds.prefill_chunk } else { bounds.rows_max };
        let rows = w.rows.min(chunk).min(room);
        if rows > 0 {
            takes.push(Take { index, rows });
            used += rows;
        }
    }
    takes
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

    #[test]
    fn passes_are_composed_as_the_table_says() {
        let table = [
            ("", ""),
            ("v5", "0:5"),
            ("p100", "0:32"),
            ("p100 v5", "1:5 0:32"),
            ("p100 v5 v1 v1", "1:5 2:1 3:1 0:32"),
            ("v40 v40 v1", "0:40 1:24"),
            ("v40 v40 p100", "0:40 1:16 2:8"),
            ("p40 p40 p40", "0:32 1:32"),
            ("v1 v1 v1 v1 v1", "0:1 1:1 2:1 3:1"),
            ("v1 v1 v1 v1 v1 p100", "0:1 1:1 2:1 5:32"),
            ("p9 v1 v1 v1 v1 p100", "1:1 2:1 3:1 0:9"),
            ("v100", "0:64"),
            ("v0 p0 v2", "2:2"),
        ];
        for (given, expected) in table {
            let got: Vec<String> =
                compose(&waiting(given), &BOUNDS).iter().map(|t| format!("{}:{}", t.index, t.rows)).collect();
            assert_eq!(got.join(" "), expected, "{given}");
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
                let takes = compose(&all, &BOUNDS);
                assert!(takes.iter().map(|t| t.rows).sum::<usize>() <= BOUNDS.rows_max);
                assert!(takes.len() <= BOUNDS.sequences_max);
                prompt.rows -= takes.iter().find(|t| t.index == index).map_or(0, |t| t.rows);
            }
        }
    }
}
