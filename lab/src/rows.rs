//! Rows of the data files, and which of them an evaluation takes.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::LabError;

/// Largest data file, bytes.
pub const FILE_BYTES_MAX: u64 = 256 << 20;

/// A question with the answer that counts as right.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// What is asked.
    pub prompt: String,
    /// The right answer; empty if it is unknown.
    #[serde(default)]
    pub answer: String,
    /// Kind of question.
    pub category: String,
    /// Part of the file, if it has parts.
    #[serde(default)]
    pub part: String,
    /// Rows of one key belong together: they are wordings of one problem.
    #[serde(default)]
    pub key: String,
}

impl Row {
    /// True if the right answer is known.
    #[must_use]
    pub fn has_answer(&self) -> bool {
        !self.answer.trim().is_empty()
    }

    /// True if `text` is the right answer; white space around it does not matter.
    #[must_use]
    pub fn is_right(&self, text: &str) -> bool {
        self.has_answer() && text.trim() == self.answer.trim()
    }
}

/// Reads the rows of a JSONL file that ask something.
///
/// # Errors
/// [`LabError::Io`], [`LabError::Row`], [`LabError::Empty`].
pub fn read(path: &Path) -> Result<Vec<Row>, LabError> {
    let bytes = std::fs::metadata(path).map_err(LabError::io(path))?.len();
    if bytes > FILE_BYTES_MAX {
        return Err(LabError::Empty(format!(
            "{} has {bytes} bytes, at most {FILE_BYTES_MAX} are read",
            path.display()
        )));
    }
    let text = std::fs::read_to_string(path).map_err(LabError::io(path))?;
    let mut rows = Vec::new();
    for (at, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let row: Row = serde_json::from_str(line).map_err(|e| LabError::Row {
            path: path.into(),
            line: at + 1,
            problem: e.to_string(),
        })?;
        rows.push(row);
    }
    rows.retain(|row| !row.prompt.is_empty());
    if rows.is_empty() {
        return Err(LabError::Empty(format!("{} holds no question", path.display())));
    }
    Ok(rows)
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

    fn data(name: &str) -> PathBuf {
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../models/data").join(name)
    }

    /// Equal for prompts that differ only in case and end mark.
    fn normal(prompt: &str) -> String {
        prompt.to_lowercase().trim_end_matches([' ', '.', '?', '!']).to_owned()
    }

    #[test]
    fn calibration_rows_share_no_prompt_and_no_problem_with_the_evaluation() {
        let calibration = read(&data("calibration.jsonl")).unwrap();
        let known: BTreeSet<String> = calibration.iter().map(|r| normal(&r.prompt)).collect();
        assert_eq!(known.len(), calibration.len(), "a prompt repeats");
        let stated = ["definition", "kind_of", "antonym", "capital", "capital_of", "continent", "currency", "language"]
            .into_iter()
            .chain(["city", "element", "example", "unit", "add", "sub", "mul", "convert", "date", "sort"]);
        let stated: BTreeSet<&str> = stated.collect();
        let answers: BTreeSet<&str> = calibration.iter().map(|r| r.answer.as_str()).collect();
        for split in ["eval_heldout.jsonl", "eval_dialogue.jsonl", "eval_seen_facts.jsonl"] {
            for row in read(&data(split)).unwrap() {
                assert!(!known.contains(&normal(&row.prompt)), "{split}: {}", row.prompt);
                // Other categories have few answers (odd, even, four words), shared by many problems.
                let repeats = stated.contains(row.category.as_str()) && answers.contains(row.answer.as_str());
                assert!(!repeats, "{split}: {}", row.answer);
            }
        }
    }

    #[test]
    fn the_subset_is_that_of_the_reference() {
        let rows = (0..577).map(|i| Row {
            prompt: i.to_string(),
            answer: String::new(),
            category: String::new(),
            part: String::new(),
            key: String::new(),
        });
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
            part: String::new(),
            key: key.into(),
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
        assert!(!rows[5].has_answer() && !rows[5].is_right("") && rows[0].is_right(" a\n"));
    }

    #[test]
    fn bad_lines_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows.jsonl");
        std::fs::write(&path, "{\"prompt\":\"a\",\"answer\":\"b\",\"category\":\"c\"}\n{\"prompt\":1}\n").unwrap();
        assert!(matches!(read(&path), Err(LabError::Row { line: 2, .. })));
        std::fs::write(&path, "\n").unwrap();
        assert!(matches!(read(&path), Err(LabError::Empty(_))));
        assert!(matches!(read(&dir.path().join("none")), Err(LabError::Io { .. })));
    }
}
