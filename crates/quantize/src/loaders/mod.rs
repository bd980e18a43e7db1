//! Which loaders take an output, by what their sources say: one table of loaders, one of rules, for plans and for what
//! is written already.
//!
//! A rule speaks of a [`Subject`], which is all that a loader would see of a model: its tensors' names and shapes, how they are
//! quantized, and config.json. So a plan is held to the same rules before it is run as a folder afterwards.

mod keys;
mod rules;
mod subject;

use rules::RULES;
pub use subject::Subject;

use crate::{Error, Plan};
use bitmill_checkpoint::{Checkpoint, MIXED, default_format};
use bitmill_scheme::{Activations, BlockType, Granularity, GridKind, Scheme};

/// A program that loads quantized checkpoints.
struct Loader {
    /// Its name.
    name: &'static str,
    /// Why a linear of this format and scheme is not taken; `None` where it is.
    refuses: fn(format: &str, scheme: &Scheme) -> Option<String>,
    /// The same of experts, whose kernels know less.
    refuses_experts: fn(format: &str, scheme: &Scheme) -> Option<String>,
    /// What has to be installed beside it for a format.
    needs: fn(format: &str) -> Option<&'static str>,
    /// Whether Q, K, V and gate, up must have equal schemes, because they are loaded as one matrix.
    fuses: bool,
    /// Whether it makes room for parameters by config.json and refuses what has none.
    strict: bool,
    /// Whether it cuts matrices for several devices.
    splits: bool,
    /// Whether it runs encoders of images.
    images: bool,
    /// Formats whose weights it makes bf16 of, whatever the type of the model.
    bf16: Option<&'static [&'static str]>,
}

fn nothing(_: &str) -> Option<&'static str> {
    None
}

/// A loader that refuses nothing and asks for nothing.
const PLAIN: Loader = Loader {
    name: "",
    refuses: |_, _| None,
    refuses_experts: |_, _| None,
    needs: nothing,
    fuses: false,
    strict: false,
    splits: false,
    images: false,
    bf16: None,
};

static LOADERS: [Loader; 6] = [
    Loader {
        name: "vLLM",
        refuses: vllm,
        refuses_experts: vllm_experts,
        fuses: true,
        strict: true,
        splits: true,
        ..PLAIN
    },
    Loader {
        name: "SGLang",
        refuses: sglang,
        refuses_experts: sglang_experts,
        fuses: true,
        strict: true,
        splits: true,
        ..PLAIN
    },
    Loader {
        name: "transformers",
        refuses: transformers,
        refuses_experts: transformers_experts,
        needs: packages,
        images: true,
        bf16: Some(&["nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"]),
        ..PLAIN
    },
    Loader { name: "GPTQModel", refuses: gptq_model, fuses: true, ..PLAIN },
    Loader { name: "llama.cpp", refuses: llama_cpp, ..PLAIN },
    Loader { name: "mistral.rs", refuses: mistral_rs, ..PLAIN },
];

/// A rule of a loader.
struct Rule {
    /// Its name.
    name: &'static str,
    /// What it asks for.
    about: &'static str,
    /// What breaks it.
    broken: fn(&Subject, &Loader, &Demands) -> Vec<String>,
    /// Whether it is among what is asked: a rule that was not looked at is not met.
    asked: fn(&Demands) -> bool,
}

/// What is asked of an output beside what a loader always asks.
#[derive(Debug, Clone, Default)]
pub struct Demands {
    /// Devices that every matrix is cut for; 0 and 1 are none.
    pub tensor_parallel: usize,
    /// The model it was made of: names and shapes of its tensors.
    pub original: Option<Vec<(String, Vec<usize>)>>,
}

/// What became of a rule.
#[derive(Debug, Clone, PartialEq)]
pub struct Verdict {
    /// The rule.
    pub rule: &'static str,
    /// What it asks for.
    pub about: &'static str,
    /// What breaks it; nothing where it is met.
    pub broken: Vec<String>,
}

/// Names of the loaders.
#[must_use]
pub fn loader_names() -> Vec<&'static str> {
    LOADERS.iter().map(|l| l.name).collect()
}

/// The loader called `name`, in whatever case.
fn loader(name: &str) -> Option<&'static Loader> {
    LOADERS.iter().find(|l| l.name.eq_ignore_ascii_case(name))
}

/// Why the loader called `name` does not take a linear of `scheme` in `format`; `None` where it does.
#[must_use]
pub fn refusal(name: &str, format: &str, scheme: &Scheme) -> Option<String> {
    loader(name).and_then(|l| refused(l, format, scheme))
}

/// Why `loader` does not take `scheme` as `format`; in a mixture, as the format of the matrix.
fn refused(loader: &Loader, format: &str, scheme: &Scheme) -> Option<String> {
    (loader.refuses)(if format == MIXED { default_format(scheme) } else { format }, scheme)
}

/// What has to be installed beside the loader called `name` for `subject`.
#[must_use]
pub fn needed(name: &str, subject: &Subject) -> Option<&'static str> {
    loader(name).and_then(|l| (l.needs)(subject.format()))
}

/// Every rule of the loader called `name` that `demands` ask for, and what of `subject` breaks it.
#[must_use]
pub fn verdicts(name: &str, subject: &Subject, demands: &Demands) -> Vec<Verdict> {
    let Some(loader) = loader(name) else { return Vec::new() };
    let verdict =
        |rule: &Rule| Verdict { rule: rule.name, about: rule.about, broken: (rule.broken)(subject, loader, demands) };
    RULES.iter().filter(|rule| (rule.asked)(demands)).map(verdict).collect()
}

/// For every loader, what keeps it from loading the output of `plan`; an empty list is acceptance.
#[must_use]
pub fn loaders(plan: &Plan) -> Vec<(&'static str, Vec<String>)> {
    let subject = Subject::of_plan(plan);
    let of = |loader: &Loader| {
        let all = verdicts(loader.name, &subject, &Demands::default());
        (loader.name, all.into_iter().flat_map(|v| v.broken).collect())
    };
    LOADERS.iter().map(of).collect()
}

/// Names and shapes of the tensors of a model, for [`Demands::original`].
///
/// # Errors
/// None but those of an input that is quantized itself and damaged.
pub fn tensors_of(model: &Checkpoint) -> Result<Vec<(String, Vec<usize>)>, Error> {
    let subject = Subject::of_checkpoint(model)?;
    Ok(subject.weights().map(|(name, shape)| (name.to_owned(), shape.to_vec())).collect())
}

fn kernels(taken: bool, format: &str, scheme: &Scheme) -> Option<String> {
    (!taken).then(|| format!("{scheme} as {format} is not among its kernels"))
}

/// Groups that the kernels of GPTQ and AWQ files know.
fn usual_group(scheme: &Scheme) -> bool {
    matches!(
        scheme.granularity,
        Granularity::Channel | Granularity::Group(32 | 64 | 128) | Granularity::Mapped(32 | 64 | 128)
    )
}

fn vllm(format: &str, scheme: &Scheme) -> Option<String> {
    let bits = scheme.bits().get();
    let taken = match format {
        // Beside 8-bit floats.
        "pack-quantized" if scheme.activations != Activations::Full => {
            matches!(scheme.granularity, Granularity::Group(128) | Granularity::Channel)
        }
        "pack-quantized" => bits > 1 && (scheme.symmetric() || matches!(bits, 4 | 8)),
        // Those of 4 bits on Arm alone.
        "int-quantized" => true,
        "gptq" => matches!(bits, 4 | 8) && scheme.symmetric() && usual_group(scheme),
        "awq" => usual_group(scheme),
        "auto-round" => matches!(bits, 2 | 3 | 4 | 8),
        "float-quantized" => fp8(scheme),
        "nvfp4-pack-quantized" | "mxfp4-pack-quantized" | "mxfp8-quantized" | "modelopt" | "fp8" => true,
        _ => false,
    };
    kernels(taken, format, scheme)
}

/// 8-bit floats that kernels know: scales per tensor or channel, or in tiles of 128.
fn fp8(scheme: &Scheme) -> bool {
    matches!(scheme.granularity, Granularity::Tensor | Granularity::Channel | Granularity::Tile(128))
}

/// The kernels for all experts of a block at once: 4 and 8 bits, the latter by channel, and no map of groups.
fn vllm_experts(format: &str, scheme: &Scheme) -> Option<String> {
    let bits = scheme.bits().get();
    let wide = bits == 8 && scheme.granularity != Granularity::Channel;
    match (format, scheme.granularity) {
        (_, Granularity::Mapped(_)) => {
            Some(format!("experts as {scheme}: its kernels know no order of inputs (desc_act)"))
        }
        ("pack-quantized", _) if !matches!(bits, 4 | 8) => {
            Some(format!("experts as {scheme}: its kernels for mixtures take 4 and 8 bits"))
        }
        ("pack-quantized", _) if wide => {
            Some(format!("experts as {scheme}: its kernels for mixtures take 8 bits by channel alone"))
        }
        _ => None,
    }
}

/// The kernels that vLLM has, and GPTQ files of 4 and 8 bits.
fn sglang_experts(format: &str, scheme: &Scheme) -> Option<String> {
    match format {
        "gptq" if !matches!(scheme.bits().get(), 4 | 8) => {
            Some(format!("experts as {scheme}: its kernels for mixtures take 4 and 8 bits"))
        }
        _ => vllm_experts(format, scheme),
    }
}

fn sglang(format: &str, scheme: &Scheme) -> Option<String> {
    let bits = scheme.bits().get();
    let taken = match format {
        "pack-quantized" => matches!(bits, 4 | 8) && scheme.symmetric() && scheme.activations == Activations::Full,
        "int-quantized" => bits == 8,
        "gptq" => scheme.symmetric() && usual_group(scheme),
        "awq" => usual_group(scheme),
        "auto-round" => matches!(bits, 2 | 3 | 4 | 8),
        "float-quantized" => fp8(scheme),
        "nvfp4-pack-quantized" | "modelopt" | "fp8" => true,
        _ => false,
    };
    kernels(taken, format, scheme)
}

fn transformers(format: &str, scheme: &Scheme) -> Option<String> {
    match format {
        "pack-quantized" if !scheme.symmetric() => {
            Some("asymmetric packed weights need CompressedTensorsConfig(dequantize=True)".into())
        }
        "modelopt" | "binary" => Some(format!("it does not read {format}")),
        _ => None,
    }
}

/// It holds experts stacked, which bitsandbytes does not replace.
fn transformers_experts(format: &str, scheme: &Scheme) -> Option<String> {
    (format == "bitsandbytes")
        .then(|| format!("experts as {scheme}: it holds them stacked, where bitsandbytes finds none"))
}

fn packages(format: &str) -> Option<&'static str> {
    match format {
        "gptq" | "gptq_v2" | "awq" => Some("the package gptqmodel"),
        "pack-quantized"
        | "int-quantized"
        | "naive-quantized"
        | "float-quantized"
        | "nvfp4-pack-quantized"
        | "mxfp4-pack-quantized"
        | "mxfp8-quantized"
        | "mixed-precision" => Some("the package compressed-tensors"),
        "bitsandbytes" => Some("the package bitsandbytes"),
        "auto-round" => Some("the package auto-round"),
        "gguf" => Some("the package gguf, and room for the weights as plain numbers"),
        _ => None,
    }
}

fn gptq_model(format: &str, scheme: &Scheme) -> Option<String> {
    match (format, scheme.granularity) {
        ("gptq" | "gptq_v2", Granularity::Tensor) => Some("it has no scale per tensor".into()),
        ("gptq" | "gptq_v2" | "awq", _) => None,
        _ => Some(format!("it does not read {format}")),
    }
}

fn llama_cpp(format: &str, _: &Scheme) -> Option<String> {
    (format != "gguf").then(|| format!("it reads gguf files, not {format}"))
}

fn mistral_rs(format: &str, scheme: &Scheme) -> Option<String> {
    use BlockType::{Q2K, Q3K, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
    let taken = match (format, scheme.grid) {
        ("gguf", GridKind::Block(kind)) => {
            matches!(kind, Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q8_0 | Q2K | Q3K | Q4K | Q5K | Q6K)
        }
        ("gptq" | "awq", _) => true,
        _ => false,
    };
    kernels(taken, format, scheme)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_in_any_case() {
        assert!(
            ["vllm", "SGLANG", "transformers", "llama.cpp", "mistral.rs", "gptqmodel"]
                .iter()
                .all(|n| loader(n).is_some())
        );
        assert!(loader("ollama").is_none());
    }
}
