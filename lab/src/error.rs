//! What can go wrong in an experiment.

use std::path::PathBuf;

use tandem_engine::EngineError;
use tandem_router::policy::fit::FitError;
use tandem_router::policy::{PolicyError, PolicyFileError};

use crate::cluster::ClusterError;
use crate::pair::TwoTokenizers;
use crate::questions::RowError;
use crate::rows::Origin;
use crate::score::CommandError;

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
    #[error("{}:{line}: {problem}", path.display())]
    Row {
        /// The file.
        path: PathBuf,
        /// Line number, from 1.
        line: usize,
        /// What is wrong with it.
        problem: RowError,
    },
    /// A row has no right answer where one is needed.
    #[error("{at}: the row has no `answer`, which {wanted} needs; add the right answers")]
    NoAnswer {
        /// Where it stands.
        at: String,
        /// What needs it.
        wanted: &'static str,
    },
    /// A reply cannot be scored.
    #[error("{at}: {why}")]
    Scorer {
        /// Where its question stands.
        at: String,
        /// Why.
        why: CommandError,
    },
    /// There is nothing to work on.
    #[error("{0}")]
    Empty(String),
    /// A model failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The models cannot be a pair.
    #[error(transparent)]
    TwoTokenizers(#[from] TwoTokenizers),
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
    pub(crate) fn row(origin: &Origin, problem: RowError) -> Self {
        Self::Row { path: origin.file.to_path_buf(), line: origin.line, problem }
    }

    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}
