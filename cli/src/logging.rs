//! Logs to standard error.

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;

use crate::failure::{Code, Failure};

/// Filter where none is given, on a terminal and elsewhere alike: what is wrong must be in a log file, too.
const DEFAULT: &str = "warn,tandem=info";

/// Starts logging with `filter`, or with the default one if it is empty.
pub(crate) fn start(filter: &str) -> Result<(), Failure> {
    let terminal = std::io::stderr().is_terminal();
    let chosen = if filter.is_empty() { DEFAULT } else { filter };
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
