//! `cargo xtask bench decode`: how fast a quantized model speaks, beside llama.cpp's llama-bench on the same weights at the same
//! bits, in turns.
//!
//! Both sides hold 4-bit integers in groups of 32 with 16-bit scales, rounded to nearest: a folder on ours, q4_0 on theirs.

use super::{made, median, output};
use crate::{built, root};
use anyhow::{Context, Result};
use clap::Args;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What is compared.
#[derive(Args)]
pub(crate) struct Decode {
    /// llama.cpp's llama-bench.
    #[arg(long)]
    llama_bench: PathBuf,
    /// A built bitmill, in place of building it.
    #[arg(long)]
    bitmill: Option<PathBuf>,
    /// Unquantized model folder.
    #[arg(long, default_value_os_t = root().join("models/books-10m"))]
    model: PathBuf,
    /// Tokens of a run.
    #[arg(long, default_value_t = 256)]
    tokens: usize,
    /// Rounds, of whose rates the median counts.
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Threads of both sides.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Scratch folder.
    #[arg(long, default_value_os_t = root().join("target/bench"))]
    work: PathBuf,
}

impl Decode {
    /// Runs both in turns and prints medians and their ratio.
    pub(crate) fn run(&self) -> Result<()> {
        let (bitmill, rounds) = (&built(self.bitmill.clone())?, self.rounds.max(1));
        made(&self.work)?;
        let (folder, file) = (self.work.join("w4g32"), self.work.join("q4_0.gguf"));
        let options = ["--method", "rtn", "--no-report", "--force"];
        self.quantize(bitmill, &folder, &[&options[..], &["--bits", "4", "--group-size", "32"]].concat())?;
        // The head of a folder stays in 16 bits, so that of the file does.
        let types = ["--scheme", "q4_0", "--output-tensor-type", "bf16", "--token-embedding-type", "bf16"];
        self.quantize(bitmill, &file, &[&options[..], &types].concat())?;
        let mut rates: [Vec<f64>; 3] = Default::default();
        for _ in 0..rounds {
            rates[0].push(self.ours(bitmill, &folder, "int8")?);
            rates[1].push(self.ours(bitmill, &folder, "f32")?);
            rates[2].push(self.theirs(&file)?);
        }
        let [int8, full, llama] = rates.map(median);
        println!("{} tokens, {} threads, medians of {} rounds in turns", self.tokens, self.threads, rounds);
        println!("bitmill run, 8-bit inputs   {int8:>8.1} tokens/s  {:.2}x llama-bench", int8 / llama);
        println!("bitmill run, f32 inputs     {full:>8.1} tokens/s  {:.2}x llama-bench", full / llama);
        println!("llama-bench, q4_0           {llama:>8.1} tokens/s");
        Ok(())
    }

    fn quantize(&self, bitmill: &Path, out: &Path, options: &[&str]) -> Result<()> {
        let mut command = Command::new(bitmill);
        output(command.arg("quantize").arg(&self.model).arg("-o").arg(out).args(options)).map(drop)
    }

    fn ours(&self, bitmill: &Path, folder: &Path, activations: &str) -> Result<f64> {
        let mut command = Command::new(bitmill);
        command.arg("run").arg(folder).args(["--prompt", "It was", "--temperature", "0", "--json"]);
        command.args(["--activations", activations, "--tokens", &self.tokens.to_string()]);
        let said = output(command.args(["--threads", &self.threads.to_string()]))?;
        let said: Value = serde_json::from_slice(&said).context("bitmill run --json")?;
        said["tokens_per_second"].as_f64().context("no tokens_per_second in bitmill run --json")
    }

    fn theirs(&self, file: &Path) -> Result<f64> {
        let mut command = Command::new(&self.llama_bench);
        command.arg("-m").arg(file).args(["-p", "0", "-r", "1", "-o", "json", "-n", &self.tokens.to_string()]);
        let said = output(command.args(["-t", &self.threads.to_string()]))?;
        let said: Value = serde_json::from_slice(&said).context("llama-bench -o json")?;
        said[0]["avg_ts"].as_f64().context("no avg_ts in llama-bench -o json")
    }
}
