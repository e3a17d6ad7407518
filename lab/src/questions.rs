//! Files of questions: JSONL of our own or of a public layout, with a scorer per file or row.

mod layout;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tandem_proto::ids::Digest;

use crate::error::LabError;
use crate::rows::{Origin, Row};
use crate::score::{CommandScorer, Scorer, ScorerName};
use layout::Asked;
pub use layout::Layout;

/// Largest data file, bytes.
pub const FILE_BYTES_MAX: u64 = 256 << 20;
/// Longest line, bytes.
pub const LINE_BYTES_MAX: usize = 1 << 20;
/// Most rows of a file.
pub const ROWS_MAX: usize = 200_000;
/// Most messages of a conversation.
pub const MESSAGES_MAX: usize = 256;

/// How to read a file.
#[derive(Clone, Debug, Default)]
pub struct ReadOptions {
    /// Its layout; told by each row's fields if absent.
    pub layout: Option<Layout>,
    /// The scorer of rows that name none; the layout's if absent.
    pub scorer: Option<ScorerName>,
    /// What the scorer `command` runs. Only a user names it, never a file.
    pub command: Option<Arc<CommandScorer>>,
}

/// A file of questions, as a report names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataReport {
    /// The file.
    pub path: PathBuf,
    /// Digest of its bytes.
    pub digest: String,
    /// Questions in it.
    pub questions: usize,
}

impl DataReport {
    /// As a line of Markdown.
    #[must_use]
    pub fn markdown(&self) -> String {
        format!("- data: {} ({} questions, digest {})\n", self.path.display(), self.questions, self.digest)
    }
}

/// What is wrong with a row.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RowError {
    /// The line is no JSON object.
    #[error("no JSON object: {0}")]
    Json(String),
    /// The line is too long.
    #[error("the line has {bytes} bytes, at most {LINE_BYTES_MAX} are read")]
    Long {
        /// Its length.
        bytes: usize,
    },
    /// Nothing says what the row is.
    #[error(
        "no known layout; a row has `prompt` or `messages`, and, if it is known, the right `answer`; or it is one of \
         GSM8K, of multiple choice (MMLU, ARC, HellaSwag, TruthfulQA) or of HumanEval"
    )]
    Layout,
    /// A field is missing or not what it must be.
    #[error("`{field}` {problem}")]
    Field {
        /// The field.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// The scorer cannot use the row.
    #[error("{0}")]
    Scorer(String),
    /// The question does not fit the models.
    #[error("the prompt has {tokens} tokens, which with {answer} of the answer are more than the context of {context}")]
    Tokens {
        /// Of the prompt.
        tokens: usize,
        /// Most of the answer.
        answer: usize,
        /// The smaller context of the two models.
        context: usize,
    },
}

/// Reads the questions of a JSONL file.
///
/// # Errors
/// [`LabError::Io`], [`LabError::Row`], [`LabError::Empty`].
pub fn read(path: &Path, options: &ReadOptions) -> Result<(Vec<Row>, DataReport), LabError> {
    let bytes = std::fs::metadata(path).map_err(LabError::io(path))?.len();
    let too_much = |what: String| LabError::Empty(format!("{} has {what}", path.display()));
    if bytes > FILE_BYTES_MAX {
        return Err(too_much(format!("{bytes} bytes, at most {FILE_BYTES_MAX} are read")));
    }
    let text = std::fs::read_to_string(path).map_err(LabError::io(path))?;
    let file: Arc<Path> = path.into();
    let mut rows = Vec::new();
    for (at, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        if rows.len() == ROWS_MAX {
            return Err(too_much(format!("more than {ROWS_MAX} rows")));
        }
        let origin = Origin { file: file.clone(), line: at + 1 };
        let row = row(line, options).map_err(|problem| LabError::row(&origin, problem))?;
        rows.push(Row { origin: Some(origin), ..row });
    }
    if rows.is_empty() {
        return Err(too_much("no question".into()));
    }
    let digest = Digest::of(text.as_bytes()).to_string();
    let report = DataReport { path: path.to_owned(), digest, questions: rows.len() };
    Ok((rows, report))
}

/// One line as a row.
fn row(line: &str, options: &ReadOptions) -> Result<Row, RowError> {
    if line.len() > LINE_BYTES_MAX {
        return Err(RowError::Long { bytes: line.len() });
    }
    let fields: Map<String, Value> = serde_json::from_str(line).map_err(|e| RowError::Json(e.to_string()))?;
    let layout = options.layout.or_else(|| Layout::of(&fields)).ok_or(RowError::Layout)?;
    let Asked { messages, answer, category, choices } = layout.read(&fields)?;
    let text = |field| fields.get(field).and_then(Value::as_str).unwrap_or_default().to_owned();
    let named = match fields.get("scorer") {
        None | Some(Value::Null) => None,
        Some(name) => Some(
            ScorerName::deserialize(name).map_err(|e| RowError::Field { field: "scorer", problem: e.to_string() })?,
        ),
    };
    let name = named.or(options.scorer).unwrap_or(layout.scorer());
    let scorer = match (name, &options.command) {
        (ScorerName::Command, Some(command)) => {
            Scorer::Command(command.clone(), Arc::new(Value::Object(fields.clone())))
        }
        // Nothing to score against.
        _ if answer.trim().is_empty() && name != ScorerName::Command => Scorer::Exact,
        _ => Scorer::new(name, &answer, choices).map_err(RowError::Scorer)?,
    };
    let prompt = messages.last().map(|message| message.content.clone()).unwrap_or_default();
    let mut key = text("key");
    // Equal sentences answer wordings of one problem; equal letters and numbers say nothing.
    if key.is_empty() && (layout != Layout::Own || name != ScorerName::Exact) {
        key.clone_from(&prompt);
    }
    Ok(Row { prompt, messages, answer, category, part: text("part"), key, scorer, origin: None })
}

#[cfg(test)]
mod tests;
