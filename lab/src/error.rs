//! What can go wrong in an experiment.

use std::path::PathBuf;

use tandem_engine::EngineError;
use tandem_router::policy::fit::FitError;
use tandem_router::policy::{PolicyError, PolicyFileError};

use crate::cluster::ClusterError;

/// Why an experiment cannot run.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// A file cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A line of a data file is not a row.
    #[error("{}:{line}: {problem}; each line is one JSON object with `prompt`, `category` and, if it is known, the right `answer`", path.display())]
    Row {
        /// The file.
        path: PathBuf,
        /// Line number, from 1.
        line: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// A row has no right answer where one is needed.
    #[error("the row `{prompt}` has no `answer`, which {wanted} needs; add the right answers")]
    NoAnswer {
        /// Its question.
        prompt: String,
        /// What needs it.
        wanted: &'static str,
    },
    /// There is nothing to work on.
    #[error("{0}")]
    Empty(String),
    /// A model failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A policy cannot be built.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// A policy file cannot be used.
    #[error(transparent)]
    PolicyFile(#[from] PolicyFileError),
    /// The rule cannot be fitted.
    #[error(transparent)]
    Fit(#[from] FitError),
    /// The nodes under test cannot be started.
    #[error("the nodes under test: {0}")]
    Cluster(#[from] ClusterError),
    /// An answer failed.
    #[error("prompt {prompt} in mode {mode}: {problem}")]
    Answer {
        /// Index of the prompt.
        prompt: usize,
        /// The mode.
        mode: &'static str,
        /// What the node said.
        problem: String,
    },
    /// A plot cannot be drawn.
    #[error("the plot cannot be drawn: {0}")]
    Plot(String),
}

impl LabError {
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}
