//! The tensors of an output, written at their places.

use crate::plan::cache_scales;
use crate::{Error, Plan};
use bitmill_checkpoint::{Output, TensorView};
use bitmill_models::ModelSpec;
use bitmill_scheme::Quantized;

/// Writes a tensor that is not quantized with other numbers in it.
pub(super) fn write_values(plan: &Plan, output: &Output, view: &TensorView<'_>, values: &[f32]) -> Result<(), Error> {
    let bytes = match &plan.gguf {
        Some(gguf) => gguf.with_values(view, values)?,
        None => view.with_values(values)?,
    };
    Ok(output.write(view.name, &bytes)?)
}

/// Writes the tensors of a quantized matrix.
pub(super) fn write_quantized(plan: &Plan, output: &Output, module: &str, quantized: &Quantized) -> Result<(), Error> {
    let specs = plan.format.layout(module, &quantized.scheme, quantized.shape);
    for (spec, bytes) in specs.iter().zip(plan.format.encode(module, quantized)) {
        match &plan.gguf {
            Some(gguf) => output.write(&spec.name, &gguf.ordered(&spec.name, quantized.shape[0], bytes))?,
            None => output.write(&spec.name, &bytes)?,
        }
    }
    Ok(())
}

/// Writes the scales of keys and values of `block`.
pub(super) fn write_cache_scales(
    output: &Output,
    spec: &ModelSpec,
    block: usize,
    scales: [f32; 2],
) -> Result<(), Error> {
    for (spec, scale) in cache_scales(spec, block).iter().zip(scales) {
        output.write(&spec.name, &scale.to_le_bytes())?;
    }
    Ok(())
}
