//! How a command can fail, and the exit codes that scripts may rely on.

use std::fmt::Display;
use std::process::ExitCode;

use crate::terminal::{json_line, visible};

/// Exit codes. Stable: a code keeps its meaning, new ones may come. 0 is success, 2 is clap's for a
/// command line that cannot be understood, 130 is an interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// Something failed that has no code of its own.
    Failed = 1,
    /// The command line, beyond what clap checks.
    Usage = 2,
    /// The configuration is refused.
    Config = 3,
    /// An address cannot be listened on.
    Listen = 4,
    /// The state folder or an identity in it cannot be used.
    State = 5,
    /// No node answers.
    NoNode = 6,
    /// The node answered with an error.
    Refused = 7,
    /// `doctor` found something broken.
    Unwell = 8,
    /// Ended by Ctrl-C before it was done.
    Interrupted = 130,
}

impl Code {
    /// Every code with its name, as in `--json` errors.
    pub const ALL: [(Self, &'static str); 9] = [
        (Self::Failed, "failed"),
        (Self::Usage, "usage"),
        (Self::Config, "config"),
        (Self::Listen, "listen"),
        (Self::State, "state"),
        (Self::NoNode, "no_node"),
        (Self::Refused, "refused"),
        (Self::Unwell, "unwell"),
        (Self::Interrupted, "interrupted"),
    ];

    /// The code as a process ends with it.
    #[must_use]
    pub fn number(self) -> u8 {
        self as u8
    }

    /// The code's name.
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(code, _)| *code == self).map_or("failed", |(_, name)| name)
    }

    /// The code called `name`.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, known)| *known == name).map(|(code, _)| *code)
    }
}

impl From<Code> for ExitCode {
    fn from(code: Code) -> Self {
        Self::from(code.number())
    }
}

/// Why a command failed: one line that says what is wrong and what to do, and the exit code.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    code: Code,
    message: String,
    quiet: bool,
}

impl Failure {
    /// A failure with its message.
    pub fn new(code: Code, message: impl Display) -> Self {
        Self { code, message: message.to_string(), quiet: false }
    }

    /// A failure that has been reported already; only the exit code is left to say.
    #[must_use]
    pub fn reported(code: Code) -> Self {
        Self { code, message: code.name().to_owned(), quiet: true }
    }

    /// The exit code.
    #[must_use]
    pub fn code(&self) -> Code {
        self.code
    }

    /// Writes the failure to standard error: a line, or a JSON object.
    pub fn report(&self, json: bool) {
        if self.quiet {
            return;
        }
        if json {
            eprintln!("{}", self.to_json());
        } else {
            eprintln!("error: {}", visible(&self.message));
        }
    }

    /// The failure as one line of JSON.
    #[must_use]
    pub fn to_json(&self) -> String {
        json_line(&serde_json::json!({ "error": { "message": self.message, "code": self.code.name() } }))
    }

    /// Reads [`Failure::to_json`].
    #[must_use]
    pub fn from_json(line: &str) -> Option<Self> {
        let value: serde_json::Value = serde_json::from_str(line).ok()?;
        let (message, code) = (value["error"]["message"].as_str()?, value["error"]["code"].as_str()?);
        Some(Self::new(Code::from_name(code)?, message))
    }
}

/// Gives an error an exit code.
pub(crate) trait OrFail<T> {
    /// The value, or a failure with `code` and the error's own words.
    fn or_fail(self, code: Code) -> Result<T, Failure>;
}

impl<T, E: Display> OrFail<T> for Result<T, E> {
    fn or_fail(self, code: Code) -> Result<T, Failure> {
        self.map_err(|e| Failure::new(code, e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The sentence "Exit codes: …" of a text, on one line, as a map from code to words.
    fn sentence(text: &str) -> Vec<(u8, String)> {
        let flat = text.split_whitespace().collect::<Vec<_>>().join(" ").replace('`', "");
        let (_, rest) = flat.split_once("Exit codes: ").expect("the sentence");
        let (sentence, _) = rest.split_once('.').expect("its end");
        let pair = |part: &str| {
            let (number, words) = part.split_once(' ').expect("a code and words");
            (number.parse().expect("a number"), words.to_owned())
        };
        sentence.split(", ").map(pair).collect()
    }

    #[test]
    fn codes_are_what_the_readme_and_the_help_say() {
        let readme = sentence(include_str!("../../README.md"));
        assert_eq!(readme, sentence(crate::args::AFTER));
        let numbers: Vec<u8> = readme.into_iter().map(|(number, _)| number).collect();
        let codes = std::iter::once(0).chain(Code::ALL.map(|(code, _)| code.number()));
        assert_eq!(numbers, codes.collect::<Vec<_>>());
    }

    #[test]
    fn failures_survive_their_line() {
        assert_eq!(Code::Listen.name(), "listen");
        for (code, _) in Code::ALL {
            let failure = Failure::new(code, "what and \"why\"");
            assert_eq!(Failure::from_json(&failure.to_json()), Some(failure));
        }
        assert_eq!(Failure::from_json("{}"), None);
    }
}
