//! The `bitmill` command: arguments, progress and reports. One file per command, no arithmetic.
//!
//! Results go to standard output (a table, or JSON with `--json`), progress and notes to standard error. Exit codes:
//! 0 done, 1 refused or failed, 2 wrong arguments, 130 stopped by Ctrl-C with everything finished kept.

mod bench;
mod beside;
mod calibrate;
mod dequantize;
mod effort;
mod eval;
mod gguf;
mod goal;
mod inspect;
mod mixed;
mod plan;
mod progress;
mod quantize;
mod report;
mod run;
mod search;
mod text;
mod units;
mod watch;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Post-training quantization of neural-network weights: bounded memory, resumable, on the CPU.
#[derive(Debug, Parser)]
#[command(name = "bitmill", version, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Quantize(quantize::Args),
    Plan(plan::Args),
    Calibrate(calibrate::Args),
    Dequantize(dequantize::Args),
    Eval(eval::Args),
    Inspect(inspect::Args),
    Report(report::Args),
    Bench(bench::Args),
    Run(run::Args),
}

/// Options every command has.
#[derive(Debug, clap::Args)]
struct Common {
    /// Worker threads; all cores by default. The result does not depend on it
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
    /// Print the result as JSON on standard output
    #[arg(long)]
    json: bool,
    /// Activations kept in memory; beyond it they are spilled to a file
    #[arg(long, value_name = "SIZE", default_value = "4GiB", value_parser = units::parse_bytes)]
    stream_memory: u64,
}

impl Common {
    fn set_threads(&self) -> anyhow::Result<()> {
        if let Some(n) = self.threads {
            rayon::ThreadPoolBuilder::new().num_threads(n.into()).build_global()?;
        }
        Ok(())
    }
}

/// Runs the command line of this process.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Quantize(args) => quantize::run(&args),
        Command::Plan(args) => plan::run(&args),
        Command::Calibrate(args) => calibrate::run(&args),
        Command::Dequantize(args) => dequantize::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Report(args) => report::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Run(args) => run::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            let stopped = matches!(error.downcast_ref(), Some(bitmill_quantize::Error::Stopped { .. }));
            ExitCode::from(if stopped { 130 } else { 1 })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_argument_table_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
