//! The `bitmill` command.

use bitmill::kernels::LineAllocator;
use std::process::ExitCode;

/// Buffers are what products read and write.
#[global_allocator]
static ALLOCATOR: LineAllocator = LineAllocator;

fn main() -> ExitCode {
    bitmill_cli::main()
}
