//! Questions with right answers, and which of them an evaluation takes.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use tandem_engine::chat::Message;

use crate::error::LabError;
use crate::score::{RIGHT_MIN, Scorer, ScorerName};

/// Where a row stands.
#[derive(Clone, Debug)]
pub struct Origin {
    /// The file.
    pub file: Arc<Path>,
    /// Line number, from 1.
    pub line: usize,
}

/// A question with the answer that counts as right.
#[derive(Clone, Debug, Default)]
pub struct Row {
    /// What is asked; of a conversation, its last message.
    pub prompt: String,
    /// The conversation; empty for the prompt alone.
    pub messages: Vec<Message>,
    /// The right answer; empty if it is unknown.
    pub answer: String,
    /// Kind of question.
    pub category: String,
    /// Part of the file, if it has parts.
    pub part: String,
    /// Rows of one key belong together: they are wordings of one problem.
    pub key: String,
    /// What says whether a reply is right.
    pub scorer: Scorer,
    /// Where it stands; none for a row that was not read.
    pub origin: Option<Origin>,
}

impl Row {
    /// True if it is known what is right.
    #[must_use]
    pub fn has_answer(&self) -> bool {
        !self.answer.trim().is_empty() || self.scorer.name() == ScorerName::Command
    }

    /// How good `reply` is, 0 … 1; 0 where nobody knows what is right.
    ///
    /// # Errors
    /// The external scorer fails.
    pub fn score(&self, reply: &str) -> Result<f64, LabError> {
        if !self.has_answer() {
            return Ok(0.0);
        }
        self.scorer.score(&self.prompt, &self.answer, reply).map_err(|why| LabError::Scorer { at: self.at(), why })
    }

    /// True if `reply` is right.
    ///
    /// # Errors
    /// The external scorer fails.
    pub fn is_right(&self, reply: &str) -> Result<bool, LabError> {
        Ok(self.score(reply)? >= RIGHT_MIN)
    }

    /// The conversation.
    #[must_use]
    pub fn conversation(&self) -> Vec<Message> {
        if self.messages.is_empty() { vec![Message::new("user", self.prompt.clone())] } else { self.messages.clone() }
    }

    /// Where it stands, for an error.
    pub(crate) fn at(&self) -> String {
        match &self.origin {
            Some(origin) => format!("{}:{}", origin.file.display(), origin.line),
            None => format!("`{}`", self.prompt),
        }
    }
}

/// Numbers the problems of `rows`: rows with the same category and key (or answer, where there is no
/// key, or prompt, where there is neither) get the same number. The unit of every split between fitting and measuring.
#[must_use]
pub fn problems(rows: &[Row]) -> Vec<u32> {
    let mut known: BTreeMap<(&str, &str), u32> = BTreeMap::new();
    rows.iter()
        .map(|row| {
            let keys = [&row.key, &row.answer, &row.prompt];
            let key = keys.into_iter().find(|key| !key.is_empty()).unwrap_or(&row.prompt);
            let next = known.len() as u32;
            *known.entry((row.category.as_str(), key.as_str())).or_insert(next)
        })
        .collect()
}

/// The first `limit` rows after Python's `random.Random(0).shuffle(rows)`: the very rows that
/// `models/recipe/evaluate.py --limit` takes, so that results compare row for row. 0 takes all, in order.
#[must_use]
pub fn reference_subset(rows: Vec<Row>, limit: usize) -> Vec<Row> {
    if limit == 0 {
        return rows;
    }
    let mut order: Vec<usize> = (0..rows.len()).collect();
    let mut twister = Twister::seeded_zero();
    for i in (1..order.len()).rev() {
        order.swap(i, twister.below(i as u32 + 1) as usize);
    }
    order.into_iter().take(limit).map(|i| rows[i].clone()).collect()
}

/// MT19937 as `CPython` seeds it with the integer 0 (Matsumoto and Nishimura 1998).
struct Twister {
    state: [u32; 624],
    next: usize,
}

impl Twister {
    fn seeded_zero() -> Self {
        let mut s = [0u32; 624];
        s[0] = 19_650_218;
        for i in 1..624 {
            s[i] = 1_812_433_253u32.wrapping_mul(s[i - 1] ^ (s[i - 1] >> 30)).wrapping_add(i as u32);
        }
        // init_by_array with the key [0].
        let mut i = 1;
        for _ in 0..624 {
            s[i] ^= (s[i - 1] ^ (s[i - 1] >> 30)).wrapping_mul(1_664_525);
            i += 1;
            if i == 624 {
                s[0] = s[623];
                i = 1;
            }
        }
        for _ in 0..623 {
            s[i] = (s[i] ^ (s[i - 1] ^ (s[i - 1] >> 30)).wrapping_mul(1_566_083_941)).wrapping_sub(i as u32);
            i += 1;
            if i == 624 {
                s[0] = s[623];
                i = 1;
            }
        }
        s[0] = 0x8000_0000;
        Self { state: s, next: 624 }
    }

    fn next(&mut self) -> u32 {
        if self.next == 624 {
            for i in 0..624 {
                let y = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % 624] & 0x7fff_ffff);
                let odd = if y & 1 == 1 { 0x9908_b0df } else { 0 };
                self.state[i] = self.state[(i + 397) % 624] ^ (y >> 1) ^ odd;
            }
            self.next = 0;
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// `Random._randbelow_with_getrandbits`, for `n` ≥ 1.
    fn below(&mut self, n: u32) -> u32 {
        let shift = n.leading_zeros();
        loop {
            let r = self.next() >> shift;
            if r < n {
                return r;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::PathBuf;

    use super::*;
    use crate::questions::{ReadOptions, read};

    fn data(name: &str) -> PathBuf {
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../models/data").join(name)
    }

    /// Equal for prompts that differ only in case and end mark.
    fn normal(prompt: &str) -> String {
        prompt.to_lowercase().trim_end_matches([' ', '.', '?', '!']).to_owned()
    }

    #[test]
    fn calibration_rows_share_no_prompt_and_no_problem_with_the_evaluation() {
        let calibration = read(&data("calibration.jsonl"), &ReadOptions::default()).unwrap().0;
        let known: BTreeSet<String> = calibration.iter().map(|r| normal(&r.prompt)).collect();
        assert_eq!(known.len(), calibration.len(), "a prompt repeats");
        let stated = ["definition", "kind_of", "antonym", "capital", "capital_of", "continent", "currency", "language"]
            .into_iter()
            .chain(["city", "element", "example", "unit", "add", "sub", "mul", "convert", "date", "sort"]);
        let stated: BTreeSet<&str> = stated.collect();
        let answers: BTreeSet<&str> = calibration.iter().map(|r| r.answer.as_str()).collect();
        for split in ["eval_heldout.jsonl", "eval_dialogue.jsonl", "eval_seen_facts.jsonl"] {
            for row in read(&data(split), &ReadOptions::default()).unwrap().0 {
                assert!(!known.contains(&normal(&row.prompt)), "{split}: {}", row.prompt);
                // Other categories have few answers (odd, even, four words), shared by many problems.
                let repeats = stated.contains(row.category.as_str()) && answers.contains(row.answer.as_str());
                assert!(!repeats, "{split}: {}", row.answer);
            }
        }
    }

    #[test]
    fn the_subset_is_that_of_the_reference() {
        let rows = (0..577).map(|i| Row { prompt: i.to_string(), ..Row::default() });
        let first: Vec<String> = reference_subset(rows.collect(), 6).into_iter().map(|r| r.prompt).collect();
        assert_eq!(first, SHUFFLED_577);
    }

    /// `r = list(range(577)); random.Random(0).shuffle(r); r[:6]`
    const SHUFFLED_577: [&str; 6] = ["356", "157", "148", "384", "192", "162"];

    #[test]
    fn wordings_of_a_problem_are_one_problem() {
        let row = |category: &str, key: &str, answer: &str| Row {
            prompt: "?".into(),
            answer: answer.into(),
            category: category.into(),
            key: key.into(),
            ..Row::default()
        };
        let rows = [
            row("add", "1+2", "a"),
            row("add", "1+2", "b"),
            row("sub", "1+2", "a"),
            row("add", "", "a"),
            row("add", "", "a"),
            row("add", "", ""),
            Row { prompt: "another?".into(), ..row("add", "", "") },
        ];
        assert_eq!(problems(&rows), [0, 0, 1, 2, 2, 3, 4]);
        assert!(!rows[5].has_answer() && !rows[5].is_right("").unwrap() && rows[0].is_right(" a\n").unwrap());
    }
}
