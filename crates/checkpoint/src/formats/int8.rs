//! One signed byte per code: the storage that `int-quantized` and `naive-quantized` share.
//!
//! `weight` I8 `[out, in]` and `weight_zero_point` I8 hold the code less 2^(b−1); `weight_scale` is `[out, groups]`, or
//! `[1]` for one scale per tensor. Mapped groups have `weight_g_idx`, I32 `[in]`.

use super::pack_quantized::{check_scale_shape, map_spec, scale_shape};
use super::{group_map_bytes, part, read_group_map, read_scales, scale_bytes, scale_dtype, validated};
use crate::{Checkpoint, Error, TensorSpec, TensorView};
use bitmill_scheme::{Bits, Quantized, Scheme};
use safetensors::Dtype;

pub(super) fn layout(module: &str, scheme: &Scheme, shape: [usize; 2]) -> Vec<TensorSpec> {
    let spec = |suffix: &str, dtype, shape: Vec<usize>| TensorSpec::new(format!("{module}.{suffix}"), dtype, shape);
    let mut specs = vec![
        spec("weight", Dtype::I8, shape.to_vec()),
        spec("weight_scale", scale_dtype(scheme.scale), scale_shape(scheme, shape)),
    ];
    if !scheme.symmetric() {
        specs.push(spec("weight_zero_point", Dtype::I8, scale_shape(scheme, shape)));
    }
    specs.extend(map_spec(module, scheme, shape[1]));
    specs
}

pub(super) fn encode(q: &Quantized) -> Vec<Vec<u8>> {
    let middle = q.scheme.bits().middle();
    let signed = |codes: &[u8]| codes.iter().map(|c| c.wrapping_sub(middle)).collect::<Vec<u8>>();
    let mut payloads = vec![signed(&q.codes), scale_bytes(q.scales.iter().copied(), q.scheme.scale)];
    if !q.scheme.symmetric() {
        payloads.push(signed(&q.zeros));
    }
    if !q.group_of.is_empty() {
        payloads.push(group_map_bytes(q));
    }
    payloads
}

pub(super) fn shape(module: &str, source: &Checkpoint) -> Result<[usize; 2], Error> {
    let weight = part(source, module, "weight")?;
    let shape = weight.matrix()?;
    if shape.contains(&0) {
        return Err(weight.wrong_shape("a matrix that is not empty"));
    }
    Ok(shape)
}

pub(super) fn decode(module: &str, scheme: &Scheme, source: &Checkpoint) -> Result<Quantized, Error> {
    let weight = part(source, module, "weight")?;
    let shape = shape(module, source)?;
    if weight.dtype != Dtype::I8 {
        return Err(weight.wrong_dtype("I8"));
    }
    let scale = part(source, module, "weight_scale")?;
    let (stored, scales) = read_scales(&scale)?;
    let mut scheme = scheme.with_scale(stored);
    check_scale_shape(&scale, &scheme, shape)?;
    let zeros = match scheme.symmetric() {
        true => Vec::new(),
        false => read_zeros(&part(source, module, "weight_zero_point")?, &scheme, shape)?,
    };
    let codes = unsigned(weight.bytes, scheme.bits());
    let group_of = read_group_map(source, module, "weight_g_idx", &mut scheme, shape[1])?;
    validated(module, source, Quantized { scheme, shape, codes, scales, zeros, group_of, input: None })
}

/// Zero points that lie as the scales do, one signed byte each.
pub(super) fn read_zeros(view: &TensorView<'_>, scheme: &Scheme, shape: [usize; 2]) -> Result<Vec<u8>, Error> {
    check_scale_shape(view, scheme, shape)?;
    match view.dtype {
        Dtype::I8 => Ok(unsigned(view.bytes, scheme.bits())),
        _ => Err(view.wrong_dtype("I8")),
    }
}

/// Codes of signed bytes. A byte outside a narrow grid becomes 255, which validation refuses.
fn unsigned(bytes: &[u8], bits: Bits) -> Vec<u8> {
    let middle = i16::from(bits.middle());
    bytes.iter().map(|&b| u8::try_from(i16::from(b as i8) + middle).unwrap_or(u8::MAX)).collect()
}
