//! Formats: how a quantized matrix is written as named tensors, and read back bit for bit.

pub(crate) mod auto_round;
mod awq;
mod binary;
mod bitsandbytes;
mod compressed_tensors;
mod fine_grained;
mod floats;
mod gguf;
pub(crate) mod gpt_oss;
mod gptq;
mod int8;
mod int_quantized;
mod mixed_precision;
pub(crate) mod modelopt;
mod naive_quantized;
mod pack_quantized;

pub use compressed_tensors::cache_scheme;
pub use mixed_precision::NAME as MIXED;

use crate::checkpoint::scale_type;
use crate::{Checkpoint, Dialect, Error, TensorSpec, TensorView};
use bitmill_scheme::{Activations, FloatType, Granularity, GridKind, Quantized, ScaleType, Scheme, exponent_byte};
use half::{bf16, f16};
use safetensors::Dtype;
use serde_json::Value;
use std::collections::BTreeMap;

/// One way of storing quantized matrices. It never rounds: `decode(encode(q)) == q`.
pub trait Format: Sync {
    /// The name users give and files carry.
    fn name(&self) -> &'static str;

    /// One line of help.
    fn summary(&self) -> &'static str;

    /// Suffix of the tensor of a module that holds its codes.
    fn codes(&self) -> &'static str;

    /// Suffix of the tensor of a module that holds its scales.
    fn scales(&self) -> &'static str;

    /// The type in which this format stores the scales of a model whose own type is `model`.
    fn scale_type(&self, model: ScaleType) -> ScaleType {
        model
    }

    /// Whether a matrix `[out, in]` of `module` can be written under `scheme`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with the reason and what would do.
    fn check(&self, module: &str, scheme: &Scheme, shape: [usize; 2]) -> Result<(), Error>;

    /// Schemes of this format that may hold the numbers of `scheme`, nearest first; [`Quantized::recast`] says which does.
    fn candidates(&self, scheme: &Scheme) -> Vec<Scheme> {
        let own = Scheme { activations: Activations::Full, ..*scheme };
        vec![own.with_scale(self.scale_type(scheme.scale))]
    }

    /// Whether the very numbers of `q` can be written, which may be more than [`Format::check`] promises of every matrix
    /// under its scheme.
    ///
    /// # Errors
    /// [`Error::Unsupported`].
    fn holds(&self, module: &str, q: &Quantized) -> Result<(), Error> {
        self.check(module, &q.scheme, q.shape)
    }

    /// Names, types and shapes of the tensors of `module`, exactly as [`Format::encode`] fills them. To be called after
    /// [`Format::check`] or [`Format::holds`] only.
    fn layout(&self, module: &str, scheme: &Scheme, shape: [usize; 2]) -> Vec<TensorSpec>;

    /// Little-endian payloads, parallel to [`Format::layout`].
    ///
    /// # Panics
    /// When `q` contradicts its scheme or [`Format::holds`]: a caller's bug.
    fn encode(&self, module: &str, q: &Quantized) -> Vec<Vec<u8>>;

    /// Where the tensors of a matrix are those of its rows one after the other, but for the last few: these, which its shape says
    /// all about. A matrix may then be encoded a few rows at a time.
    fn by_rows(&self, _scheme: &Scheme, _shape: [usize; 2]) -> Option<Vec<Vec<u8>>> {
        None
    }

    /// Reads `module` back. `scheme` is what the configuration says; the type of the scales is the stored one.
    ///
    /// # Errors
    /// A missing tensor, or one whose type, shape or values contradict the scheme. Hostile bytes never panic.
    fn decode(&self, module: &str, scheme: &Scheme, source: &Checkpoint) -> Result<Quantized, Error>;

    /// The shape `[out, in]` of `module`, from headers where they say it.
    ///
    /// # Errors
    /// As [`Format::decode`], of what has to be looked at.
    fn shape(&self, module: &str, scheme: &Scheme, source: &Checkpoint) -> Result<[usize; 2], Error> {
        self.decode(module, scheme, source).map(|q| q.shape)
    }

    /// What headers say of `scheme`, which is that of the configuration: `codes` and `scales` are a module's tensors.
    fn seen(&self, scheme: Scheme, _codes: &TensorSpec, scales: &TensorSpec) -> Scheme {
        scheme.with_scale(scale_type(scales.dtype).unwrap_or(scheme.scale))
    }

    /// What calibration stored for the rounding of the inputs of `module`; `None` where `scheme` asks for nothing.
    ///
    /// # Errors
    /// A missing tensor, or one of another shape.
    fn input(&self, _module: &str, _scheme: &Scheme, _source: &Checkpoint) -> Result<Option<f32>, Error> {
        Ok(None)
    }

    /// The `quantization_config` object of a model whose `layers` are quantized under their schemes and whose linears
    /// `ignored` are not.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a mixture the configuration cannot express.
    fn config(&self, layers: &BTreeMap<String, Scheme>, ignored: &[String]) -> Result<Value, Error>;

    /// A file beside `config.json` that says what `config`, its `quantization_config`, says, for loaders that look there first.
    fn sidecar(&self, _config: &Value) -> Option<(&'static str, Value)> {
        None
    }

    /// Reads a `quantization_config` object; `None` where it is of another format.
    ///
    /// # Errors
    /// [`Error::Config`] and [`Error::UnknownFormat`] where it is of this family and cannot be read.
    fn recognise(&self, config: &Value) -> Result<Option<Dialect>, Error>;
}

impl std::fmt::Debug for dyn Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Files beside `config.json` that say how a folder is quantized, too: AutoGPTQ's, AutoAWQ's and ModelOpt's.
pub const SIDECARS: [&str; 3] = ["quantize_config.json", "quant_config.json", modelopt::SIDECAR];

/// The format of GGUF files. It is no row of [`FORMATS`], which are dialects of one container: GGUF is another.
pub static GGUF: &dyn Format = &gguf::Gguf;

/// Every format of model folders.
pub static FORMATS: &[&dyn Format] = &[
    &pack_quantized::PackQuantized,
    &int_quantized::IntQuantized,
    &naive_quantized::NaiveQuantized,
    &floats::FP8,
    &floats::NVFP4,
    &floats::MXFP4,
    &floats::MXFP8,
    &mixed_precision::MixedPrecision,
    &floats::MODELOPT,
    &floats::FINE_GRAINED,
    &gptq::V1,
    &gptq::V2,
    &awq::Awq,
    &bitsandbytes::BitsAndBytes,
    &binary::Binary,
];

/// The format called `name`: a row of [`FORMATS`], or [`GGUF`].
#[must_use]
pub fn format(name: &str) -> Option<&'static dyn Format> {
    FORMATS.iter().copied().chain([GGUF]).find(|f| f.name() == name)
}

/// The format in which `scheme` is written unless another is named.
#[must_use]
pub fn default_format(scheme: &Scheme) -> &'static str {
    match (scheme.grid, scheme.activations) {
        (GridKind::Block(_), _) => GGUF.name(),
        (GridKind::Binary, _) => binary::NAME,
        (GridKind::Float(FloatType::Nf4 | FloatType::Fp4), _) => bitsandbytes::NAME,
        (GridKind::Float(_), _) => floats::name_for(scheme).unwrap_or(floats::FP8.name()),
        (GridKind::Int { .. }, Activations::DynamicInt8) => "int-quantized",
        (GridKind::Int { .. }, _) => "pack-quantized",
    }
}

/// Refuses binary numbers in the name of every format but theirs.
fn refuse_binary(format: &dyn Format, module: &str, scheme: &Scheme) -> Result<(), Error> {
    match scheme.grid {
        GridKind::Binary => {
            Err(unsupported(format, module, scheme, "means and magnitudes have a format of their own; use binary"))
        }
        _ => Ok(()),
    }
}

/// What every format of integers asks of a matrix and its scheme.
fn check_matrix(format: &dyn Format, module: &str, scheme: &Scheme, shape: [usize; 2]) -> Result<(), Error> {
    refuse_binary(format, module, scheme)?;
    if let GridKind::Float(_) = scheme.grid {
        let name = default_format(scheme);
        return Err(unsupported(format, module, scheme, format!("its numbers are integers; use {name} for floats")));
    }
    if let Granularity::Tile(_) = scheme.granularity {
        return Err(unsupported(format, module, scheme, "tiles are for floats; choose groups or channels"));
    }
    check_shape(format, module, scheme, shape)
}

/// What every format asks of a matrix.
fn check_shape(format: &dyn Format, module: &str, scheme: &Scheme, [rows, cols]: [usize; 2]) -> Result<(), Error> {
    if scheme.form().is_some() {
        return Err(unsupported(format, module, scheme, "it is a type of GGUF; write a .gguf file (--format gguf)"));
    }
    if matches!(scheme.granularity, Granularity::Mapped(_)) && format.name() == "int-quantized" {
        return Err(unsupported(format, module, scheme, "integer products need consecutive groups"));
    }
    if rows == 0 || cols == 0 {
        return Err(unsupported(format, module, scheme, "an empty matrix has nothing to quantize; ignore it"));
    }
    scheme.check(cols).map_err(|e| {
        let reason = format!("{e}; choose a size that does, or one scale per channel");
        unsupported(format, module, scheme, reason)
    })
}

fn unsupported(format: &dyn Format, module: &str, scheme: &Scheme, reason: impl Into<String>) -> Error {
    Error::Unsupported { tensor: module.to_owned(), scheme: *scheme, format: format.name(), reason: reason.into() }
}

/// States the contract of [`Format::encode`] before bytes are produced.
fn assert_encodable(format: &dyn Format, module: &str, q: &Quantized) {
    assert!(format.holds(module, q).is_ok(), "{module}: encoded as {} without Format::holds", format.name());
    assert_eq!(q.codes.len(), q.shape[0] * q.shape[1], "{module}: codes of a valid Quantized");
}

/// The module's `suffix` tensor.
fn part<'a>(source: &'a Checkpoint, module: &str, suffix: &str) -> Result<TensorView<'a>, Error> {
    source.tensor(&format!("{module}.{suffix}"))
}

/// The stored type and values of a scale tensor.
fn read_scales(view: &TensorView<'_>) -> Result<(ScaleType, Vec<f32>), Error> {
    let stored = scale_type(view.dtype).ok_or_else(|| view.wrong_dtype("F16, BF16 or F32"))?;
    Ok((stored, view.to_f32()?))
}

/// Scales as they are stored; exact, because each is already a value of its type.
fn scale_bytes(scales: impl Iterator<Item = f32>, scale: ScaleType) -> Vec<u8> {
    match scale {
        ScaleType::F16 => scales.flat_map(|s| f16::from_f32(s).to_le_bytes()).collect(),
        ScaleType::Bf16 => scales.flat_map(|s| bf16::from_f32(s).to_le_bytes()).collect(),
        ScaleType::F32 => scales.flat_map(f32::to_le_bytes).collect(),
        ScaleType::E8m0 => scales.map(exponent_byte).collect(),
        ScaleType::E4m3 => scales.map(|s| FloatType::E4m3.nearest(s)).collect(),
    }
}

fn scale_dtype(scale: ScaleType) -> Dtype {
    match scale {
        ScaleType::F16 => Dtype::F16,
        ScaleType::Bf16 => Dtype::BF16,
        ScaleType::F32 => Dtype::F32,
        ScaleType::E8m0 => Dtype::U8,
        ScaleType::E4m3 => Dtype::F8_E4M3,
    }
}

/// Words as little-endian bytes.
fn word_bytes(words: &[u32]) -> Vec<u8> {
    let mut bytes = vec![0u8; words.len() * 4];
    let (out, _) = bytes.as_chunks_mut::<4>();
    for (o, w) in out.iter_mut().zip(words) {
        *o = w.to_le_bytes();
    }
    bytes
}

/// The transpose of a row-major matrix `[rows, cols]`, by tiles that stay in the nearest cache.
fn transpose<T: Copy + Default>(rows: usize, cols: usize, from: &[T]) -> Vec<T> {
    const TILE: usize = 32;
    let mut to = vec![T::default(); from.len()];
    for r0 in (0..rows).step_by(TILE) {
        for c0 in (0..cols).step_by(TILE) {
            for r in r0..(r0 + TILE).min(rows) {
                for c in c0..(c0 + TILE).min(cols) {
                    to[c * rows + r] = from[r * cols + c];
                }
            }
        }
    }
    to
}

/// Checks a decoded matrix against its scheme, so that later arithmetic on it cannot fail.
fn validated(module: &str, source: &Checkpoint, q: Quantized) -> Result<Quantized, Error> {
    match q.validate() {
        Ok(()) => Ok(q),
        Err(e) => Err(Error::Damaged { module: module.to_owned(), dir: source.dir().to_owned(), source: e }),
    }
}

/// Reads the optional tensor `suffix` that maps columns to groups; empty where it is absent, or says what consecutive
/// groups say anyway. Otherwise the groups of `scheme` become mapped ones.
fn read_group_map(
    source: &Checkpoint,
    module: &str,
    suffix: &str,
    scheme: &mut Scheme,
    cols: usize,
) -> Result<Vec<u32>, Error> {
    if !source.contains(&format!("{module}.{suffix}")) {
        return Ok(Vec::new());
    }
    let view = part(source, module, suffix)?;
    if view.shape != [cols] {
        return Err(view.wrong_shape(format!("[{cols}]")));
    }
    let (map, groups, length) = (view.words()?, scheme.groups(cols), scheme.group_len(cols));
    if map.iter().any(|&g| g as usize >= groups) {
        return Err(view.wrong_shape(format!("[{cols}] with entries below {groups} (an entry is not)")));
    }
    if map.iter().enumerate().all(|(i, &g)| g as usize == i / length) {
        return Ok(Vec::new());
    }
    scheme.granularity = Granularity::Mapped(length);
    Ok(map)
}

/// The group of every column, as 32-bit words.
fn group_map_bytes(q: &Quantized) -> Vec<u8> {
    (0..q.shape[1]).flat_map(|col| (q.group(col) as u32).to_le_bytes()).collect()
}
