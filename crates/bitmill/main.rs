//! The `bitmill` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    bitmill_cli::main()
}
