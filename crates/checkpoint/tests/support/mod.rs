//! What the tests of this crate share: deterministic matrices and folders written through the public API.

#![allow(dead_code, reason = "each test file uses its own part")]
#![allow(clippy::unwrap_used, reason = "a failed test panics")]

use bitmill_checkpoint::{Checkpoint, Format, OutputPlan};
use bitmill_scheme::{Activations, Bits, FloatType, Granularity, GridKind, Quantized, SCHEMES, ScaleType, Scheme};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// A small deterministic generator.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, n: u32) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        ((self.0 >> 33) as u32) % n
    }
}

/// A matrix that uses every code, negative and tiny scales included.
pub(crate) fn quantized(scheme: Scheme, shape: [usize; 2], random: &mut Random) -> Quantized {
    let max = u32::from(scheme.bits().max_code());
    let scales = scheme.scales(shape);
    let zeros = if scheme.symmetric() { 0 } else { scales };
    let number = |code: u8| match scheme.grid {
        GridKind::Float(float) if !float.is_number(code) => 0,
        _ => code,
    };
    let mut q = Quantized {
        scheme,
        shape,
        codes: (0..shape[0] * shape[1]).map(|_| number(random.below(max + 1) as u8)).collect(),
        scales: (0..scales).map(|_| scheme.scale.round((random.below(2000) as f32 - 1000.0) * 1e-4)).collect(),
        zeros: (0..zeros).map(|_| random.below(max + 1) as u8).collect(),
        group_of: match scheme.granularity {
            Granularity::Mapped(_) => (0..shape[1]).map(|i| ((i + 1) % scheme.groups(shape[1])) as u32).collect(),
            _ => vec![],
        },
        // Of which the reciprocal is exact, too.
        input: scheme.activations.is_calibrated().then_some(0.25),
    };
    if scheme.grid == GridKind::Binary {
        // A column is salient for all rows or for none.
        let (cols, first) = (shape[1], q.codes[..shape[1]].to_vec());
        q.codes.iter_mut().enumerate().for_each(|(i, code)| *code = *code & 3 | first[i % cols] & 4);
    }
    if scheme.has_divisor() {
        // Of which the reciprocal is exact.
        q.scales.push(0.125);
    }
    q.validate().unwrap();
    q
}

/// Whether a matrix of `shape` can have groups out of order, if `scheme` asks for that.
pub(crate) fn can_be(scheme: &Scheme, shape: [usize; 2]) -> bool {
    !matches!(scheme.granularity, Granularity::Mapped(_)) || scheme.groups(shape[1]) > 1
}

/// Every scheme there is, over a few group sizes.
pub(crate) fn schemes() -> Vec<Scheme> {
    let mut all = Vec::new();
    for bits in Bits::ALL {
        for symmetric in [true, false] {
            for granularity in [
                Granularity::Tensor,
                Granularity::Channel,
                Granularity::Group(8),
                Granularity::Group(32),
                Granularity::Mapped(8),
            ] {
                for scale in [ScaleType::F16, ScaleType::Bf16, ScaleType::F32] {
                    for activations in [Activations::Full, Activations::DynamicInt8] {
                        all.push(Scheme { grid: GridKind::Int { bits, symmetric }, granularity, scale, activations });
                    }
                }
            }
        }
    }
    let presets = SCHEMES.iter().map(|p| p.scheme).filter(|s| matches!(s.grid, GridKind::Float(_)));
    all.extend(presets.filter(|s| s.activations != Activations::Full));
    // Channels come last: a row less of them does not go unnoticed.
    let groups = [Granularity::Tensor, Granularity::Tile(16), Granularity::Group(8), Granularity::Channel];
    let mut floats = |float, scales: &[ScaleType], granularities: &[Granularity]| {
        for (&scale, &granularity) in scales.iter().flat_map(|s| granularities.iter().map(move |g| (s, g))) {
            all.push(Scheme::float(float, granularity, scale));
        }
    };
    floats(FloatType::E4m3, &[ScaleType::F16, ScaleType::Bf16, ScaleType::F32], &groups);
    floats(FloatType::E4m3, &[ScaleType::E8m0], &[Granularity::Group(32)]);
    floats(FloatType::E2m1, &[ScaleType::E8m0], &[Granularity::Group(32)]);
    floats(FloatType::Nf4, &[ScaleType::F32], &[Granularity::Group(64), Granularity::Group(32)]);
    floats(FloatType::Fp4, &[ScaleType::F32], &[Granularity::Group(64), Granularity::Group(32)]);
    floats(FloatType::E2m1, &[ScaleType::E4m3], &[Granularity::Group(16), Granularity::Group(8)]);
    all.extend([8, 32].map(Scheme::binary));
    all
}

/// Writes `layers` in `format` as a complete folder.
pub(crate) fn write(
    dir: &Path,
    format: &dyn Format,
    layers: &BTreeMap<String, Quantized>,
    shard_limit: u64,
) -> OutputPlan {
    let specs = layers.iter().flat_map(|(m, q)| format.layout(m, &q.scheme, q.shape)).collect();
    let plan = OutputPlan::new(specs, shard_limit).unwrap();
    let output = plan.create(dir).unwrap();
    for (module, q) in layers {
        for (spec, payload) in format.layout(module, &q.scheme, q.shape).iter().zip(format.encode(module, q)) {
            assert_eq!(spec.bytes(), payload.len(), "{}: layout and payload", spec.name);
            output.write(&spec.name, &payload).unwrap();
        }
    }
    output.sync().unwrap();
    let schemes = layers.iter().map(|(m, q)| (m.clone(), q.scheme)).collect();
    let config = format.config(&schemes, &["lm_head".to_owned()]).unwrap();
    let config = json!({"model_type": "llama", "quantization_config": config});
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    plan
}

/// One shard in memory with the given tensors.
pub(crate) fn shard(tensors: &[(&str, safetensors::Dtype, &[usize], Vec<u8>)]) -> Vec<u8> {
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (name.to_string(), safetensors::tensor::TensorView::new(*dtype, shape.to_vec(), bytes).unwrap())
    });
    safetensors::serialize(views, None).unwrap()
}

/// A checkpoint in memory.
pub(crate) fn open(quantization: Value, tensors: &[(&str, safetensors::Dtype, &[usize], Vec<u8>)]) -> Checkpoint {
    Checkpoint::in_memory(json!({"quantization_config": quantization}), shard(tensors)).unwrap()
}

/// Words as bytes.
pub(crate) fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

/// Bytes as words.
pub(crate) fn as_words(bytes: &[u8]) -> Vec<u32> {
    bytes.as_chunks::<4>().0.iter().map(|&b| u32::from_le_bytes(b)).collect()
}
