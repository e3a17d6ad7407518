//! Where questions come from: the line editor on a terminal, or text that is piped in.

use std::io::{IsTerminal as _, Read as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustyline::completion::Completer;
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::FileHistory;
use rustyline::validate::{ValidationContext, ValidationResult, Validator};
use rustyline::{Config, Editor, Helper};
use tokio::sync::mpsc;

use crate::failure::{Code, Failure, OrFail as _};
use crate::terminal::visible;

/// Questions kept for the arrow keys, in a file of the state folder.
const HISTORY_MAX: usize = 1000;
/// Name of that file.
const HISTORY_FILE: &str = "chat-history";
/// Most text that is read from a pipe, bytes; what the API takes at most.
pub(super) const PIPED_BYTES_MAX: usize = tandem_edge_node::api::BODY_BYTES_MAX;
/// Pieces of it that wait to be put together.
const PIECES_MAX: usize = 16;
/// How long a prompt on the command line waits for a pipe that says nothing. Whoever starts a program with
/// an open pipe that is never written to would otherwise wait for ever.
const PIPE_WAIT: Duration = Duration::from_secs(5);

/// What the person did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Typed {
    /// Typed or pasted text.
    Text(String),
    /// Ctrl-C at the prompt.
    Interrupt,
    /// Ctrl-D, or the end of the input.
    End,
}

/// The prompt: what was given and what was piped in.
pub(super) fn prompt(given: Option<&str>, piped: &str) -> Option<String> {
    let piped = piped.trim_end_matches(['\n', '\r']);
    match (given, piped.trim().is_empty()) {
        (Some(given), true) => Some(given.to_owned()),
        (Some(given), false) => Some(format!("{given}\n\n{piped}")),
        (None, true) => None,
        (None, false) => Some(piped.to_owned()),
    }
}

/// Reads standard input to its end. With a prompt `given`, a terminal is not read, and a pipe that is silent
/// is not waited for without a bound.
pub(super) async fn piped(given: bool) -> Result<String, Failure> {
    let input = std::io::stdin();
    if given && input.is_terminal() {
        return Ok(String::new());
    }
    let (pieces, mut read) = mpsc::channel::<std::io::Result<Vec<u8>>>(PIECES_MAX);
    // A thread of its own: a read cannot be stopped, and ends with the process.
    let reader = std::thread::Builder::new().name("stdin".into()).spawn(move || {
        let mut input = input.lock();
        let mut piece = vec![0; 64 << 10];
        loop {
            let got = input.read(&mut piece).map(|n| piece[..n].to_vec());
            let last = !matches!(&got, Ok(bytes) if !bytes.is_empty());
            if pieces.blocking_send(got).is_err() || last {
                return;
            }
        }
    });
    reader.or_fail(Code::Failed)?;
    let mut text = Vec::new();
    loop {
        let next = if given && text.is_empty() {
            let Ok(next) = tokio::time::timeout(PIPE_WAIT, read.recv()).await else {
                let seconds = PIPE_WAIT.as_secs();
                eprintln!(
                    "note: standard input is open and said nothing for {seconds} s; the prompt is asked without it (end it with `< /dev/null`)"
                );
                return Ok(String::new());
            };
            next
        } else {
            read.recv().await
        };
        let piece = match next {
            None => break,
            Some(piece) => piece.map_err(|e| Failure::new(Code::Failed, format!("standard input: {e}")))?,
        };
        if text.len() + piece.len() > PIPED_BYTES_MAX {
            let message = format!("standard input has more than {PIPED_BYTES_MAX} bytes; shorten it");
            return Err(Failure::new(Code::Usage, message));
        }
        text.extend_from_slice(&piece);
    }
    String::from_utf8(text).map_err(|_| Failure::new(Code::Usage, "standard input is no UTF-8 text; convert it first"))
}

/// The line editor.
pub(super) struct Lines {
    editor: Option<Editor<Continues, FileHistory>>,
    history: Option<PathBuf>,
}

impl Lines {
    /// An editor whose history lies in the state folder, if that is there.
    pub(super) fn new(state: &Path) -> Result<Self, Failure> {
        let config = Config::builder()
            .max_history_size(HISTORY_MAX)
            .and_then(|config| config.history_ignore_dups(true))
            .or_fail(Code::Failed)?
            .history_ignore_space(true)
            .auto_add_history(false)
            .bracketed_paste(true)
            .build();
        let mut editor = Editor::with_config(config).or_fail(Code::Failed)?;
        editor.set_helper(Some(Continues));
        let history = state.is_dir().then(|| state.join(HISTORY_FILE));
        if let Some(file) = &history {
            // There is none before the first question.
            let _ = editor.load_history(file);
        }
        Ok(Self { editor: Some(editor), history })
    }

    /// The next line, or several that belong together.
    pub(super) async fn next(&mut self) -> Result<Typed, Failure> {
        let Some(mut editor) = self.editor.take() else { return Ok(Typed::End) };
        let history = self.history.clone();
        let reading = tokio::task::spawn_blocking(move || {
            let read = editor.readline("> ");
            if let Ok(line) = &read
                && !line.trim().is_empty()
            {
                let added = editor.add_history_entry(line.as_str());
                if let (Ok(true), Some(file)) = (added, &history) {
                    // Without a history a conversation is as good.
                    let _ = editor.append_history(file);
                }
            }
            (editor, read)
        });
        let (editor, read) = reading.await.or_fail(Code::Failed)?;
        self.editor = Some(editor);
        match read {
            Ok(line) => Ok(Typed::Text(joined(&line))),
            Err(ReadlineError::Interrupted) => Ok(Typed::Interrupt),
            Err(ReadlineError::Eof) => Ok(Typed::End),
            Err(e) => Err(Failure::new(Code::Failed, format!("the terminal: {e}"))),
        }
    }
}

/// Lines that end with a backslash go on in the next one. What was pasted may hold control characters.
fn joined(text: &str) -> String {
    visible(&text.replace("\r\n", "\n").replace('\r', "\n")).replace("\\\n", "\n")
}

/// Lets a line go on that ends with a backslash.
struct Continues;

impl Validator for Continues {
    fn validate(&self, typed: &mut ValidationContext<'_>) -> rustyline::Result<ValidationResult> {
        let more = typed.input().ends_with('\\');
        Ok(if more { ValidationResult::Incomplete } else { ValidationResult::Valid(None) })
    }
}

impl Completer for Continues {
    type Candidate = String;
}

impl Hinter for Continues {
    type Hint = String;
}

impl Highlighter for Continues {}

impl Helper for Continues {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn piped_text_is_part_of_the_prompt() {
        let table = [
            (Some("summarise"), "a\nb\n", Some("summarise\n\na\nb")),
            (Some("hello"), "", Some("hello")),
            (Some("hello"), " \n", Some("hello")),
            (None, "hi\n", Some("hi")),
            (None, "  fn main() {}\n", Some("  fn main() {}")),
            (None, "\n", None),
        ];
        for (given, piped, expected) in table {
            assert_eq!(prompt(given, piped).as_deref(), expected, "{given:?} {piped:?}");
        }
    }

    #[test]
    fn lines_that_go_on_are_joined() {
        for (typed, expected) in [
            ("one", "one"),
            ("one\\\ntwo", "one\ntwo"),
            ("pasted\r\nlines\rhere", "pasted\nlines\nhere"),
            ("a\x1b[31mb", "a[31mb"),
        ] {
            assert_eq!(joined(typed), expected, "{typed:?}");
        }
    }
}
