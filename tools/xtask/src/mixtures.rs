//! `cargo xtask mixtures`: mixed widths against every uniform scheme of the same size, and mixtures of GGUF types against
//! llama.cpp's named ones of the same size, on the model of the repository.
//!
//! Each output is made by gptq alone, without target shift or tuning, from the same text, and measured on the same windows of
//! another. What is done stays in the work folder, one JSON file an output; delete it to measure anew.

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Mean bits that mixtures have to meet.
const TARGETS: [&str; 5] = ["2.5", "3.0", "3.5", "4.0", "4.5"];
/// A uniform scheme this little above the target still counts as one of at most its size: 16 bytes of shape in every tensor
/// would otherwise push the nearest ones out.
const SLACK_BITS: f64 = 0.002;

/// llama.cpp's mixtures that are held against ours.
const NAMED: [&str; 8] = ["q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m", "q5_k_m", "iq2_m", "iq3_m"];

/// What an output takes and loses.
struct Measured {
    name: String,
    bytes: u64,
    /// Types of embedding and output matrix, where they were quantized.
    ends: [Option<String>; 2],
    bits: f64,
    kl: f64,
    error: f64,
}

/// Where things are.
pub(crate) struct Bench<'a> {
    pub(crate) bitmill: PathBuf,
    pub(crate) model: &'a Path,
    pub(crate) text: &'a Path,
    pub(crate) work: &'a Path,
}

impl Bench<'_> {
    /// Measures everything and prints the comparison; an error unless mixtures are below at every target.
    pub(crate) fn run(&self) -> Result<()> {
        std::fs::create_dir_all(self.work).with_context(|| format!("creating {}", self.work.display()))?;
        let mut uniform = Vec::new();
        for bits in 2..=4 {
            for group in ["32", "64", "128", "-1"] {
                for symmetry in ["", "asym"] {
                    let name = format!("w{bits}g{group}{symmetry}");
                    let bits = bits.to_string();
                    let mut flags = vec!["--bits", &bits, "--group-size", group];
                    if symmetry == "asym" {
                        flags.push("--asymmetric");
                    }
                    uniform.push(self.measure(&name, &flags)?);
                }
            }
        }
        uniform.sort_by_key(|m| m.bytes);
        for m in &uniform {
            println!("{:<12} {:>8.4} bits  KL {:.5} ± {:.5}", m.name, m.bits, m.kl, m.error);
        }
        let options = options();
        let (mut failures, mut rows) = (Vec::new(), Vec::new());
        for target in TARGETS {
            let mixed = self.measure(&format!("mix-{target}"), &["--bits", target, "--options", &options])?;
            let bits: f64 = target.parse()?;
            let fits = uniform.iter().filter(|m| m.bits <= bits + SLACK_BITS);
            let best = fits.min_by(|a, b| a.kl.total_cmp(&b.kl)).context("no uniform scheme is that small")?;
            let below = 100.0 * (1.0 - mixed.kl / best.kl);
            println!(
                "{target} bits: mixture {:.5} ± {:.5} at {:.4}, best uniform {:.5} ({}): {below:.1}% below",
                mixed.kl, mixed.error, mixed.bits, best.kl, best.name
            );
            rows.push(json!({"target": bits, "bits": mixed.bits, "kl": mixed.kl, "kl_error": mixed.error,
                "uniform": best.name, "uniform_bits": best.bits, "uniform_kl": best.kl, "below_percent": below}));
            let needed = if matches!(target, "3.0" | "3.5") { 15.0 } else { 0.0 };
            if below <= needed || mixed.bits > bits {
                failures.push(target);
            }
        }
        let named = self.named(&mut failures)?;
        let all: Vec<Value> = uniform.iter().map(|m| json!({"name": m.name, "bits": m.bits, "kl": m.kl})).collect();
        let result = json!({"mixtures": rows, "gguf": named, "uniform": all});
        let file = self.work.join("mixtures.json");
        std::fs::write(&file, format!("{result:#}\n")).with_context(|| format!("writing {}", file.display()))?;
        if !failures.is_empty() {
            bail!("the mixture is not far enough below at {}", failures.join(", "));
        }
        Ok(())
    }

    /// llama.cpp's mixtures, and ours of no more bytes with the same types at the ends.
    fn named(&self, failures: &mut Vec<&'static str>) -> Result<Vec<Value>> {
        let mut rows = Vec::new();
        for name in NAMED {
            let theirs = self.measure(&format!("{name}.gguf"), &["--mix", name])?;
            let size = theirs.bytes.to_string();
            let mut flags = vec!["--size", size.as_str()];
            for (flag, kind) in ["--token-embedding-type", "--output-tensor-type"].into_iter().zip(&theirs.ends) {
                flags.extend(kind.iter().flat_map(|kind| [flag, kind.as_str()]));
            }
            let ours = self.measure(&format!("like-{name}.gguf"), &flags)?;
            let below = 100.0 * (1.0 - ours.kl / theirs.kl);
            println!(
                "{name}: mixture {:.5} ± {:.5} in {} bytes, llama.cpp's types {:.5} in {}: {below:.1}% below",
                ours.kl, ours.error, ours.bytes, theirs.kl, theirs.bytes
            );
            rows.push(json!({"name": name, "bytes": ours.bytes, "kl": ours.kl, "kl_error": ours.error,
                "named_bytes": theirs.bytes, "named_kl": theirs.kl, "below_percent": below}));
            if below <= 0.0 || ours.bytes > theirs.bytes {
                failures.push(name);
            }
        }
        Ok(rows)
    }

    /// Makes and measures one output, unless that was done.
    fn measure(&self, name: &str, flags: &[&str]) -> Result<Measured> {
        let record = self.work.join(format!("{name}.json"));
        if !record.exists() {
            let out = self.work.join(name);
            let statistics = self.statistics()?;
            // Found by its name: mixtures of one text share what they are chosen by.
            std::fs::copy(&statistics, self.work.join(format!("{name}.stats.safetensors")))?;
            let mut quantize = Command::new(&self.bitmill);
            quantize.arg("quantize").arg(self.model).arg("-o").arg(&out).args(flags);
            quantize.args(["--method", "gptq", "--tuning-passes", "0", "--target-shift", "off", "--written", "0"]);
            let made = self.json(quantize.args(["--sequence-length", "512", "--force", "--no-report"]))?;
            let evaluated = self.json(
                Command::new(&self.bitmill)
                    .arg("eval")
                    .arg(&out)
                    .arg("--reference")
                    .arg(self.model)
                    .arg("--text")
                    .arg(self.text)
                    .args(["--windows", "60"]),
            )?;
            let kl = &evaluated["divergence"]["kl"];
            let end = |module: &str| -> Value {
                let tensors = made["tensors"].as_array().into_iter().flatten();
                tensors.filter(|t| t["tensor"] == module).map(|t| t["scheme"].clone()).next().unwrap_or_default()
            };
            let value = json!({"bytes": made["output_bytes"], "bits": made["bits_per_weight"], "kl": kl["mean"],
                "error": kl["error"], "ends": [end("model.embed_tokens"), end("lm_head")]});
            std::fs::write(&record, format!("{value:#}\n"))?;
            if out.is_dir() { std::fs::remove_dir_all(&out) } else { std::fs::remove_file(&out) }?;
        }
        let text = std::fs::read_to_string(&record)?;
        let value: Value = serde_json::from_str(&text).with_context(|| format!("reading {}", record.display()))?;
        let number = |key: &str| value[key].as_f64().with_context(|| format!("{}: no {key}", record.display()));
        let bytes = value["bytes"].as_u64().with_context(|| format!("{}: no bytes", record.display()))?;
        let ends = [0, 1].map(|i| value["ends"][i].as_str().map(str::to_owned));
        Ok(Measured {
            name: name.into(),
            bytes,
            ends,
            bits: number("bits")?,
            kl: number("kl")?,
            error: number("error")?,
        })
    }

    /// Statistics of the calibration text, collected once.
    fn statistics(&self) -> Result<PathBuf> {
        let file = self.work.join("stats.safetensors");
        if !file.exists() {
            self.json(
                Command::new(&self.bitmill)
                    .arg("calibrate")
                    .arg(self.model)
                    .arg("-o")
                    .arg(&file)
                    .args(["--sequence-length", "512"]),
            )?;
        }
        Ok(file)
    }

    /// The JSON a command prints.
    fn json(&self, command: &mut Command) -> Result<Value> {
        let output = command.arg("--json").output().with_context(|| format!("starting {}", self.bitmill.display()))?;
        if !output.status.success() {
            bail!("{command:?} failed:\n{}", String::from_utf8_lossy(&output.stderr));
        }
        serde_json::from_slice(&output.stdout).with_context(|| format!("what {command:?} printed"))
    }
}

/// Every width, group size and symmetry of the comparison, for mixtures to choose from.
fn options() -> String {
    let mut all = Vec::new();
    for bits in 2..=8 {
        for group in ["g32", "g64", "g128"] {
            for symmetry in ["sym", "asym"] {
                all.push(format!("{bits}{group}{symmetry}"));
            }
        }
    }
    all.join(",")
}
