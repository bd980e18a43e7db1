//! Which loaders take an output, by what their sources say: facts per format and scheme, one row per loader.

use crate::Plan;
use bitmill_models::Role;
use bitmill_scheme::{Granularity, Scheme};
use std::collections::BTreeMap;

/// A program that loads quantized checkpoints.
struct Loader {
    name: &'static str,
    /// Why a linear of this format and scheme is not taken; `None` where it is.
    refuses: fn(format: &str, scheme: &Scheme) -> Option<String>,
    /// Whether Q, K, V and gate, up must have equal schemes, because they are loaded as one matrix.
    fuses: bool,
}

static LOADERS: [Loader; 4] = [
    Loader { name: "vLLM", refuses: vllm, fuses: true },
    Loader { name: "transformers", refuses: transformers, fuses: false },
    Loader { name: "GPTQModel", refuses: gptq_model, fuses: true },
    Loader { name: "llama.cpp", refuses: llama_cpp, fuses: false },
];

/// Names of the loaders.
#[must_use]
pub fn loader_names() -> Vec<&'static str> {
    LOADERS.iter().map(|l| l.name).collect()
}

/// Why the loader called `name` does not take a linear of `scheme` in `format`; `None` where it does.
#[must_use]
pub fn refusal(name: &str, format: &str, scheme: &Scheme) -> Option<String> {
    LOADERS.iter().find(|l| l.name == name).and_then(|l| (l.refuses)(format, scheme))
}

/// For every loader, what keeps it from loading the output of `plan`; an empty list is acceptance.
#[must_use]
pub fn loaders(plan: &Plan) -> Vec<(&'static str, Vec<String>)> {
    let of = |loader: &Loader| {
        let mut reasons: Vec<String> =
            plan.quantized().filter_map(|(_, scheme, _)| (loader.refuses)(plan.format.name(), scheme)).collect();
        if plan.spec.as_ref().is_some_and(|s| s.layout.transposed) && !matches!(plan.format.name(), "gptq" | "gguf") {
            reasons.push("the linears of this architecture are no nn.Linear, which it does not replace".into());
        }
        if loader.fuses {
            reasons.extend(torn(plan));
        }
        reasons.sort();
        reasons.dedup();
        (loader.name, reasons)
    };
    LOADERS.iter().map(of).collect()
}

/// Sites whose linears differ in scheme.
fn torn(plan: &Plan) -> Option<String> {
    let spec = plan.spec.as_ref()?;
    let schemes: BTreeMap<&String, &Scheme> = plan.quantized().map(|(m, s, _)| (m, s)).collect();
    let fused: [&[Role]; 2] = [&[Role::Q, Role::K, Role::V], &[Role::Gate, Role::Up]];
    let places = (0..spec.layers).flat_map(|b| fused.iter().map(move |roles| (b, *roles)));
    let differs = |(block, roles): &(usize, &[Role])| {
        let mut own = roles.iter().filter(|&&r| spec.has(r)).map(|&r| schemes.get(&spec.module(*block, r)));
        own.next().is_some_and(|first| own.any(|other| other != first))
    };
    let (block, roles) = { places }.find(differs)?;
    let names: Vec<&str> = roles.iter().map(|r| r.name()).collect();
    Some(format!("block {block}: {} are one matrix there and need one scheme", names.join(", ")))
}

fn vllm(format: &str, scheme: &Scheme) -> Option<String> {
    let bits = scheme.bits().get();
    let taken = match format {
        "pack-quantized" => scheme.symmetric() || matches!(bits, 4 | 8),
        "int-quantized" => true,
        "gptq" => matches!(bits, 4 | 8),
        _ => false,
    };
    (!taken).then(|| format!("{scheme} as {format} is not among its kernels"))
}

fn transformers(format: &str, scheme: &Scheme) -> Option<String> {
    match format {
        "gptq" => Some("it loads gptq folders through GPTQModel".into()),
        "pack-quantized" if !scheme.symmetric() => {
            Some("asymmetric packed weights need CompressedTensorsConfig(dequantize=True)".into())
        }
        _ => None,
    }
}

fn gptq_model(format: &str, scheme: &Scheme) -> Option<String> {
    match (format, scheme.granularity) {
        ("gptq", Granularity::Tensor) => Some("it has no scale per tensor".into()),
        ("gptq", _) => None,
        _ => Some(format!("it does not read {format}")),
    }
}

fn llama_cpp(format: &str, _: &Scheme) -> Option<String> {
    (format != "gguf").then(|| format!("it reads gguf files, not {format}"))
}
