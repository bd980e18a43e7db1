//! `cargo xtask bench products` and `dense`: the products that bitmill spends its time in, beside those of llama.cpp, of
//! oneDNN and of faer.
//!
//! Each is a `cargo bench` that has a program of `tools` do the same work in turns.

use super::{interpreter, require_package};
use crate::{cargo, run};
use anyhow::{Context, Result, bail};
use clap::Args;
use std::path::PathBuf;
use std::process::Command;

/// The program that calls faer.
const FAER: &str = "tools/faer/Cargo.toml";
/// Where PyTorch and numpy come from.
const REFERENCE: &str = "make an environment with `python3.11 -m venv VENV && VENV/bin/pip install -r \
                         tools/reference/requirements.txt`, then pass --python VENV/bin/python";

/// Products with 4-bit weights.
#[derive(Args)]
pub(crate) struct Products {
    /// Interpreter of a Python environment with numpy.
    #[arg(long)]
    python: PathBuf,
    /// Folder of libggml-base.so and libggml-cpu.so, which a shared build of llama.cpp leaves in its bin.
    #[arg(long)]
    ggml: PathBuf,
    /// Threads of both sides.
    #[arg(long, default_value_t = 2)]
    threads: usize,
}

impl Products {
    /// Runs both in turns and prints medians and their ratios.
    pub(crate) fn run(&self) -> Result<()> {
        for library in ["libggml-base.so", "libggml-cpu.so"] {
            if !self.ggml.join(library).is_file() {
                bail!(
                    "{} holds no {library}; build llama.cpp (its source is in vendor/ of the source package of \
                     llama-cpp-python) with `cmake -B BUILD -DBUILD_SHARED_LIBS=ON -DCMAKE_BUILD_TYPE=Release && \
                     cmake --build BUILD`, then pass --ggml BUILD/bin. On a CPU with AMX its current release stops with \
                     an illegal instruction unless it is built without: add -DGGML_NATIVE=OFF -DGGML_AVX512=ON \
                     -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON -DGGML_FMA=ON -DGGML_F16C=ON \
                     -DGGML_BMI2=ON",
                    self.ggml.display()
                );
            }
        }
        let python = interpreter(&self.python)?;
        require_package(&python, "numpy", REFERENCE)?;
        let folder = std::path::absolute(&self.ggml).context("finding the folder of --ggml")?;
        let mut peer = Command::new(python);
        peer.arg("tools/reference/ggml_products.py").arg("--ggml").arg(folder);
        beside("products", peer, self.threads)
    }
}

/// Dense products and factors.
#[derive(Args)]
pub(crate) struct Dense {
    /// Interpreter of a Python environment with PyTorch, to run beside oneDNN.
    #[arg(long, required_unless_present = "faer")]
    python: Option<PathBuf>,
    /// Runs beside faer, whose products are of f32.
    #[arg(long, conflicts_with_all = ["python", "isa"])]
    faer: bool,
    /// The most that oneDNN may use, by its own name (AVX512_CORE_BF16: no AMX), to hold what bitmill does on lesser CPUs
    /// against what oneDNN does there.
    #[arg(long)]
    isa: Option<String>,
    /// Threads of both sides.
    #[arg(long, default_value_t = 2)]
    threads: usize,
}

impl Dense {
    /// Runs both in turns and prints rates and their ratios.
    pub(crate) fn run(&self) -> Result<()> {
        let Some(python) = &self.python else {
            // Built before anything is timed.
            run(cargo().args(["build", "--release", "--manifest-path", FAER]))?;
            let mut peer = cargo();
            peer.args(["run", "--quiet", "--release", "--manifest-path", FAER, "--"]);
            return beside("stages", peer, self.threads);
        };
        let python = interpreter(python)?;
        require_package(&python, "torch", REFERENCE)?;
        let mut peer = Command::new(python);
        peer.arg("tools/reference/torch_products.py").args(self.isa.iter().flat_map(|isa| ["--isa", isa]));
        beside("stages", peer, self.threads)
    }
}

/// A bench of the root package, with a program that does the same work in turns.
fn beside(bench: &str, mut peer: Command, threads: usize) -> Result<()> {
    let threads = threads.max(1).to_string();
    peer.args(["--threads", &threads]);
    let mut command = cargo();
    command.env("RAYON_NUM_THREADS", &threads).args(["bench", "--bench", bench, "--", "--beside"]);
    run(command.arg(peer.get_program()).args(peer.get_args()))
}
