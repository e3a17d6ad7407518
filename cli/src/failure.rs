//! How a command can fail, and the exit codes that scripts may rely on.

use std::fmt::Display;
use std::process::ExitCode;

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

    /// The code that a child process ended with, if it is one of these.
    #[must_use]
    pub fn from_number(number: i32) -> Option<Self> {
        Self::ALL.iter().map(|(code, _)| *code).find(|code| i32::from(code.number()) == number)
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
            let value = serde_json::json!({ "error": { "message": self.message, "code": self.code.name() } });
            eprintln!("{value}");
        } else {
            eprintln!("error: {}", self.message);
        }
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

    #[test]
    fn codes_are_what_the_readme_says() {
        let table = [1, 2, 3, 4, 5, 6, 7, 8, 130];
        assert_eq!(Code::ALL.map(|(code, _)| code.number()), table);
        for number in table {
            assert_eq!(Code::from_number(number.into()).map(Code::number), Some(number));
        }
        assert_eq!(Code::from_number(0), None);
        assert_eq!(Code::Listen.name(), "listen");
    }
}
