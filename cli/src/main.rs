//! The `tandem` binary; everything it does is in the library `tandem_cli`.

use std::process::ExitCode;

fn main() -> ExitCode {
    tandem_cli::main()
}
