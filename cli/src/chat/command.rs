//! What a person can type in a conversation beside questions.

use clap::ValueEnum as _;

use crate::args::ModeArg;

/// What `/help` prints.
pub(super) const HELP: &str = "\
/help            this text
/clear           begin anew: what was said is forgotten
/mode [MODE]     who may write: local, auto, exact, cloud, or default (the node's); without one, says which
/system [TEXT]   system prompt of the conversation; `none` for none; without a text, says which
/exit            end (also Ctrl-D)
//...             a question that begins with a slash
Ctrl-C stops an answer. A line that ends with \\ goes on in the next one; pasted lines stay together.
The arrow keys move in the line and through earlier questions, Ctrl-R searches them.";

/// A line, read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// A question.
    Ask(String),
    /// Nothing was typed.
    Nothing,
    /// `/help`.
    Help,
    /// `/clear`.
    Clear,
    /// `/mode`.
    ShowMode,
    /// `/mode MODE`; none for the node's.
    Mode(Option<ModeArg>),
    /// `/system`.
    ShowSystem,
    /// `/system TEXT`; none for none.
    System(Option<String>),
    /// `/exit`.
    Exit,
    /// Looks like a command and is none; says what is wrong.
    Wrong(String),
}

impl Command {
    /// Reads what was typed. Only a first word of letters after one slash is a command: paths are text.
    pub(super) fn parse(typed: &str) -> Self {
        let text = typed.trim();
        if text.is_empty() {
            return Self::Nothing;
        }
        if let Some(rest) = text.strip_prefix("//") {
            return Self::Ask(format!("/{rest}"));
        }
        let Some(line) = text.strip_prefix('/') else { return Self::Ask(text.to_owned()) };
        let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let rest = rest.trim();
        if word.is_empty() || !word.chars().all(|c| c.is_ascii_alphabetic()) {
            return Self::Ask(text.to_owned());
        }
        match (word, rest) {
            ("help", _) => Self::Help,
            ("clear", _) => Self::Clear,
            ("exit" | "quit", _) => Self::Exit,
            ("mode", "") => Self::ShowMode,
            ("mode", "default") => Self::Mode(None),
            ("mode", mode) => match ModeArg::from_str(mode, true) {
                Ok(mode) => Self::Mode(Some(mode)),
                Err(_) => Self::Wrong(format!("`{mode}` is no mode; there are local, auto, exact, cloud and default")),
            },
            ("system", "") => Self::ShowSystem,
            ("system", "none") => Self::System(None),
            ("system", text) => Self::System(Some(text.to_owned())),
            _ => Self::Wrong(format!("`/{word}` is no command; /help lists them, //{word} asks it as a question")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_and_questions() {
        let ask = |text: &str| Command::Ask(text.to_owned());
        let table = [
            ("  hello there ", ask("hello there")),
            ("", Command::Nothing),
            (" \n", Command::Nothing),
            ("/help", Command::Help),
            ("/clear now", Command::Clear),
            ("/mode", Command::ShowMode),
            ("/mode exact", Command::Mode(Some(ModeArg::Exact))),
            ("/mode default", Command::Mode(None)),
            ("/system", Command::ShowSystem),
            ("/system You are\nterse.", Command::System(Some("You are\nterse.".into()))),
            ("/system none", Command::System(None)),
            ("/quit", Command::Exit),
            ("//help", ask("/help")),
            ("/etc/passwd is what?", ask("/etc/passwd is what?")),
            ("/ is the root", ask("/ is the root")),
            ("two\nlines", ask("two\nlines")),
        ];
        for (typed, expected) in table {
            assert_eq!(Command::parse(typed), expected, "{typed:?}");
        }
        for (typed, said) in [("/mode fast", "local, auto, exact"), ("/sytem x", "/help")] {
            let Command::Wrong(message) = Command::parse(typed) else { panic!("{typed} is taken") };
            assert!(message.contains(said), "{message}");
        }
    }
}
