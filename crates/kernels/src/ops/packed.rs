//! Products with a matrix of packed integer codes: y = x·Ŵᵀ for Ŵ = scale · (code − zero).
//!
//! Eight output rows lie beside each other: a 32-bit lane belongs to a row and holds four neighbouring input columns of
//! it, so that a vector of input is one broadcast, sums of rows never meet, and scales of eight rows are one load. What is
//! stored is what the codes take, `bits` per weight; only rows are padded, to eight, and columns, to [`CHUNK`].
//!
//! Chunks of four such blocks of rows alternate, and so do their scales: who meets one token reads all four at once, and then
//! reads memory from one end to the other, which it gives out half as fast again as four stretches side by side.
//!
//! The scalar functions here define every number, in the order in which lanes fold it; a level gives the same bits.

/// The instance of `$strip` for the two parts of codes of `$bits` bits.
macro_rules! by_parts {
    ($bits:expr, $strip:ident) => {
        match crate::ops::packed::parts($bits) {
            (1, _) => $strip::<1, 0>,
            (2, _) => $strip::<2, 0>,
            (3, _) => $strip::<3, 0>,
            (_, 0) => $strip::<4, 0>,
            (_, 1) => $strip::<4, 1>,
            (_, 2) => $strip::<4, 2>,
            (_, 3) => $strip::<4, 3>,
            _ => $strip::<4, 4>,
        }
    };
}

/// Calls `$step` for every vector of a chunk, each with its number as a constant: shifts take theirs in the instruction.
macro_rules! each_vector {
    ($step:ident::<$($c:ident),*>($($arg:expr),*)) => {
        $step::<$($c,)* 0>($($arg),*);
        $step::<$($c,)* 1>($($arg),*);
        $step::<$($c,)* 2>($($arg),*);
        $step::<$($c,)* 3>($($arg),*);
        $step::<$($c,)* 4>($($arg),*);
        $step::<$($c,)* 5>($($arg),*);
        $step::<$($c,)* 6>($($arg),*);
        $step::<$($c,)* 7>($($arg),*);
    };
}

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod rounded;
mod scalar;
#[cfg(test)]
mod tests;

pub use rounded::{Rounded, RoundedMut, round_activations};

use super::strips::{Strip, Strips};
use crate::Level;
use crate::team::fill_chunks;
use half::{bf16, f16};
use rayon::prelude::*;
use std::ops::Range;

/// Rows that lie beside each other.
const LANES: usize = 8;
/// Blocks of rows whose chunks alternate.
const TOGETHER: usize = 4;
/// Input columns that are unpacked together.
pub const CHUNK: usize = 32;
/// Input columns that share a scale when activations are rounded, but for the last of a token.
pub const SPAN: usize = 128;
/// The same in chunks.
const SPAN_CHUNKS: usize = SPAN / CHUNK;
/// Rows that one task computes.
const STRIP: usize = 2 * TOGETHER * LANES;

/// Shape and layout of a packed matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackedForm {
    bits: u32,
    rows: usize,
    cols: usize,
    group: usize,
}

impl PackedForm {
    /// A matrix `[rows, cols]` of codes of `bits` bits, `group` neighbouring columns of a row sharing a scale. `None` where
    /// bits are not 1 to 8, where groups are neither a multiple of [`CHUNK`] nor whole rows, or where nothing is left.
    #[must_use]
    pub fn new(bits: u32, [rows, cols]: [usize; 2], group: usize) -> Option<Self> {
        let fits = group >= cols || (group > 0 && group.is_multiple_of(CHUNK));
        let form = PackedForm { bits, rows, cols, group: group.min(cols).next_multiple_of(CHUNK) };
        ((1..=8).contains(&bits) && fits && rows > 0 && cols > 0).then_some(form)
    }

    /// Output and input width.
    #[must_use]
    pub fn shape(&self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    /// Groups of a row.
    #[must_use]
    pub fn groups(&self) -> usize {
        self.cols.div_ceil(self.group)
    }

    /// Chunks of a row.
    #[must_use]
    pub fn chunks(&self) -> usize {
        self.cols.div_ceil(CHUNK)
    }

    /// Spans of a token's activations.
    #[must_use]
    pub fn spans(&self) -> usize {
        self.cols.div_ceil(SPAN)
    }

    /// Pieces of a row, which are what groups and spans have in common: codes and inputs of one scale each.
    fn pieces(&self) -> usize {
        // Every group and every span ends one, but some end together.
        let common = self.group_chunks().trailing_zeros().min(SPAN_CHUNKS.trailing_zeros());
        let both = (self.group_chunks() * SPAN_CHUNKS) >> common;
        self.groups() + self.spans() - self.chunks().div_ceil(both)
    }

    /// The pieces of a span, by their chunks.
    #[inline]
    fn pieces_of(&self, span: usize) -> impl Iterator<Item = Range<usize>> {
        let (mut from, end) = (span * SPAN_CHUNKS, self.end_of_span(span));
        std::iter::from_fn(move || {
            let piece = (from < end).then(|| from..self.end_of_piece(from));
            from = piece.as_ref().map_or(end, |piece| piece.end);
            piece
        })
    }

    /// The chunk where a span ends.
    #[inline(always)]
    fn end_of_span(&self, span: usize) -> usize {
        ((span + 1) * SPAN_CHUNKS).min(self.chunks())
    }

    /// The chunk where the piece ends that begins at `chunk`.
    #[inline(always)]
    fn end_of_piece(&self, chunk: usize) -> usize {
        let (group, span) = (chunk / self.group_chunks() + 1, chunk / SPAN_CHUNKS + 1);
        (group * self.group_chunks()).min(span * SPAN_CHUNKS).min(self.chunks())
    }

    /// From the first piece of a row on.
    #[inline(always)]
    fn walk(&self) -> Walk {
        Walk { group: 0, end: self.group_chunks(), step: self.group_chunks() }
    }

    /// The code that stands for nothing where there are no zero points.
    fn middle(&self) -> i32 {
        1 << (self.bits - 1)
    }

    fn blocks(&self) -> usize {
        self.rows.div_ceil(LANES)
    }

    /// Bytes of a chunk of eight rows.
    fn chunk_bytes(&self) -> usize {
        LANES * CHUNK * self.bits as usize / 8
    }

    /// The chunks of a group.
    fn chunks_of(&self, group: usize) -> Range<usize> {
        let len = self.group_chunks();
        group * len..((group + 1) * len).min(self.chunks())
    }

    /// Chunks that share a scale.
    fn group_chunks(&self) -> usize {
        self.group / CHUNK
    }

    /// Bytes of all codes.
    #[must_use]
    pub fn code_bytes(&self) -> usize {
        self.blocks() * self.chunks() * self.chunk_bytes()
    }

    /// Where part `part` of the `parts` of a block lies, counted in parts.
    fn place_of(&self, block: usize, part: usize, parts: usize) -> usize {
        let first = block / TOGETHER * TOGETHER;
        first * parts + part * self.together(block) + block - first
    }

    /// How many blocks alternate where `block` is one of them: fewer at the end of the matrix.
    fn together(&self, block: usize) -> usize {
        TOGETHER.min(self.blocks() - block / TOGETHER * TOGETHER)
    }

    /// Scales, and zero points where there are any, laid out `[rows / 32, groups, 32]`; rows that remain lie as close.
    #[must_use]
    pub fn params(&self) -> usize {
        self.blocks() * self.groups() * LANES
    }

    /// Where the parameters of `row` and `group` lie.
    #[must_use]
    pub fn param(&self, row: usize, group: usize) -> usize {
        self.place_of(row / LANES, group, self.groups()) * LANES + row % LANES
    }

    /// Packs row-major `codes: [rows, cols]`. A code is split into what fits four bits and the rest, each of which is
    /// laid out by itself.
    ///
    /// # Panics
    /// When a length does not fit: a caller's bug.
    pub fn pack(&self, codes: &[u8], out: &mut [u8]) {
        assert!(codes.len() == self.rows * self.cols && out.len() == self.code_bytes(), "packed lengths");
        let planes = planes(self.bits);
        let (chunks, chunk_bytes) = (self.chunks(), self.chunk_bytes());
        let pieces = out.par_chunks_mut(TOGETHER * chunks * chunk_bytes);
        pieces.zip(codes.par_chunks(TOGETHER * LANES * self.cols)).for_each(|(piece, codes)| {
            piece.fill(0);
            let blocks = piece.len() / (chunks * chunk_bytes);
            for (row, codes) in codes.chunks_exact(self.cols).enumerate() {
                let own = piece.chunks_exact_mut(chunk_bytes).skip(row / LANES).step_by(blocks);
                for (codes, bytes) in codes.chunks(CHUNK).zip(own) {
                    for (j, codes) in codes.chunks(4).enumerate() {
                        for &(bit, mask) in planes {
                            let (vector, place) = place(self.bits, j, bit);
                            let lanes = &mut bytes[vector * 32 + row % LANES * 4..][..4];
                            lanes.iter_mut().zip(codes).for_each(|(lane, code)| *lane |= (code >> bit & mask) << place);
                        }
                    }
                }
            }
        });
    }

    /// The code at `row`, `col`.
    fn code(&self, codes: &[u8], row: usize, col: usize) -> u8 {
        let chunk = self.place_of(row / LANES, col / CHUNK, self.chunks()) * self.chunk_bytes();
        let lane = row % LANES * 4 + col % 4;
        (0..self.bits).fold(0, |code, bit| {
            let (vector, place) = place(self.bits, col % CHUNK / 4, bit);
            code | (codes[chunk + vector * 32 + lane] >> place & 1) << bit
        })
    }
}

/// Widths of the two parts of a code.
const fn parts(bits: u32) -> (u32, u32) {
    if bits <= 4 { (bits, 0) } else { (4, bits - 4) }
}

/// Neighbouring bits of a code that lie beside each other wherever it is put: the first of them, and a mask.
const fn planes(bits: u32) -> &'static [(u32, u8)] {
    match bits {
        1 => &[(0, 1)],
        2 => &[(0, 3)],
        3 => &[(0, 3), (2, 1)],
        4 => &[(0, 15)],
        5 => &[(0, 15), (4, 1)],
        6 => &[(0, 15), (4, 3)],
        7 => &[(0, 15), (4, 3), (6, 1)],
        _ => &[(0, 15), (4, 15)],
    }
}

/// Which of the 32-byte vectors of a chunk, and which bit of its bytes, holds `bit` of the codes of vector `j`.
fn place(bits: u32, j: usize, bit: u32) -> (usize, u32) {
    let (low, high) = parts(bits);
    let (first, width, bit) = if bit < low { (0, low, bit) } else { (low as usize, high, bit - low) };
    let (vector, place) = match width {
        4 => (j % 4, 4 * (j as u32 / 4) + bit),
        2 => (j % 2, 2 * (j as u32 / 2) + bit),
        3 if bit < 2 => (j % 2, 2 * (j as u32 / 2) + bit),
        3 => (2, j as u32),
        _ => (0, j as u32),
    };
    (first + vector, place)
}

/// Scales, in the type they are stored in.
#[derive(Debug, Clone, Copy)]
pub enum Scales<'a> {
    /// 32 bits.
    F32(&'a [f32]),
    /// Bits of IEEE half precision.
    F16(&'a [u16]),
    /// Bits of bfloat16.
    Bf16(&'a [u16]),
}

impl Scales<'_> {
    fn len(&self) -> usize {
        match self {
            Scales::F32(s) => s.len(),
            Scales::F16(s) | Scales::Bf16(s) => s.len(),
        }
    }

    fn at(&self, i: usize) -> f32 {
        match self {
            Scales::F32(s) => s[i],
            Scales::F16(s) => f16::from_bits(s[i]).to_f32(),
            Scales::Bf16(s) => bf16::from_bits(s[i]).to_f32(),
        }
    }
}

/// A packed matrix.
#[derive(Debug, Clone, Copy)]
pub struct Packed<'a> {
    /// Shape and layout.
    pub form: PackedForm,
    /// As [`PackedForm::pack`] lays them out.
    pub codes: &'a [u8],
    /// [`PackedForm::params`] of them.
    pub scales: Scales<'a>,
    /// As many zero points, or none where all are 2^(bits − 1).
    pub zeros: &'a [u8],
}

impl<'a> Packed<'a> {
    fn check(&self) {
        let form = &self.form;
        assert!(self.codes.len() == form.code_bytes() && self.scales.len() == form.params(), "packed lengths");
        assert!(self.zeros.is_empty() || self.zeros.len() == form.params(), "zero points");
    }

    /// The codes of a block of rows.
    #[inline]
    fn block(&self, block: usize) -> Block<'a> {
        let bytes = self.form.chunk_bytes();
        let first = self.form.place_of(block, 0, self.form.chunks()) * bytes;
        let (together, param) = (self.form.together(block), self.form.param(block * LANES, 0));
        Block { codes: &self.codes[first..], step: together * bytes, param, param_step: together * LANES }
    }

    fn zero(&self, i: usize) -> f32 {
        self.zeros.get(i).map_or(self.form.middle() as f32, |&z| f32::from(z))
    }
}

/// A way along the pieces of a row, without a division.
struct Walk {
    group: usize,
    /// The chunk where the group ends, if the row has so many, and chunks of a group.
    end: usize,
    step: usize,
}

impl Walk {
    /// The group of the next piece, and the chunk where the piece ends: where its group does, or its span.
    #[inline(always)]
    fn next(&mut self, end_of_span: usize) -> (usize, usize) {
        let (group, end) = (self.group, self.end.min(end_of_span));
        if end == self.end {
            self.group += 1;
            self.end += self.step;
        }
        (group, end)
    }
}

/// Codes of [`LANES`] rows.
#[derive(Debug, Clone, Copy)]
struct Block<'a> {
    /// From its first chunk on.
    codes: &'a [u8],
    /// Bytes from a chunk to the next.
    step: usize,
    /// Where the parameters of its first group lie, and how far those of the next do from them.
    param: usize,
    param_step: usize,
}

impl<'a> Block<'a> {
    /// A chunk, which begins so many bytes after the first and has `bytes`: a loop knows both for blocks that alternate.
    #[inline(always)]
    fn chunk(&self, at: usize, bytes: usize) -> &'a [u8] {
        &self.codes[at..][..bytes]
    }

    /// Where the parameters of a group lie, those of [`LANES`] rows beside each other.
    #[inline]
    fn param(&self, group: usize) -> usize {
        self.param + group * self.param_step
    }
}

/// Tokens that one thread takes, where there are more.
const MANY: usize = 16;
/// Multiply-adds that take as long as rounding a number.
const ROUNDING: usize = 16;

/// What belongs to each of `T` tokens from `first` on, so much to each: a loop, since closures are compiled for less.
#[inline(always)]
fn by_token<V, const T: usize>(all: &[V], first: usize, count: usize) -> [&[V]; T] {
    let mut own = [&all[..0]; T];
    for (t, own) in own.iter_mut().enumerate() {
        *own = &all[(first + t) * count..][..count];
    }
    own
}

/// A matrix that meets activations, and where their products `[tokens, rows]` go.
#[derive(Debug)]
pub struct Meeting<'a> {
    /// The matrix.
    pub weight: Packed<'a>,
    /// The products.
    pub out: &'a mut [f32],
}

/// `out[token, row] = Σ x̂·Ŵ` for rounded activations of as many tokens, of every matrix that meets them. Several cost less
/// together than one after another: threads are woken once for all.
///
/// # Panics
/// When a length does not fit: a caller's bug.
pub fn packed_products_int8(level: Level, all: &mut [Meeting<'_>], x: &Rounded<'_>) {
    assert_eq!(x.values.len(), x.sums.len() * CHUNK, "activation lengths");
    // What the sum of a piece starts from, so that codes need not be centred.
    let starts_of = |form: &PackedForm| {
        let pieces: Vec<_> = (0..form.spans()).flat_map(|span| form.pieces_of(span)).collect();
        let (chunks, middle) = (form.chunks(), form.middle());
        let mut starts = vec![0; x.sums.len() / chunks * pieces.len()];
        fill_chunks(&mut starts, MANY * pieces.len(), x.sums.len(), |i, starts| {
            let sums = x.sums.chunks_exact(chunks).skip(i * MANY);
            for (starts, sums) in starts.chunks_exact_mut(pieces.len()).zip(sums) {
                let all = starts.iter_mut().zip(&pieces);
                all.for_each(|(start, piece)| *start = -middle * sums[piece.clone()].iter().sum::<i32>());
            }
        });
        starts
    };
    let fit = |form: &PackedForm, tokens: usize| {
        x.sums.len() == tokens * form.chunks() && x.scales.len() == tokens * form.spans()
    };
    #[cfg(target_arch = "x86_64")]
    let tiles = match (level, all.first()) {
        (Level::Amx(_), Some(one)) => amx::Tokens::new(x, &one.weight.form),
        _ => amx::Tokens::default(),
    };
    meet(all, fit, starts_of, |w, starts, strip| match level {
        Level::Scalar => scalar::int8(w, x, strip),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2(token) => avx2::int8(token, w, x, starts, strip),
        #[cfg(target_arch = "x86_64")]
        Level::Avx512(token) => avx512::int8(token, w, x, starts, strip),
        #[cfg(target_arch = "aarch64")]
        Level::Neon(token) => neon::int8(token, w, x, starts, strip),
        #[cfg(target_arch = "x86_64")]
        Level::Amx(token) => amx::int8(token, w, (x, &tiles), starts, strip),
    });
}

/// [`packed_products_int8`] of one matrix.
///
/// # Panics
/// When a length does not fit: a caller's bug.
pub fn packed_product_int8(level: Level, w: &Packed<'_>, x: &Rounded<'_>, out: &mut [f32]) {
    packed_products_int8(level, &mut [Meeting { weight: *w, out }], x);
}

/// `out[token, row] = Σ x·Ŵ` for `x: [tokens, cols]` as it is, of every matrix that meets it, as
/// [`packed_products_int8`].
///
/// # Panics
/// When a length does not fit: a caller's bug.
pub fn packed_products(level: Level, all: &mut [Meeting<'_>], x: &[f32]) {
    let Some(cols) = all.first().map(|one| one.weight.form.cols) else { return };
    assert!(all.iter().all(|one| one.weight.form.cols == cols), "matrices of one width");
    let width = cols.next_multiple_of(CHUNK);
    let padded: Vec<f32>;
    let x = if width == cols {
        x
    } else {
        let tail = vec![0.0; width - cols];
        padded = x.chunks_exact(cols).flat_map(|x| x.iter().chain(&tail).copied()).collect();
        &padded
    };
    let of_group = |x: &[f32]| x.iter().sum::<f32>();
    let sums = |form: &PackedForm| x.chunks_exact(width).flat_map(|x| x.chunks(form.group).map(of_group)).collect();
    let lengths = |_: &PackedForm, tokens: usize| x.len() == tokens * width;
    meet(all, lengths, sums, |w, sums, strip| match level {
        Level::Scalar => scalar::full(w, x, sums, strip),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2(token) => avx2::full(token, w, x, sums, strip),
        #[cfg(target_arch = "x86_64")]
        Level::Avx512(token) => avx512::full(token, w, x, sums, strip),
        #[cfg(target_arch = "aarch64")]
        Level::Neon(token) => neon::full(token, w, x, sums, strip),
        #[cfg(target_arch = "x86_64")]
        Level::Amx(token) => avx512::full(token.avx512(), w, x, sums, strip),
    });
}

/// [`packed_products`] of one matrix.
///
/// # Panics
/// When a length does not fit: a caller's bug.
pub fn packed_product(level: Level, w: &Packed<'_>, x: &[f32], out: &mut [f32]) {
    packed_products(level, &mut [Meeting { weight: *w, out }], x);
}

/// Has `write` fill the strips of all products, given what `sums_of` says of inputs that meet such codes, once the lengths
/// `fit`.
fn meet<S: Sync>(
    all: &mut [Meeting<'_>],
    fit: impl Fn(&PackedForm, usize) -> bool,
    sums_of: impl Fn(&PackedForm) -> Vec<S>,
    write: impl Fn(&Packed<'_>, &[S], &mut Strip<'_>) + Sync,
) {
    let mut adds = 0;
    for Meeting { weight, out } in all.iter() {
        weight.check();
        let tokens = out.len() / weight.form.rows;
        assert!(out.len() == tokens * weight.form.rows && fit(&weight.form, tokens), "activation lengths");
        adds += out.len() * weight.form.cols;
    }
    // Matrices of one width in groups of one length share them.
    let kind = |form: &PackedForm| (form.bits, form.group);
    let mut known: Vec<((u32, usize), Vec<S>)> = Vec::new();
    for form in all.iter().map(|one| &one.weight.form) {
        if !known.iter().any(|(of, _)| *of == kind(form)) {
            known.push((kind(form), sums_of(form)));
        }
    }
    let parts: Vec<_> =
        all.iter_mut().map(|Meeting { weight, out }| (*weight, Strips::new(out, weight.form.rows, STRIP))).collect();
    let (weights, strips): (Vec<_>, Vec<_>) = parts.into_iter().unzip();
    Strips::fill(&strips, adds, |which, strip| {
        let w = &weights[which];
        let sums = known.iter().find(|(of, _)| *of == kind(&w.form)).map_or(&[][..], |(_, sums)| sums);
        write(w, sums, strip);
    });
}
