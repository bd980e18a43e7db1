//! The model card of an output folder: what Hugging Face shows of it. The same input gives the same card: no dates, no
//! paths, no seconds.

use crate::{Plan, loaders};
use serde_json::Value;

/// The card as Markdown, with the front matter that the hub reads.
pub(super) fn card(plan: &Plan, manifest: &Value) -> String {
    let kind = plan.spec.as_ref().map_or("model", |s| s.model_type.as_str());
    let bits = plan.bits_per_weight();
    let (weights, bytes) = plan.quantized_size();
    let scheme = plan.label();
    let format = plan.format.name();
    let (library, tag) = match format {
        "gptq" | "gptq_v2" => ("transformers", "gptq"),
        "awq" => ("transformers", "awq"),
        "binary" => ("bitmill", "billm"),
        _ => ("transformers", "compressed-tensors"),
    };
    let task = match &plan.spec {
        Some(spec) if spec.causal => "pipeline_tag: text-generation\n",
        Some(spec) if spec.images.is_some() => "pipeline_tag: image-feature-extraction\n",
        Some(_) => "pipeline_tag: sentence-similarity\n",
        None => "",
    };
    let mut text = format!("---\nlibrary_name: {library}\n{task}tags:\n- bitmill\n- quantized\n- {tag}\n---\n\n");
    text += &format!("# {kind}, {bits:.3} bits per weight\n\n");
    text += &format!(
        "Quantized with bitmill {} from a full-precision checkpoint of {} parameters: {weights} weights of linear layers as \
         {scheme} by `{}`, {bytes} bytes in the `{format}` format; everything else is as it was.\n\n",
        env!("CARGO_PKG_VERSION"),
        plan.parameters,
        plan.method.name(),
    );
    text += &kinds(plan);
    text += &quality(plan, manifest);
    text += &calibration(plan, manifest);
    text += "## Loading\n\n| program | |\n| --- | --- |\n";
    for (loader, reasons) in loaders(plan) {
        let verdict = if reasons.is_empty() { "loads it".to_owned() } else { reasons.join("; ") };
        text += &format!("| {loader} | {verdict} |\n");
    }
    text += "\nBy what these programs' sources say; `bitmill.json` holds every setting, hash and error of this run.\n";
    text
}

/// A row for every kind of linear and scheme.
fn kinds(plan: &Plan) -> String {
    let mut text = "| linear | scheme | tensors | bits per weight |\n| --- | --- | --- | --- |\n".to_owned();
    for ((role, scheme), kind) in plan.kinds() {
        text += &format!("| {role} | {scheme} | {} | {:.3} |\n", kind.tensors, kind.bits_per_weight());
    }
    text + "\n"
}

/// What was lost, as far as the run knows.
fn quality(plan: &Plan, manifest: &Value) -> String {
    let records = manifest["tensors"].as_array().map_or(&[][..], Vec::as_slice);
    let errors: Vec<f64> = records.iter().filter_map(|t| t["relative_error"].as_f64()).collect();
    let mean = errors.iter().sum::<f64>() / errors.len().max(1) as f64;
    let of = if records.first().is_some_and(|t| t["error_of"] == "output") { "layer outputs" } else { "weights" };
    let mut text = format!("## What was lost\n\nMean relative error of {of}: {mean:.3e}.");
    if let Some(mixture) = &plan.mixture {
        text += &format!(" Predicted KL divergence of the mixture: {:.5} nats per token.", mixture.predicted);
    }
    for stage in manifest["stages"].as_array().into_iter().flatten() {
        if let (Some(before), Some(after)) = (stage["before"].as_f64(), stage["after"].as_f64()) {
            let (name, loss) =
                (stage["stage"].as_str().unwrap_or_default(), stage["loss"].as_str().unwrap_or_default());
            let windows = &stage["held_out_windows"];
            text +=
                &format!(" After {name}, {loss} on {windows} held-out windows: {after:.5} ({before:.5} before it).");
        }
    }
    text + "\n\n"
}

fn calibration(plan: &Plan, manifest: &Value) -> String {
    let run = &manifest["run"]["calibration"];
    let parts: Vec<&Value> = if run.is_array() { run.as_array().into_iter().flatten().collect() } else { vec![run] };
    let part = |p: &&Value| {
        if let Some(pixels) = p["pixels"].as_str() {
            return Some(format!("{} images of {} tokens (BLAKE3 of the images {pixels})", p["images"], p["length"]));
        }
        let tokens = p["tokens"].as_str()?;
        Some(format!("{} windows of {} tokens (BLAKE3 of the ids {tokens})", p["windows"], p["length"]))
    };
    let described: Vec<String> = parts.iter().filter_map(part).collect();
    if described.is_empty() || !plan.calibrated {
        return "## Calibration\n\nNone: the method reads weights only.\n\n".into();
    }
    format!("## Calibration\n\n{}.\n\n", described.join("; "))
}
