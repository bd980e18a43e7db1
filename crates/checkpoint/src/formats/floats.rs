//! The float formats: those of compressed-tensors, and two that store the same bytes under other names.
//!
//! | format | `weight` or `weight_packed` | `weight_scale` |
//! | --- | --- | --- |
//! | `float-quantized` | F8_E4M3 `[out, in]` | 16 or 32 bits; `[1]`, `[out, groups]`, or `[⌈out/n⌉, ⌈in/n⌉]` for tiles |
//! | `mxfp8-quantized` | F8_E4M3 `[out, in]` | U8 `[out, in/32]`, the byte of 2^(byte − 127) |
//! | `mxfp4-pack-quantized` | U8 `[out, in/2]` | U8 `[out, in/32]`, the same |
//! | `nvfp4-pack-quantized` | U8 `[out, in/2]` | F8_E4M3 `[out, in/16]` |
//! | `modelopt` | U8 `[out, in/2]` | F8_E4M3 `[out, in/16]` |
//! | `fp8` | F8_E4M3 `[out, in]` | `weight_scale_inv`, a multiplier all the same, F32 `[⌈out/128⌉, ⌈in/128⌉]` |
//!
//! Two 4-bit codes share a byte, that of the even input in its low half. NVFP4 has `weight_global_scale`, F32 `[1]`, which the
//! scales are divided by; ModelOpt's `weight_scale_2`, F32 `[]`, is its reciprocal.
//!
//! What calibration says of inputs is one more number: `input_scale`, F32 `[1]`, what 8-bit floats are multiplied by, or
//! `input_global_scale`, F32 `[1]`, what NVFP4's scales are divided by, of which ModelOpt's `input_scale`, F32 `[]`, is the
//! reciprocal.

use super::pack_quantized::{check_scale_shape, scale_shape};
use super::{
    Format, assert_encodable, check_shape, compressed_tensors, default_format, fine_grained, gpt_oss, modelopt, part,
    read_scales, refuse_binary, scale_bytes, scale_dtype, unsupported, validated,
};
use crate::{Checkpoint, Dialect, Error, TensorSpec};
use bitmill_scheme::{Activations, FloatType, Granularity, GridKind, Quantized, ScaleType, Scheme, exponent_value};
use safetensors::Dtype;
use serde_json::Value;
use std::collections::BTreeMap;

/// Outputs and inputs of a tile, and inputs of a group of activations, that kernels know.
pub(super) const TILE: usize = 128;

/// How a format describes the schemes of its modules, and the modules it leaves dense.
type WriteConfig = fn(&dyn Format, &BTreeMap<String, Scheme>, &[String]) -> Result<Value, Error>;

/// One of the formats.
#[derive(Debug)]
pub(super) struct Floats {
    name: &'static str,
    summary: &'static str,
    float: FloatType,
    /// The type of the scales and what shares one, where the format fixes them.
    scales: Option<(ScaleType, Granularity)>,
    parts: Parts,
    /// What loaders can do with inputs beside such weights; where it is one thing, the configuration does not say it.
    inputs: &'static [Activations],
    config: WriteConfig,
    recognise: fn(&dyn Format, &Value) -> Result<Option<Dialect>, Error>,
    sidecar: fn(&Value) -> Option<(&'static str, Value)>,
}

/// The suffixes of a module's tensors.
#[derive(Debug)]
struct Parts {
    codes: &'static str,
    scales: &'static str,
    /// That of what all scales are divided by, or that of its reciprocal, by which they are multiplied.
    whole: &'static str,
    /// The same for the scales of inputs.
    input: &'static str,
    /// Whether the two are reciprocals.
    factors: bool,
}

impl Parts {
    /// Those of compressed-tensors for codes under `codes`.
    const fn plain(codes: &'static str) -> Self {
        let (scales, whole, input) = ("weight_scale", "weight_global_scale", "input_global_scale");
        Parts { codes, scales, whole, input, factors: false }
    }
}

/// A row of compressed-tensors.
const fn compressed(
    name: &'static str,
    summary: &'static str,
    float: FloatType,
    scales: Option<(ScaleType, Granularity)>,
    inputs: &'static [Activations],
) -> Floats {
    let parts = Parts::plain(if matches!(float, FloatType::E2m1) { "weight_packed" } else { "weight" });
    let (config, recognise) = (compressed_tensors::config, compressed_tensors::recognise);
    Floats { name, summary, float, scales, parts, inputs, config, recognise, sidecar: |_| None }
}

pub(super) static FP8: Floats = compressed(
    "float-quantized",
    "compressed-tensors, 8-bit floats: vLLM, SGLang, transformers",
    FloatType::E4m3,
    None,
    &[Activations::Full, Activations::DynamicFp8, Activations::DynamicFp8Groups, Activations::StaticFp8],
);

pub(super) static NVFP4: Floats = compressed(
    "nvfp4-pack-quantized",
    "compressed-tensors, 4-bit floats with 8-bit floats per 16: vLLM, SGLang, transformers",
    FloatType::E2m1,
    Some((ScaleType::E4m3, Granularity::Group(16))),
    &[Activations::Full, Activations::Nvfp4],
);

pub(super) static MXFP4: Floats = Floats {
    // gpt-oss is published in the same bytes.
    recognise: gpt_oss::recognise,
    ..compressed(
        "mxfp4-pack-quantized",
        "compressed-tensors, 4-bit floats with powers of two per 32: vLLM, transformers",
        FloatType::E2m1,
        Some((ScaleType::E8m0, Granularity::Group(32))),
        &[Activations::Full, Activations::Mxfp4],
    )
};

pub(super) static MXFP8: Floats = compressed(
    "mxfp8-quantized",
    "compressed-tensors, 8-bit floats with powers of two per 32: vLLM, transformers",
    FloatType::E4m3,
    Some((ScaleType::E8m0, Granularity::Group(32))),
    &[Activations::Full, Activations::Mxfp8],
);

pub(super) static MODELOPT: Floats = Floats {
    name: "modelopt",
    summary: "NVIDIA's ModelOpt, NVFP4: vLLM, SGLang, TensorRT-LLM",
    float: FloatType::E2m1,
    scales: Some((ScaleType::E4m3, Granularity::Group(16))),
    parts: Parts {
        codes: "weight",
        scales: "weight_scale",
        whole: "weight_scale_2",
        input: "input_scale",
        factors: true,
    },
    inputs: &[Activations::Full, Activations::Nvfp4],
    config: modelopt::config,
    recognise: modelopt::recognise,
    sidecar: modelopt::sidecar,
};

pub(super) static FINE_GRAINED: Floats = Floats {
    name: "fp8",
    summary: "fine-grained FP8, as DeepSeek's models come: vLLM, SGLang, transformers",
    float: FloatType::E4m3,
    scales: Some((ScaleType::F32, Granularity::Tile(TILE))),
    parts: Parts { scales: "weight_scale_inv", ..Parts::plain("weight") },
    inputs: &[Activations::DynamicFp8Groups],
    config: fine_grained::config,
    recognise: fine_grained::recognise,
    sidecar: |_| None,
};

/// Those of compressed-tensors.
const ALL: [&Floats; 4] = [&FP8, &NVFP4, &MXFP4, &MXFP8];

/// The format of a float scheme, if there is one.
pub(super) fn name_for(scheme: &Scheme) -> Option<&'static str> {
    ALL.into_iter().find(|f| f.grid_matches(scheme)).map(|f| f.name)
}

/// Whether the numbers of format `name` are floats.
pub(super) fn holds_floats(name: &str) -> bool {
    ALL.into_iter().any(|f| f.name == name)
}

/// Whether format `name` stores `scheme`, whatever the shape.
pub(super) fn holds(name: &str, scheme: &Scheme) -> bool {
    ALL.into_iter().any(|f| f.name == name && f.grid_matches(scheme) && f.groups_match(scheme))
}

/// The type of the scales that format `name` fixes.
pub(super) fn fixed_scales(name: &str) -> Option<ScaleType> {
    ALL.into_iter().find(|f| f.name == name)?.scales.map(|(scale, _)| scale)
}

impl Floats {
    fn grid_matches(&self, scheme: &Scheme) -> bool {
        // Fine-grained FP8 is published with scales of 32 bits, and read with others.
        let wide = |own: ScaleType| own.is_wide() && scheme.scale.is_wide();
        let scale = self.scales.map_or(scheme.scale.is_wide(), |(own, _)| own == scheme.scale || wide(own));
        scheme.grid == GridKind::Float(self.float) && scale
    }

    fn groups_match(&self, scheme: &Scheme) -> bool {
        self.scales.is_none_or(|(_, own)| scheme.granularity == own)
    }

    fn packed(&self) -> bool {
        self.float == FloatType::E2m1
    }

    /// The suffix of what calibration says of inputs.
    fn input_part(&self, scheme: &Scheme) -> &'static str {
        if scheme.activations == Activations::StaticFp8 { "input_scale" } else { self.parts.input }
    }

    /// A number of a whole matrix as it is stored, or as it is meant.
    fn either_way(&self, whole: f32) -> f32 {
        if self.parts.factors { whole.recip() } else { whole }
    }

    /// The number of a whole matrix that is stored as `suffix`.
    fn whole(&self, module: &str, suffix: &str, source: &Checkpoint) -> Result<f32, Error> {
        let view = part(source, module, suffix)?;
        match view.to_f32()?[..] {
            [whole] => Ok(self.either_way(whole)),
            _ => Err(view.wrong_shape("[1]")),
        }
    }
}

impl Format for Floats {
    fn name(&self) -> &'static str {
        self.name
    }

    fn summary(&self) -> &'static str {
        self.summary
    }

    fn codes(&self) -> &'static str {
        self.parts.codes
    }

    fn scales(&self) -> &'static str {
        self.parts.scales
    }

    fn scale_type(&self, model: ScaleType) -> ScaleType {
        self.scales.map(|(own, _)| own).filter(|own| own.is_wide()).unwrap_or(model)
    }

    fn candidates(&self, scheme: &Scheme) -> Vec<Scheme> {
        let activations = match self.inputs {
            [only] => *only,
            _ => scheme.activations,
        };
        vec![Scheme { activations, ..*scheme }.with_scale(self.scale_type(scheme.scale))]
    }

    fn check(&self, module: &str, scheme: &Scheme, shape: [usize; 2]) -> Result<(), Error> {
        refuse_binary(self, module, scheme)?;
        let refuse = |reason: String| Err(unsupported(self, module, scheme, reason));
        if !self.grid_matches(scheme) {
            let own = match (scheme.grid, default_format(scheme)) {
                (GridKind::Float(_), name) if name != self.name => format!("use {name}"),
                _ => "its numbers are floats: choose a scheme like fp8_dynamic, nvfp4a16 or mxfp4a16".into(),
            };
            return refuse(own);
        }
        // Tiles of weights go with groups of inputs, and with them alone.
        let tiles = scheme.granularity == Granularity::Tile(TILE);
        let runs = self.inputs.contains(&scheme.activations)
            && match scheme.activations {
                Activations::DynamicFp8Groups => tiles,
                Activations::DynamicFp8 | Activations::StaticFp8 => !matches!(scheme.granularity, Granularity::Tile(_)),
                _ => true,
            };
        if !runs {
            return refuse("loaders have no kernel for such inputs beside such weights".into());
        }
        if let (Some((_, own)), false) = (self.scales, self.groups_match(scheme)) {
            let own = match own {
                Granularity::Group(group) => format!("per {group} inputs"),
                _ => format!("per tile of {TILE} x {TILE}"),
            };
            return refuse(format!("its scales are {own}"));
        }
        if matches!(scheme.granularity, Granularity::Mapped(_)) {
            return refuse("it has no groups out of order".into());
        }
        check_shape(self, module, scheme, shape)
    }

    fn holds(&self, module: &str, q: &Quantized) -> Result<(), Error> {
        let rounded = |divisor: &f32| divisor.recip().recip() != *divisor;
        let divisors = std::iter::once(q.divisor()).chain(q.input);
        if let Some(divisor) = { divisors }.find(|d| self.parts.factors && rounded(d)) {
            let reason =
                format!("it stores the reciprocal of {divisor}, which all scales are divided by, and that is rounded");
            return Err(unsupported(self, module, &q.scheme, reason));
        }
        self.check(module, &q.scheme, q.shape)
    }

    fn layout(&self, module: &str, scheme: &Scheme, shape: [usize; 2]) -> Vec<TensorSpec> {
        let spec = |suffix: &str, dtype, shape: Vec<usize>| TensorSpec::new(format!("{module}.{suffix}"), dtype, shape);
        let codes = match self.packed() {
            true => spec(self.parts.codes, Dtype::U8, vec![shape[0], shape[1] / 2]),
            false => spec(self.parts.codes, Dtype::F8_E4M3, shape.to_vec()),
        };
        let mut specs = vec![codes, spec(self.parts.scales, scale_dtype(scheme.scale), scale_shape(scheme, shape))];
        let whole = || if self.parts.factors { Vec::new() } else { vec![1] };
        if scheme.has_divisor() {
            specs.push(spec(self.parts.whole, Dtype::F32, whole()));
        }
        if scheme.activations.is_calibrated() {
            specs.push(spec(self.input_part(scheme), Dtype::F32, whole()));
        }
        specs
    }

    fn encode(&self, module: &str, q: &Quantized) -> Vec<Vec<u8>> {
        assert_encodable(self, module, q);
        let codes = match self.packed() {
            true => q.codes.as_chunks::<2>().0.iter().map(|&[even, odd]| even | odd << 4).collect(),
            false => q.codes.clone(),
        };
        let count = q.scheme.scales(q.shape);
        let mut payloads = vec![codes, scale_bytes(q.scales[..count].iter().copied(), q.scheme.scale)];
        let divisor = q.scheme.has_divisor().then(|| q.divisor());
        for whole in divisor.into_iter().chain(q.input) {
            payloads.push(self.either_way(whole).to_le_bytes().to_vec());
        }
        payloads
    }

    fn shape(&self, module: &str, _: &Scheme, source: &Checkpoint) -> Result<[usize; 2], Error> {
        let view = part(source, module, self.codes())?;
        let [rows, width] = view.matrix()?;
        if rows == 0 || width == 0 {
            return Err(view.wrong_shape("a matrix that is not empty"));
        }
        Ok([rows, if self.packed() { width * 2 } else { width }])
    }

    fn decode(&self, module: &str, scheme: &Scheme, source: &Checkpoint) -> Result<Quantized, Error> {
        let view = part(source, module, self.codes())?;
        let shape = self.shape(module, scheme, source)?;
        let codes = match self.packed() {
            true if view.dtype != Dtype::U8 => return Err(view.wrong_dtype("U8")),
            true => view.bytes.iter().flat_map(|&b| [b & 15, b >> 4]).collect(),
            false if view.dtype != Dtype::F8_E4M3 => return Err(view.wrong_dtype("F8_E4M3")),
            false => view.bytes.to_vec(),
        };
        let scale = part(source, module, self.parts.scales)?;
        let (stored, mut scales) = match self.scales {
            None | Some((ScaleType::F16 | ScaleType::Bf16 | ScaleType::F32, _)) => read_scales(&scale)?,
            Some((ScaleType::E8m0, _)) if scale.dtype == Dtype::U8 || scale.dtype == Dtype::F8_E8M0 => {
                (ScaleType::E8m0, scale.bytes.iter().map(|&b| exponent_value(b)).collect())
            }
            Some((ScaleType::E8m0, _)) => return Err(scale.wrong_dtype("U8")),
            Some((own, _)) if scale.dtype == Dtype::F8_E4M3 => {
                let value = |&b: &u8| if FloatType::E4m3.is_number(b) { FloatType::E4m3.value(b) } else { f32::NAN };
                (own, scale.bytes.iter().map(value).collect())
            }
            Some(_) => return Err(scale.wrong_dtype("F8_E4M3")),
        };
        let scheme = Scheme { scale: stored, ..*scheme };
        check_scale_shape(&scale, &scheme, shape)?;
        if scheme.has_divisor() {
            scales.push(self.whole(module, self.parts.whole, source)?);
        }
        let input = self.input(module, &scheme, source)?;
        let (zeros, group_of) = (Vec::new(), Vec::new());
        validated(module, source, Quantized { scheme, shape, codes, scales, zeros, group_of, input })
    }

    fn input(&self, module: &str, scheme: &Scheme, source: &Checkpoint) -> Result<Option<f32>, Error> {
        let stored = || self.whole(module, self.input_part(scheme), source);
        scheme.activations.is_calibrated().then(stored).transpose()
    }

    fn config(&self, layers: &BTreeMap<String, Scheme>, ignored: &[String]) -> Result<Value, Error> {
        (self.config)(self, layers, ignored)
    }

    fn sidecar(&self, config: &Value) -> Option<(&'static str, Value)> {
        (self.sidecar)(config)
    }

    fn recognise(&self, config: &Value) -> Result<Option<Dialect>, Error> {
        (self.recognise)(self, config)
    }
}
