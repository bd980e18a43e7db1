//! `pack-quantized` of compressed-tensors: every row a stream of codes, least significant bit first, in 32-bit words.
//!
//! | tensor | type | shape |
//! | --- | --- | --- |
//! | `weight_packed` | I32 | `[out, ⌈in·b/32⌉]` |
//! | `weight_scale` | scale | `[out, groups]`; `[1]` for one per tensor |
//! | `weight_shape` | I64 | `[2]` |
//! | `weight_zero_point` | I32 | `[⌈out·b/32⌉, groups]`, packed down each column; asymmetric only |
//! | `weight_g_idx` | I32 | `[in]`, the group of every input; mapped groups only |
//!
//! Codes are offset by 2^(b−1), which is how a [`Quantized`] holds them too. Up to release 0.17.1 the library stored 3,
//! 5, 6 and 7 bits as ⌊32/b⌋ codes per word; that layout is read and never written.

use super::{
    Format, assert_encodable, check_matrix, compressed_tensors, group_map_bytes, part, read_group_map, read_scales,
    scale_bytes, scale_dtype, transpose, unsupported, validated, word_bytes,
};
use crate::{Checkpoint, Dialect, Error, TensorSpec, TensorView};
use bitmill_kernels::{pack_bits, packed_words, unpack_bits};
use bitmill_scheme::{Activations, Granularity, GridKind, Quantized, Scheme};
use rayon::prelude::*;
use safetensors::Dtype;
use serde_json::Value;
use std::collections::BTreeMap;

/// The format.
#[derive(Debug)]
pub(super) struct PackQuantized;

impl Format for PackQuantized {
    fn name(&self) -> &'static str {
        "pack-quantized"
    }

    fn summary(&self) -> &'static str {
        "compressed-tensors, 1 to 8 bits packed: vLLM, SGLang, transformers"
    }

    fn codes(&self) -> &'static str {
        "weight_packed"
    }

    fn scales(&self) -> &'static str {
        "weight_scale"
    }

    fn check(&self, module: &str, scheme: &Scheme, shape: [usize; 2]) -> Result<(), Error> {
        let narrow = matches!(scheme.grid, GridKind::Int { bits, symmetric: true } if bits.get() == 4);
        let runs = match scheme.activations {
            Activations::Full => true,
            Activations::DynamicFp8 => narrow,
            _ => false,
        };
        if !runs {
            let reason = "loaders run packed weights with full activations, or of 4 bits with 8-bit floats per token; use \
                          int-quantized for 8-bit integers";
            return Err(unsupported(self, module, scheme, reason));
        }
        check_matrix(self, module, scheme, shape)
    }

    fn layout(&self, module: &str, scheme: &Scheme, shape: [usize; 2]) -> Vec<TensorSpec> {
        let [rows, cols] = shape;
        let bits = scheme.bits().get();
        let spec = |suffix: &str, dtype, shape: Vec<usize>| TensorSpec::new(format!("{module}.{suffix}"), dtype, shape);
        let mut specs = vec![
            spec("weight_packed", Dtype::I32, vec![rows, packed_words(cols, bits)]),
            spec("weight_scale", scale_dtype(scheme.scale), scale_shape(scheme, shape)),
            spec("weight_shape", Dtype::I64, vec![2]),
        ];
        if !scheme.symmetric() {
            // The library packs zero points of groups and channels only.
            specs.push(match scheme.granularity {
                Granularity::Tensor => spec("weight_zero_point", Dtype::I8, vec![1]),
                _ => spec("weight_zero_point", Dtype::I32, vec![packed_words(rows, bits), scheme.groups(cols)]),
            });
        }
        specs.extend(map_spec(module, scheme, cols));
        specs
    }

    fn encode(&self, module: &str, q: &Quantized) -> Vec<Vec<u8>> {
        assert_encodable(self, module, q);
        let [rows, cols] = q.shape;
        let bits = q.scheme.bits();
        let scales = scale_bytes(q.scales.iter().copied(), q.scheme.scale);
        let mut payloads = vec![pack_rows(&q.codes, cols, bits.get()), scales, shape_bytes(q.shape)];
        if !q.scheme.symmetric() {
            payloads.push(match q.scheme.granularity {
                Granularity::Tensor => q.zeros.iter().map(|z| z.wrapping_sub(bits.middle())).collect(),
                _ => pack_columns(rows, q.scheme.groups(cols), &q.zeros, bits.get()),
            });
        }
        if !q.group_of.is_empty() {
            payloads.push(group_map_bytes(q));
        }
        payloads
    }

    fn by_rows(&self, scheme: &Scheme, shape: [usize; 2]) -> Option<Vec<Vec<u8>>> {
        let own = matches!(scheme.granularity, Granularity::Group(_) | Granularity::Channel);
        (own && scheme.symmetric()).then(|| vec![shape_bytes(shape)])
    }

    fn shape(&self, module: &str, _: &Scheme, source: &Checkpoint) -> Result<[usize; 2], Error> {
        stored_shape(&part(source, module, "weight_shape")?, &part(source, module, "weight_packed")?)
    }

    fn decode(&self, module: &str, scheme: &Scheme, source: &Checkpoint) -> Result<Quantized, Error> {
        let packed = part(source, module, "weight_packed")?;
        let [rows, cols] = self.shape(module, scheme, source)?;
        let bits = scheme.bits().get();
        let [_, width] = packed.matrix()?;
        let layout = Layout::of(width, cols, bits)
            .ok_or_else(|| packed.wrong_shape(format!("[{rows}, {}]", packed_words(cols, bits))))?;
        let words = packed.words()?;
        let mut codes = vec![0u8; rows * cols];
        codes
            .par_chunks_mut(cols)
            .zip(words.par_chunks(width))
            .for_each(|(row, words)| layout.unpack(words, bits, row));

        let scale = part(source, module, "weight_scale")?;
        let (stored, scales) = read_scales(&scale)?;
        let mut scheme = scheme.with_scale(stored);
        check_scale_shape(&scale, &scheme, [rows, cols])?;
        let zeros = match scheme.symmetric() {
            true => Vec::new(),
            false => read_zeros(&part(source, module, "weight_zero_point")?, &scheme, [rows, cols], layout)?,
        };
        let group_of = read_group_map(source, module, "weight_g_idx", &mut scheme, cols)?;
        validated(
            module,
            source,
            Quantized { scheme, shape: [rows, cols], codes, scales, zeros, group_of, input: None },
        )
    }

    fn config(&self, layers: &BTreeMap<String, Scheme>, ignored: &[String]) -> Result<Value, Error> {
        compressed_tensors::config(self, layers, ignored)
    }

    fn recognise(&self, config: &Value) -> Result<Option<Dialect>, Error> {
        compressed_tensors::recognise(self, config)
    }
}

/// `weight_shape`.
fn shape_bytes(shape: [usize; 2]) -> Vec<u8> {
    shape.iter().flat_map(|&d| (d as i64).to_le_bytes()).collect()
}

/// How codes sit in their words.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Layout {
    /// One stream without gaps.
    Dense,
    /// ⌊32/b⌋ codes per word, the rest of its bits unused: releases up to 0.17.1.
    Spaced,
}

impl Layout {
    /// The layout in which `count` codes take `width` words. Where both do, they are told apart by nothing, and the
    /// current one is assumed; that cannot happen when `count` is a multiple of 32.
    fn of(width: usize, count: usize, bits: u32) -> Option<Self> {
        [Layout::Dense, Layout::Spaced].into_iter().find(|l| l.words(count, bits) == width)
    }

    fn words(self, count: usize, bits: u32) -> usize {
        match self {
            Layout::Dense => packed_words(count, bits),
            Layout::Spaced => count.div_ceil((32 / bits) as usize),
        }
    }

    fn unpack(self, words: &[u32], bits: u32, out: &mut [u8]) {
        match self {
            Layout::Dense => unpack_bits(words, bits, out),
            Layout::Spaced => {
                let per_word = (32 / bits) as usize;
                for (chunk, &word) in out.chunks_mut(per_word).zip(words) {
                    unpack_bits(&[word], bits, chunk);
                }
            }
        }
    }
}

/// `weight_shape`, checked against the rows and the bytes that are really there.
fn stored_shape(view: &TensorView<'_>, packed: &TensorView<'_>) -> Result<[usize; 2], Error> {
    if view.shape != [2] {
        return Err(view.wrong_shape("[2]"));
    }
    let values: Vec<u64> = match view.dtype {
        Dtype::I64 | Dtype::U64 => view.bytes.as_chunks::<8>().0.iter().map(|&b| u64::from_le_bytes(b)).collect(),
        Dtype::I32 | Dtype::U32 => view.words()?.into_iter().map(u64::from).collect(),
        _ => return Err(view.wrong_dtype("I64")),
    };
    let [rows, width] = packed.matrix()?;
    // At most 32 codes of one bit per word; a larger claim would make the reader allocate what no bytes stand for.
    let most = (width as u64).saturating_mul(32);
    match values[..] {
        [r, c] if r == rows as u64 && r > 0 && (1..=most).contains(&c) => Ok([rows, c as usize]),
        _ => Err(packed.wrong_shape(format!("the packed form of {values:?} (from weight_shape)"))),
    }
}

/// The tensor that maps inputs to groups, where there is one.
pub(super) fn map_spec(module: &str, scheme: &Scheme, cols: usize) -> Option<TensorSpec> {
    let mapped = matches!(scheme.granularity, Granularity::Mapped(_));
    mapped.then(|| TensorSpec::new(format!("{module}.weight_g_idx"), Dtype::I32, [cols]))
}

/// Shape in which scales are written.
pub(super) fn scale_shape(scheme: &Scheme, [rows, cols]: [usize; 2]) -> Vec<usize> {
    match scheme.granularity {
        Granularity::Tensor => vec![1],
        Granularity::Tile(side) => vec![rows.div_ceil(side), scheme.groups(cols)],
        _ => vec![rows, scheme.groups(cols)],
    }
}

/// Accepts the written shape, and its forms with dimensions of one left out or added.
pub(super) fn check_scale_shape(view: &TensorView<'_>, scheme: &Scheme, shape: [usize; 2]) -> Result<(), Error> {
    let expected = scale_shape(scheme, shape);
    let trim = |s: &[usize]| s.iter().copied().filter(|&d| d != 1).collect::<Vec<_>>();
    if trim(view.shape) == trim(&expected) { Ok(()) } else { Err(view.wrong_shape(format!("{expected:?}"))) }
}

fn read_zeros(view: &TensorView<'_>, scheme: &Scheme, shape: [usize; 2], layout: Layout) -> Result<Vec<u8>, Error> {
    let [rows, cols] = shape;
    let bits = scheme.bits();
    if scheme.granularity == Granularity::Tensor {
        return super::int8::read_zeros(view, scheme, shape);
    }
    let (height, groups) = (layout.words(rows, bits.get()), scheme.groups(cols));
    if view.shape != [height, groups] {
        return Err(view.wrong_shape(format!("[{height}, {groups}]")));
    }
    let columns = transpose(height, groups, &view.words()?);
    let mut zeros = vec![0u8; rows * groups];
    for (out, words) in zeros.chunks_mut(rows).zip(columns.chunks(height)) {
        layout.unpack(words, bits.get(), out);
    }
    Ok(transpose(groups, rows, &zeros))
}

/// Packs every row of `codes` on its own.
fn pack_rows(codes: &[u8], cols: usize, bits: u32) -> Vec<u8> {
    let width = packed_words(cols, bits);
    let mut bytes = vec![0u8; codes.len() / cols * width * 4];
    bytes.par_chunks_mut(width * 4).zip(codes.par_chunks(cols)).for_each_init(
        || vec![0u32; width],
        |words, (out, row)| {
            pack_bits(row, bits, words);
            out.copy_from_slice(&word_bytes(words));
        },
    );
    bytes
}

/// Packs a row-major matrix `[rows, groups]` down its columns.
fn pack_columns(rows: usize, groups: usize, values: &[u8], bits: u32) -> Vec<u8> {
    let columns = transpose(rows, groups, values);
    let height = packed_words(rows, bits);
    let mut words = vec![0u32; height * groups];
    for (out, column) in words.chunks_mut(height).zip(columns.chunks(rows)) {
        pack_bits(column, bits, out);
    }
    word_bytes(&transpose(groups, height, &words))
}
