//! Whether a reply is right, by a scorer that the file or the row names. Pure, but for the external command.

mod choice;
mod command;
mod json;
mod number;

use std::sync::Arc;

use fancy_regex::Regex;
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use choice::{CHOICES_MAX, letter};
pub use command::{CommandError, CommandScorer};

/// From this score on, a reply counts as right where only right and wrong are told apart.
pub const RIGHT_MIN: f64 = 0.5;

/// The scorers by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScorerName {
    /// Equal, but for white space around it.
    Exact,
    /// Equal words: case, punctuation and white space do not matter.
    Text,
    /// The last number of the reply is the last number of the answer.
    Number,
    /// The letter of the right choice.
    Choice,
    /// Equal as JSON.
    Json,
    /// The answer is a regular expression that is found in the reply.
    Regex,
    /// An external command says how good the reply is.
    Command,
}

impl ScorerName {
    /// Its name, as in a row's `scorer`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Text => "text",
            Self::Number => "number",
            Self::Choice => "choice",
            Self::Json => "json",
            Self::Regex => "regex",
            Self::Command => "command",
        }
    }
}

/// A scorer ready for one row.
#[derive(Clone, Debug, Default)]
pub enum Scorer {
    /// See [`ScorerName::Exact`].
    #[default]
    Exact,
    /// See [`ScorerName::Text`].
    Text,
    /// See [`ScorerName::Number`]; the right number.
    Number(f64),
    /// See [`ScorerName::Choice`].
    Choice {
        /// The right choice, from 0.
        right: usize,
        /// How many there are.
        of: usize,
    },
    /// See [`ScorerName::Json`]; the right value.
    Json(Arc<Value>),
    /// See [`ScorerName::Regex`].
    Regex(Arc<Regex>),
    /// See [`ScorerName::Command`]; the row as it stands in its file.
    Command(Arc<CommandScorer>, Arc<Value>),
}

impl Scorer {
    /// The scorer `name` for a right answer; `of` choices.
    ///
    /// # Errors
    /// What is wrong with the answer, in words.
    pub fn new(name: ScorerName, answer: &str, of: usize) -> Result<Self, String> {
        Ok(match name {
            ScorerName::Exact => Self::Exact,
            ScorerName::Text => Self::Text,
            ScorerName::Number => {
                Self::Number(number::last(answer).ok_or_else(|| format!("`answer` ({answer}) holds no number"))?)
            }
            ScorerName::Choice => {
                let right = letter(answer, of).ok_or_else(|| {
                    format!("`answer` ({answer}) is no letter from A to {}", char::from(b'A' + (of.max(1) - 1) as u8))
                })?;
                Self::Choice { right, of }
            }
            ScorerName::Json => {
                let value = serde_json::from_str(answer).map_err(|e| format!("`answer` is no JSON: {e}"))?;
                Self::Json(Arc::new(value))
            }
            ScorerName::Regex => {
                let regex = Regex::new(answer).map_err(|e| format!("`answer` is no regular expression: {e}"))?;
                Self::Regex(Arc::new(regex))
            }
            ScorerName::Command => return Err("the scorer `command` needs --score-command".into()),
        })
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> ScorerName {
        match self {
            Self::Exact => ScorerName::Exact,
            Self::Text => ScorerName::Text,
            Self::Number(_) => ScorerName::Number,
            Self::Choice { .. } => ScorerName::Choice,
            Self::Json(_) => ScorerName::Json,
            Self::Regex(_) => ScorerName::Regex,
            Self::Command(..) => ScorerName::Command,
        }
    }

    /// How good `reply` is as an answer to `prompt`, 0 … 1, where `answer` is right.
    ///
    /// # Errors
    /// The external command fails.
    pub fn score(&self, prompt: &str, answer: &str, reply: &str) -> Result<f64, CommandError> {
        let right = match self {
            Self::Exact => reply.trim() == answer.trim(),
            Self::Text => words(reply) == words(answer),
            Self::Number(right) => number::last(reply).is_some_and(|given| number::equal(given, *right)),
            Self::Choice { right, of } => letter(reply, *of) == Some(*right),
            Self::Json(right) => json::found(reply).is_some_and(|given| json::equal(&given, right)),
            // A pattern that takes too long on this reply does not match it.
            Self::Regex(regex) => regex.is_match(reply).unwrap_or(false),
            Self::Command(command, row) => return command.score(prompt, answer, reply, row),
        };
        Ok(f64::from(u8::from(right)))
    }
}

/// Words in lower case, without punctuation around or between them.
fn words(text: &str) -> Vec<String> {
    // Apostrophes stand inside words, and so do the marks of numbers.
    let inner = |c: char| matches!(c, '\'' | '’' | '.' | ',' | '-');
    text.split_whitespace()
        .flat_map(|part| part.split(|c: char| !c.is_alphanumeric() && !inner(c)))
        .map(|word| word.trim_matches(|c: char| !c.is_alphanumeric()).to_lowercase())
        .filter(|word| !word.is_empty())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn score(name: ScorerName, answer: &str, reply: &str) -> f64 {
        Scorer::new(name, answer, 4).and_then(|s| s.score("?", answer, reply).map_err(|e| e.to_string())).unwrap()
    }

    #[test]
    fn replies_and_scores() {
        use ScorerName::{Choice, Exact, Json, Number, Regex, Text};
        // Scorer, right answer, reply, whether it is right.
        let table = [
            (Exact, "Lima", " Lima\n", true),
            (Exact, "Lima", "lima", false),
            (Text, "It's Lima.", "  it's LIMA!", true),
            (Text, "twenty one", "twenty-one", false),
            (Text, "red, green", "Red green", true),
            (Text, "3.5", "3,5", false),
            (Text, "Lima", "Lima, Peru", false),
            (Text, "北京", "北京。", true),
            (Number, "1,250", "so there are $1250.00 in all.", true),
            (Number, "18", "Half of 36 is 18", true),
            (Number, "18", "18 is half of 36", false),
            (Number, "-3", "it is -3", true),
            (Number, "18", "none", false),
            (Choice, "B", "(B) because", true),
            (Choice, "B", "The answer is C", false),
            (Json, r#"{"a":1,"b":[1,2]}"#, "```json\n{\"b\": [1, 2], \"a\": 1.0}\n```", true),
            (Json, r#"{"a":1}"#, r#"{"a":"1"}"#, false),
            (Json, r#"{"a":1}"#, r#"{"a":1,"b":2}"#, false),
            (Regex, r"(?i)\blima\b", "It is LIMA.", true),
            (Regex, r"^Lima$", "It is Lima", false),
        ];
        for (scorer, answer, reply, right) in table {
            assert_eq!(score(scorer, answer, reply), f64::from(u8::from(right)), "{scorer:?} {answer:?} {reply:?}");
        }
    }

    #[test]
    fn answers_that_a_scorer_cannot_use_are_refused() {
        use ScorerName::{Choice, Command, Json, Number, Regex};
        for (scorer, answer, why) in [
            (Number, "many", "no number"),
            (Choice, "E", "from A to D"),
            (Json, "{", "no JSON"),
            (Regex, "(", "no regular expression"),
            (Command, "1", "--score-command"),
        ] {
            let refused = Scorer::new(scorer, answer, 4).expect_err("refused");
            assert!(refused.contains(why), "{scorer:?}: {refused}");
        }
    }

    #[test]
    fn a_pattern_that_explodes_is_no_match() {
        let reply = "a".repeat(40) + "b";
        assert_eq!(score(ScorerName::Regex, r"^(?=(a+)+$)\1c", &reply), 0.0);
    }
}
