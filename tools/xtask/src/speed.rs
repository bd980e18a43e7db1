//! `cargo xtask bench`: how fast a quantized model speaks, beside llama.cpp's llama-bench on the same weights at the same
//! bits, in turns.
//!
//! Both sides hold 4-bit integers in groups of 32 with 16-bit scales, rounded to nearest: a folder on ours, q4_0 on theirs.

use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What is compared.
pub(crate) struct Bench<'a> {
    pub(crate) bitmill: PathBuf,
    /// llama-bench.
    pub(crate) llama_bench: &'a Path,
    pub(crate) model: &'a Path,
    pub(crate) work: &'a Path,
    pub(crate) tokens: usize,
    pub(crate) rounds: usize,
    pub(crate) threads: usize,
}

impl Bench<'_> {
    /// Runs both in turns and prints medians and their ratio.
    pub(crate) fn run(&self) -> Result<()> {
        std::fs::create_dir_all(self.work).with_context(|| format!("creating {}", self.work.display()))?;
        let (folder, file) = (self.work.join("w4g32"), self.work.join("q4_0.gguf"));
        let options = ["--method", "rtn", "--no-report", "--force"];
        self.quantize(&folder, &[&options[..], &["--bits", "4", "--group-size", "32"]].concat())?;
        // The head of a folder stays in 16 bits, so that of the file does.
        let types = ["--scheme", "q4_0", "--output-tensor-type", "bf16", "--token-embedding-type", "bf16"];
        self.quantize(&file, &[&options[..], &types].concat())?;
        let mut rates: [Vec<f64>; 3] = Default::default();
        for _ in 0..self.rounds {
            rates[0].push(self.ours(&folder, "int8")?);
            rates[1].push(self.ours(&folder, "f32")?);
            rates[2].push(self.theirs(&file)?);
        }
        let [int8, full, llama] = rates.map(median);
        println!("{} tokens, {} threads, medians of {} rounds in turns", self.tokens, self.threads, self.rounds);
        println!("bitmill run, 8-bit inputs   {int8:>8.1} tokens/s  {:.2}x llama-bench", int8 / llama);
        println!("bitmill run, f32 inputs     {full:>8.1} tokens/s  {:.2}x llama-bench", full / llama);
        println!("llama-bench, q4_0           {llama:>8.1} tokens/s");
        Ok(())
    }

    fn quantize(&self, out: &Path, options: &[&str]) -> Result<()> {
        let mut command = Command::new(&self.bitmill);
        output(command.arg("quantize").arg(self.model).arg("-o").arg(out).args(options)).map(drop)
    }

    fn ours(&self, folder: &Path, activations: &str) -> Result<f64> {
        let mut command = Command::new(&self.bitmill);
        command.arg("run").arg(folder).args(["--prompt", "It was", "--temperature", "0", "--json"]);
        command.args(["--activations", activations, "--tokens", &self.tokens.to_string()]);
        let said = output(command.args(["--threads", &self.threads.to_string()]))?;
        let said: Value = serde_json::from_slice(&said).context("bitmill run --json")?;
        said["tokens_per_second"].as_f64().context("no tokens_per_second in bitmill run --json")
    }

    fn theirs(&self, file: &Path) -> Result<f64> {
        let mut command = Command::new(self.llama_bench);
        command.arg("-m").arg(file).args(["-p", "0", "-r", "1", "-o", "json", "-n", &self.tokens.to_string()]);
        let said = output(command.args(["-t", &self.threads.to_string()]))?;
        let said: Value = serde_json::from_slice(&said).context("llama-bench -o json")?;
        said[0]["avg_ts"].as_f64().context("no avg_ts in llama-bench -o json")
    }
}

/// What `command` prints.
fn output(command: &mut Command) -> Result<Vec<u8>> {
    let done = command.output().with_context(|| format!("starting {command:?}"))?;
    if !done.status.success() {
        bail!("{command:?} ended with {}: {}", done.status, String::from_utf8_lossy(&done.stderr));
    }
    Ok(done.stdout)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
