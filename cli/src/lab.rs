//! `tandem lab`: the experiments of `tandem_lab`.

use crate::args::{Global, LabArgs};
use crate::failure::{Code, Failure};

/// Runs an experiment.
pub(crate) fn run(_global: &Global, _args: LabArgs) -> Result<(), Failure> {
    Err(Failure::new(Code::Failed, "not wired yet"))
}
