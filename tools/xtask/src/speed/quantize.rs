//! `cargo xtask bench quantize`: GPTQ with 4 bits in groups of 128, from a model folder to a quantized one, beside GPTQModel
//! and llm-compressor on windows of the same text.
//!
//! bitmill does plain GPTQ here, as they do: what it does besides by default is turned off, and `--flags` turns on again.

use super::{cleared, interpreter, made, median, megabytes, output, require_package, timed};
use crate::{built, reference_dir, root};
use anyhow::{Context, Result};
use clap::Args;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Runs of bitmill in a round: it takes far less time than the others.
const RUNS: usize = 3;

/// Plain GPTQ; a flag of one's own takes the place of one here.
const FLAGS: [(&str, &str); 9] = [
    ("--method", "gptq"),
    ("--bits", "4"),
    ("--group-size", "128"),
    ("--target-shift", "off"),
    ("--written", "0"),
    ("--tuning-passes", "0"),
    ("--descent-sweeps", "0"),
    ("--scale-refits", "0"),
    ("--scale-search", "squares"),
];

/// What is compared.
#[derive(Args)]
pub(crate) struct Quantize {
    /// Interpreter of a Python environment with GPTQModel, to compare with it.
    #[arg(long, value_name = "PYTHON")]
    gptqmodel: Option<PathBuf>,
    /// Interpreter of a Python environment with llm-compressor, to compare with it.
    #[arg(long, value_name = "PYTHON")]
    llm_compressor: Option<PathBuf>,
    /// A built bitmill, in place of building it.
    #[arg(long)]
    bitmill: Option<PathBuf>,
    /// Unquantized model folder.
    #[arg(long, default_value_os_t = root().join("models/books-10m"))]
    model: PathBuf,
    /// Text to calibrate on.
    #[arg(long, default_value_os_t = root().join("models/books-10m/calibration.txt"))]
    calibration: PathBuf,
    /// Windows of it.
    #[arg(long, default_value_t = 128)]
    samples: usize,
    /// Tokens of a window.
    #[arg(long, default_value_t = 512)]
    sequence_length: usize,
    /// Another text, to compare what the results lose.
    #[arg(long)]
    text: Option<PathBuf>,
    /// Windows of it.
    #[arg(long, default_value_t = 60)]
    windows: usize,
    /// Rounds, of whose times the median counts: three runs of bitmill, then one of each other.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Threads of all sides.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Scratch folder; the quantized models stay there.
    #[arg(long, default_value_os_t = root().join("target/bench"))]
    work: PathBuf,
    /// More flags of `bitmill quantize`, with spaces between; they take the place of the bench's own.
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    flags: String,
}

/// A program and what its runs took.
struct Measured {
    name: &'static str,
    /// Of bitmill, none.
    python: Option<PathBuf>,
    folder: PathBuf,
    /// Seconds of quantizing alone; of bitmill's runs, of everything.
    seconds: Vec<f64>,
    /// Seconds with loading and saving.
    whole: Vec<f64>,
    memory: u64,
}

impl Quantize {
    /// Runs all in turns and prints medians, ratios, memory and, with a text, errors.
    pub(crate) fn run(&self) -> Result<()> {
        let named = [("GPTQModel", &self.gptqmodel), ("llm-compressor", &self.llm_compressor)];
        let mut peers = Vec::new();
        for (name, python) in named {
            if let Some(python) = python {
                let python = interpreter(python)?;
                let (package, remedy) = needs(name);
                require_package(&python, package, remedy)?;
                peers.push(self.measured(name, Some(python)));
            }
        }
        let (bitmill, rounds) = (built(self.bitmill.clone())?, self.rounds.max(1));
        made(&self.work)?;
        let mut ours = self.measured("bitmill", None);
        let plan: Value = serde_json::from_slice(&output(self.ours(&bitmill, &ours.folder).arg("--dry-run"))?)
            .context("bitmill quantize --dry-run --json")?;
        let estimate = plan["peak_memory_estimate"].as_u64().context("no peak_memory_estimate in the plan")?;
        for round in 1..=rounds {
            for _ in 0..RUNS {
                let folder = cleared(ours.folder.clone())?;
                let (seconds, said) = timed(&mut self.ours(&bitmill, &folder))?;
                ours.add(&said, [seconds; 2])?;
            }
            for peer in &mut peers {
                self.theirs(peer)?;
            }
            eprintln!("round {round} of {rounds} is done");
        }
        println!(
            "GPTQ, 4 bits in groups of 128, {} windows of {} tokens, {} threads, medians of {rounds} rounds in turns",
            self.samples, self.sequence_length, self.threads
        );
        let base = median(ours.whole.clone());
        for side in std::iter::once(&ours).chain(&peers) {
            let kl = self.kl(&bitmill, &side.folder)?;
            println!("{}", side.row(base, estimate) + &kl);
        }
        Ok(())
    }

    fn measured(&self, name: &'static str, python: Option<PathBuf>) -> Measured {
        let folder = self.work.join(format!("gptq-{}", name.to_lowercase()));
        Measured { name, python, folder, seconds: Vec::new(), whole: Vec::new(), memory: 0 }
    }

    /// The command of a run of bitmill.
    fn ours(&self, bitmill: &Path, out: &Path) -> Command {
        let mut command = Command::new(bitmill);
        command.arg("quantize").arg(&self.model).arg("-o").arg(out).arg("--calibration").arg(&self.calibration);
        command.args(["--sequence-length", &self.sequence_length.to_string(), "--samples", &self.samples.to_string()]);
        command.args(["--threads", &self.threads.to_string()]);
        let own: Vec<&str> = self.flags.split_whitespace().collect();
        for (name, value) in
            FLAGS.into_iter().filter(|(name, _)| !own.iter().any(|word| word.split('=').next() == Some(*name)))
        {
            command.args([name, value]);
        }
        command.args(["--force", "--no-report", "--json"]).args(own);
        command
    }

    /// A run of another program.
    fn theirs(&self, peer: &mut Measured) -> Result<()> {
        let Some(python) = &peer.python else { return Ok(()) };
        let place = |path: &Path| std::path::absolute(path).with_context(|| format!("finding {}", path.display()));
        let mut command = Command::new(python);
        // Some leave logs where they are started.
        command.current_dir(&self.work);
        command.arg(reference_dir().join("quantize_peers.py")).args(["--peer", &peer.name.to_lowercase()]);
        command.arg("--model").arg(place(&self.model)?).arg("--calibration").arg(place(&self.calibration)?);
        command.args(["--sequence-length", &self.sequence_length.to_string(), "--samples", &self.samples.to_string()]);
        command.args(["--threads", &self.threads.to_string()]).arg("--out").arg(place(&cleared(peer.folder.clone())?)?);
        let said = output(&mut command)?;
        let times: Value = serde_json::from_slice(&said).context("the answer of quantize_peers.py")?;
        let seconds =
            |name: &str| times[name].as_f64().with_context(|| format!("no {name} in the answer of {}", peer.name));
        let seconds = [seconds("seconds")?, seconds("whole")?];
        peer.add(&said, seconds)
    }

    /// What a result loses, in words; nothing without a text.
    fn kl(&self, bitmill: &Path, folder: &Path) -> Result<String> {
        let Some(text) = &self.text else { return Ok(String::new()) };
        let mut command = Command::new(bitmill);
        command.arg("eval").arg(folder).arg("--reference").arg(&self.model).arg("--text").arg(text);
        let said = output(command.args(["--json", "--windows", &self.windows.to_string()]))?;
        let said: Value = serde_json::from_slice(&said).context("bitmill eval --json")?;
        let of = |name: &str| {
            let kl = said["divergence"]["kl"][name].as_f64();
            kl.with_context(|| format!("no divergence.kl.{name} in bitmill eval --json"))
        };
        Ok(format!("  KL {:.5} ± {:.5}", of("mean")?, of("error")?))
    }
}

impl Measured {
    /// Counts a run by its JSON and its seconds, of quantizing and of everything.
    fn add(&mut self, said: &[u8], [seconds, whole]: [f64; 2]) -> Result<()> {
        let said: Value = serde_json::from_slice(said).with_context(|| format!("the JSON of {}", self.name))?;
        self.seconds.push(seconds);
        self.whole.push(whole);
        let memory = said["peak_memory"].as_u64();
        self.memory = self.memory.max(memory.with_context(|| format!("no peak_memory in the JSON of {}", self.name))?);
        Ok(())
    }

    /// Its line, beside the seconds of a run of bitmill.
    fn row(&self, ours: f64, estimate: u64) -> String {
        let (seconds, whole) = (median(self.seconds.clone()), median(self.whole.clone()));
        let memory = megabytes(self.memory);
        match self.python {
            None => format!(
                "{:<15} {whole:>8.2} s, all of it                                        {memory} (estimated {})",
                self.name,
                megabytes(estimate)
            ),
            Some(_) => format!(
                "{:<15} {seconds:>8.2} s ({:.1}x), with loading and saving {whole:>8.2} s ({:.1}x)  {memory}",
                self.name,
                seconds / ours,
                whole / ours
            ),
        }
    }
}

/// The package of another program, and where it comes from.
fn needs(name: &str) -> (&'static str, &'static str) {
    match name {
        "GPTQModel" => (
            "gptqmodel",
            "make an environment with `python3.11 -m venv VENV && VENV/bin/pip install -r \
             tools/reference/requirements.txt`, then pass --gptqmodel VENV/bin/python",
        ),
        _ => (
            "llmcompressor",
            "make an environment of its own with `python3.11 -m venv VENV && VENV/bin/pip install llmcompressor`, then \
             pass --llm-compressor VENV/bin/python",
        ),
    }
}
