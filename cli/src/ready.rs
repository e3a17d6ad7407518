//! The line that a process prints once it serves.

use serde::{Deserialize, Serialize};

use crate::failure::{Code, Failure};
use crate::terminal::{json_line, visible};

/// What a `router`, `cloud` or `edge` process says with `--json` once it serves, on one line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ready {
    /// True; marks the line.
    pub(crate) ready: bool,
    /// `router`, `cloud` or `edge`.
    pub(crate) role: String,
    /// Name of the node.
    pub(crate) node: String,
    /// Address it listens on, with the real port.
    pub(crate) listen: String,
    /// The address as a URL.
    pub(crate) url: String,
    /// The page, for an edge.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) page: Option<String>,
    /// Address of `/metrics`, if asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) metrics: Option<String>,
    /// Process id.
    pub(crate) pid: u32,
}

impl Ready {
    /// Prints the line, for a program or for a person.
    pub(crate) fn print(&self, json: bool) -> Result<(), Failure> {
        if json {
            print_json(&serde_json::to_value(self).map_err(|e| Failure::new(Code::Failed, e))?);
        } else {
            print_line(&self.words());
        }
        Ok(())
    }

    fn words(&self) -> String {
        let mut words = format!("{:7}{}", self.role, self.url);
        if let Some(page) = &self.page {
            words.push_str(&format!("     page {page}"));
        }
        if let Some(metrics) = &self.metrics {
            words.push_str(&format!("     metrics {metrics}"));
        }
        words
    }
}

/// A value as one line of JSON.
pub(crate) fn to_line<T: Serialize>(value: &T) -> Result<String, Failure> {
    serde_json::to_string(value).map_err(|e| Failure::new(Code::Failed, e))
}

/// Prints JSON on one line at once.
pub(crate) fn print_json(value: &serde_json::Value) {
    let _ = write(&format!("{}\n", json_line(value)));
}

/// Prints a line at once, also into a pipe. A reader that is gone is no reason to stop serving.
pub(crate) fn print_line(line: &str) {
    let _ = print(&format!("{line}\n"));
}

/// Prints at once, also into a pipe, without control sequences; a reader that is gone ends the command
/// without a word.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    write(&visible(text))
}

fn write(text: &str) -> Result<(), Failure> {
    use std::io::Write as _;
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(|_| Failure::reported(Code::Failed))
}
