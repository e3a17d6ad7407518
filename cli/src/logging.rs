//! Logs to standard error.

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;

use crate::failure::{Code, Failure};

/// Filter on a terminal.
const ON_TERMINAL: &str = "warn,tandem=info";
/// Filter elsewhere.
const ELSEWHERE: &str = "warn";

/// Starts logging with `filter`, or with the default one if it is empty.
pub(crate) fn start(filter: &str) -> Result<(), Failure> {
    let terminal = std::io::stderr().is_terminal();
    let default = if terminal { ON_TERMINAL } else { ELSEWHERE };
    let chosen = if filter.is_empty() { default } else { filter };
    let parsed = EnvFilter::try_new(chosen).map_err(|e| {
        Failure::new(
            Code::Config,
            format!("the log filter `{chosen}` is not one: {e}; try `info` or `warn,tandem=debug`"),
        )
    })?;
    // A second start in one process (tests) keeps the first one's subscriber.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(parsed)
        .with_writer(std::io::stderr)
        .with_ansi(terminal)
        .with_target(false)
        .try_init();
    Ok(())
}
