//! `tandem bench`: measurements of one machine.

use crate::args::{BenchArgs, BenchCommand, Global};
use crate::failure::{Code, Failure};

/// Measures and prints JSON.
pub(crate) fn run(_global: &Global, args: &BenchArgs) -> Result<(), Failure> {
    match &args.command {
        BenchCommand::Engine(_) => Err(Failure::new(Code::Failed, "not wired yet")),
    }
}
