//! The float formats of compressed-tensors.
//!
//! | format | `weight` or `weight_packed` | `weight_scale` |
//! | --- | --- | --- |
//! | `float-quantized` | F8_E4M3 `[out, in]` | 16 or 32 bits; `[1]`, `[out, groups]`, or `[⌈out/n⌉, ⌈in/n⌉]` for tiles |
//! | `mxfp8-quantized` | F8_E4M3 `[out, in]` | U8 `[out, in/32]`, the byte of 2^(byte − 127) |
//! | `mxfp4-pack-quantized` | U8 `[out, in/2]` | U8 `[out, in/32]`, the same |
//! | `nvfp4-pack-quantized` | U8 `[out, in/2]` | F8_E4M3 `[out, in/16]` |
//!
//! Two 4-bit codes share a byte, that of the even input in its low half. NVFP4 has `weight_global_scale`, F32 `[1]`, which the
//! scales are divided by.

use super::pack_quantized::{check_scale_shape, scale_shape};
use super::{
    Format, assert_encodable, check_shape, compressed_tensors, part, read_scales, scale_bytes, scale_dtype,
    unsupported, validated,
};
use crate::{Checkpoint, Dialect, Error, TensorSpec};
use bitmill_scheme::{Activations, FloatType, Granularity, GridKind, Quantized, ScaleType, Scheme, exponent_value};
use safetensors::Dtype;
use serde_json::Value;
use std::collections::BTreeMap;

/// One of the formats.
#[derive(Debug)]
pub(super) struct Floats {
    name: &'static str,
    summary: &'static str,
    float: FloatType,
    /// The type of the scales and the inputs that share one, where the format fixes them.
    scales: Option<(ScaleType, usize)>,
}

pub(super) static FP8: Floats = Floats {
    name: "float-quantized",
    summary: "compressed-tensors, 8-bit floats: vLLM, SGLang, transformers",
    float: FloatType::E4m3,
    scales: None,
};

pub(super) static NVFP4: Floats = Floats {
    name: "nvfp4-pack-quantized",
    summary: "compressed-tensors, 4-bit floats with 8-bit floats per 16: vLLM, SGLang, transformers",
    float: FloatType::E2m1,
    scales: Some((ScaleType::E4m3, 16)),
};

pub(super) static MXFP4: Floats = Floats {
    name: "mxfp4-pack-quantized",
    summary: "compressed-tensors, 4-bit floats with powers of two per 32: vLLM, transformers",
    float: FloatType::E2m1,
    scales: Some((ScaleType::E8m0, 32)),
};

pub(super) static MXFP8: Floats = Floats {
    name: "mxfp8-quantized",
    summary: "compressed-tensors, 8-bit floats with powers of two per 32: vLLM, transformers",
    float: FloatType::E4m3,
    scales: Some((ScaleType::E8m0, 32)),
};

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
        let scale = self.scales.map_or(scheme.scale.is_wide(), |(own, _)| own == scheme.scale);
        scheme.grid == GridKind::Float(self.float) && scale
    }

    fn groups_match(&self, scheme: &Scheme) -> bool {
        self.scales.is_none_or(|(_, group)| scheme.granularity == Granularity::Group(group))
    }

    fn packed(&self) -> bool {
        self.float == FloatType::E2m1
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
        if self.packed() { "weight_packed" } else { "weight" }
    }

    fn scales(&self) -> &'static str {
        "weight_scale"
    }

    fn candidates(&self, scheme: &Scheme) -> Vec<Scheme> {
        vec![*scheme]
    }

    fn check(&self, module: &str, scheme: &Scheme, shape: [usize; 2]) -> Result<(), Error> {
        let refuse = |reason: String| Err(unsupported(self, module, scheme, reason));
        if !self.grid_matches(scheme) {
            let own = match name_for(scheme) {
                Some(name) => format!("use {name}"),
                None => "its numbers are floats: choose a scheme like fp8_dynamic, nvfp4a16 or mxfp4a16".into(),
            };
            return refuse(own);
        }
        let runs = match scheme.activations {
            Activations::Full => true,
            Activations::DynamicInt8 => false,
            Activations::DynamicFp8 => self.scales.is_none() && !matches!(scheme.granularity, Granularity::Tile(_)),
            Activations::DynamicFp8Groups => self.scales.is_none() && scheme.granularity == Granularity::Tile(128),
        };
        if !runs {
            return refuse("loaders have no kernel for such inputs beside such weights".into());
        }
        if let (Some((_, group)), false) = (self.scales, self.groups_match(scheme)) {
            return refuse(format!("its scales are per {group} inputs"));
        }
        if matches!(scheme.granularity, Granularity::Mapped(_)) {
            return refuse("it has no groups out of order".into());
        }
        check_shape(self, module, scheme, shape)
    }

    fn layout(&self, module: &str, scheme: &Scheme, shape: [usize; 2]) -> Vec<TensorSpec> {
        let spec = |suffix: &str, dtype, shape: Vec<usize>| TensorSpec::new(format!("{module}.{suffix}"), dtype, shape);
        let codes = match self.packed() {
            true => spec("weight_packed", Dtype::U8, vec![shape[0], shape[1] / 2]),
            false => spec("weight", Dtype::F8_E4M3, shape.to_vec()),
        };
        let mut specs = vec![codes, spec("weight_scale", scale_dtype(scheme.scale), scale_shape(scheme, shape))];
        if scheme.has_divisor() {
            specs.push(spec("weight_global_scale", Dtype::F32, vec![1]));
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
        if q.scheme.has_divisor() {
            payloads.push(q.divisor().to_le_bytes().to_vec());
        }
        payloads
    }

    fn decode(&self, module: &str, scheme: &Scheme, source: &Checkpoint) -> Result<Quantized, Error> {
        let view = part(source, module, self.codes())?;
        let [rows, width] = view.matrix()?;
        if rows == 0 || width == 0 {
            return Err(view.wrong_shape("a matrix that is not empty"));
        }
        let (shape, codes) = match self.packed() {
            true if view.dtype != Dtype::U8 => return Err(view.wrong_dtype("U8")),
            true => ([rows, width * 2], view.bytes.iter().flat_map(|&b| [b & 15, b >> 4]).collect()),
            false if view.dtype != Dtype::F8_E4M3 => return Err(view.wrong_dtype("F8_E4M3")),
            false => ([rows, width], view.bytes.to_vec()),
        };
        let scale = part(source, module, "weight_scale")?;
        let (stored, mut scales) = match self.scales {
            None => read_scales(&scale)?,
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
            let global = part(source, module, "weight_global_scale")?;
            let values = global.to_f32()?;
            match values[..] {
                [divisor] => scales.push(divisor),
                _ => return Err(global.wrong_shape("[1]")),
            }
        }
        validated(module, source, Quantized { scheme, shape, codes, scales, zeros: Vec::new(), group_of: Vec::new() })
    }

    fn config(&self, layers: &BTreeMap<String, Scheme>, ignored: &[String]) -> Result<Value, Error> {
        compressed_tensors::config(self, layers, ignored)
    }

    fn recognise(&self, config: &Value) -> Result<Option<Dialect>, Error> {
        compressed_tensors::recognise(self, config)
    }
}
