//! Packed products with AVX-512: two blocks beside each other in a register, sixteen rows.
//!
//! VNNI adds four products of an unsigned code and a signed input to a 32-bit lane without a sum of 16 bits between, so a
//! code of any width is one operand. A lane folds its row in the order of the definition, whichever lanes lie beside it.
//!
//! The inner functions use no closures: what takes one is compiled for less, and would call it.

mod full;

use super::super::strips::Strip;
use super::{Block, CHUNK, LANES, Packed, Rounded, RoundedMut, avx2, by_token, rounded};
use crate::level::Avx512;
use full::strip_full;
use std::arch::x86_64::*;

/// Rows of a register: two blocks.
pub(super) const PAIR: usize = 2 * LANES;
/// Tokens that one pass over packed codes serves.
const FEW: usize = 4;
/// Tokens of whom more than that many meet codes that were unpacked once for all of them.
const MANY: usize = 2 * TILE;
/// Tokens that meet the rows of two pairs of blocks side by side: twelve sums of a piece and twelve of a span are in registers,
/// and eight loads of codes and inputs feed twelve products.
const TILE: usize = 6;
/// How many bytes ahead of who reads one stretch of memory the first cache is to be.
const NEAR: usize = 1 << 11;

/// [`rounded::round`] compiled for AVX-512.
pub(super) fn round(_: Avx512, x: &[f32], cols: usize, out: RoundedMut<'_>) {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn compiled(x: &[f32], cols: usize, out: RoundedMut<'_>) {
        rounded::round(x, cols, out);
    }
    // SAFETY: the token proves AVX-512.
    unsafe { compiled(x, cols, out) }
}

/// [`super::scalar::int8`].
pub(super) fn int8(token: Avx512, w: &Packed<'_>, x: &Rounded<'_>, starts: &[i32], strip: &mut Strip<'_>) {
    let (mut pairs, mut last) = strip.split(end_of_pairs(strip));
    let run =
        if pairs.tokens() > MANY { by_parts!(w.form.bits, many_int8) } else { by_parts!(w.form.bits, strip_int8) };
    // SAFETY: the token proves AVX-512 with VNNI, and AVX2, FMA and F16C.
    unsafe { run(w, x, starts, &mut pairs) };
    if !last.rows.is_empty() {
        avx2::int8(token.avx2(), w, x, starts, &mut last);
    }
}

/// [`super::scalar::full`].
pub(super) fn full(token: Avx512, w: &Packed<'_>, x: &[f32], sums: &[f32], strip: &mut Strip<'_>) {
    let (mut pairs, mut last) = strip.split(end_of_pairs(strip));
    let run = by_parts!(w.form.bits, strip_full);
    // SAFETY: the token proves AVX-512, and AVX2, FMA and F16C.
    unsafe { run(w, x, sums, &mut pairs) };
    if !last.rows.is_empty() {
        avx2::full(token.avx2(), w, x, sums, &mut last);
    }
}

/// The row where whole pairs of blocks end, the last of which may be padded.
pub(super) fn end_of_pairs(strip: &Strip<'_>) -> usize {
    strip.rows.start + strip.rows.len().div_ceil(LANES) / 2 * PAIR
}

/// Goes over the pairs of a strip, a few tokens at a time: their inputs stay in the first cache and the strip's codes in the
/// second. Two pairs share a load of the input.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn strip_int8<const LOW: u32, const HIGH: u32>(w: &Packed<'_>, x: &Rounded<'_>, starts: &[i32], strip: &mut Strip<'_>) {
    let mut token = 0;
    while token < strip.tokens() {
        let count = if strip.tokens() - token >= FEW { FEW } else { 1 };
        let mut row = strip.rows.start;
        while row < strip.rows.end {
            let (at, two) = ([token, row / LANES], strip.rows.end - row > PAIR);
            match (count, two) {
                (FEW, true) => put(pairs_int8::<LOW, HIGH, FEW, 2>(w, x, starts, at), at, strip),
                (FEW, false) => put(pairs_int8::<LOW, HIGH, FEW, 1>(w, x, starts, at), at, strip),
                (_, true) => put(pairs_int8::<LOW, HIGH, 1, 2>(w, x, starts, at), at, strip),
                (_, false) => put(pairs_int8::<LOW, HIGH, 1, 1>(w, x, starts, at), at, strip),
            }
            row += if two { 2 * PAIR } else { PAIR };
        }
        token += count;
    }
}

/// What all tokens share of a few pairs of blocks.
struct Unpacked {
    /// Of every chunk, pair by pair.
    codes: Vec<[__m512i; CHUNK / 4]>,
    /// [`int8_params`] of every group, pair by pair.
    params: Vec<(__m512, __m512)>,
}

/// Goes over the pairs of a strip, whose codes are unpacked once, into the second cache, for all tokens.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn many_int8<const LOW: u32, const HIGH: u32>(w: &Packed<'_>, x: &Rounded<'_>, starts: &[i32], strip: &mut Strip<'_>) {
    let mut unpacked = Unpacked {
        codes: vec![[_mm512_setzero_si512(); CHUNK / 4]; 2 * w.form.chunks()],
        params: vec![(_mm512_setzero_ps(), _mm512_setzero_ps()); 2 * w.form.groups()],
    };
    let mut row = strip.rows.start;
    while row < strip.rows.end {
        let two = strip.rows.end - row > PAIR;
        if two {
            tokens_int8::<LOW, HIGH, 2>(w, x, starts, row / LANES, &mut unpacked, strip);
        } else {
            tokens_int8::<LOW, HIGH, 1>(w, x, starts, row / LANES, &mut unpacked, strip);
        }
        row += if two { 2 * PAIR } else { PAIR };
    }
}

/// All tokens for `N` pairs of blocks.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn tokens_int8<const LOW: u32, const HIGH: u32, const N: usize>(
    w: &Packed<'_>,
    x: &Rounded<'_>,
    starts: &[i32],
    block: usize,
    unpacked: &mut Unpacked,
    strip: &mut Strip<'_>,
) {
    let (bytes, codes) = (32 * (LOW + HIGH) as usize, codes_of::<N>(w, block));
    for (chunk, unpacked) in unpacked.codes.chunks_exact_mut(N).take(w.form.chunks()).enumerate() {
        let at = chunk * codes[0][0].step;
        for n in 0..N {
            let these = [codes[n][0].chunk(at, bytes), codes[n][1].chunk(at, bytes)];
            each_vector!(keep::<LOW, HIGH>(these, &mut unpacked[n]));
        }
    }
    for (group, unpacked) in unpacked.params.chunks_exact_mut(N).take(w.form.groups()).enumerate() {
        for n in 0..N {
            unpacked[n] = int8_params(w, codes[n], group);
        }
    }
    let mut token = 0;
    while token < strip.tokens() {
        let (at, left) = ([token, block], strip.tokens() - token);
        if left >= TILE {
            put(tile_int8::<TILE, N>(w, x, starts, token, unpacked), at, strip);
        } else if left >= 2 {
            put(tile_int8::<2, N>(w, x, starts, token, unpacked), at, strip);
        } else {
            put(tile_int8::<1, N>(w, x, starts, token, unpacked), at, strip);
        }
        token += [1, 2, TILE][usize::from(left >= 2) + usize::from(left >= TILE)];
    }
}

/// Unpacks vector `J` of a chunk.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn keep<const LOW: u32, const HIGH: u32, const J: usize>(codes: [&[u8]; 2], out: &mut [__m512i; CHUNK / 4]) {
    out[J] = code_bytes::<LOW, HIGH, J>(codes);
}

/// `N` pairs of blocks, whose codes are `unpacked`, for `T` tokens from one on.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn tile_int8<const T: usize, const N: usize>(
    w: &Packed<'_>,
    x: &Rounded<'_>,
    starts: &[i32],
    token: usize,
    unpacked: &Unpacked,
) -> [[__m512; T]; N] {
    let (form, per_group) = (&w.form, w.form.group_chunks());
    let values = x.values.as_chunks::<CHUNK>().0;
    let values: [&[[i8; CHUNK]]; T] = by_token(values, token, form.chunks());
    let scales: [&[f32]; T] = by_token(x.scales, token, form.spans());
    let starts: [&[i32]; T] = by_token(starts, token, form.pieces());
    let mut y = [[_mm512_setzero_ps(); T]; N];
    let (mut chunk, mut piece) = (0, 0);
    for span in 0..form.spans() {
        let mut sum = [[_mm512_setzero_ps(); T]; N];
        while chunk < form.end_of_span(span) {
            // With a walk, which divides nothing, products of many tokens take 3 to 6 % longer (benches/record).
            let (group, end) = (chunk / per_group, form.end_of_piece(chunk));
            let mut dots = first_dots::<T, N>(&starts, piece);
            while chunk < end {
                let these = &unpacked.codes[chunk * N..][..N];
                let mut inputs = [&values[0][chunk]; T];
                for t in 1..T {
                    inputs[t] = &values[t][chunk];
                }
                for j in 0..CHUNK / 4 {
                    for t in 0..T {
                        let x = inputs[t];
                        let quad = [x[4 * j] as u8, x[4 * j + 1] as u8, x[4 * j + 2] as u8, x[4 * j + 3] as u8];
                        let quad = _mm512_set1_epi32(i32::from_le_bytes(quad));
                        for n in 0..N {
                            dots[n][t] = _mm512_dpbusd_epi32(dots[n][t], these[n][j], quad);
                        }
                    }
                }
                chunk += 1;
            }
            for n in 0..N {
                add_piece(w, unpacked.params[group * N + n], (&starts, piece), &dots[n], &mut sum[n]);
            }
            piece += 1;
        }
        add_span(&sum, (&scales, span), &mut y);
    }
    y
}

/// What sums of a piece start from.
#[inline]
#[target_feature(enable = "avx512f")]
fn first_dots<const T: usize, const N: usize>(starts: &[&[i32]; T], piece: usize) -> [[__m512i; T]; N] {
    let mut dots = [[_mm512_setzero_si512(); T]; N];
    for dots in &mut dots {
        for t in 0..T {
            dots[t] = _mm512_set1_epi32(starts[t][piece]);
        }
    }
    dots
}

/// Adds a piece of a span to its sums.
#[inline]
#[target_feature(enable = "avx512f")]
fn add_piece<const T: usize>(
    w: &Packed<'_>,
    (scale, from_middle): (__m512, __m512),
    (starts, piece): (&[&[i32]; T], usize),
    dots: &[__m512i; T],
    sum: &mut [__m512; T],
) {
    for t in 0..T {
        let mut dot = _mm512_cvtepi32_ps(dots[t]);
        if !w.zeros.is_empty() {
            dot = _mm512_fmadd_ps(from_middle, _mm512_set1_ps(starts[t][piece] as f32), dot);
        }
        sum[t] = _mm512_fmadd_ps(dot, scale, sum[t]);
    }
}

/// Adds a span to the outputs.
#[inline]
#[target_feature(enable = "avx512f")]
fn add_span<const T: usize, const N: usize>(
    sum: &[[__m512; T]; N],
    (scales, span): (&[&[f32]; T], usize),
    y: &mut [[__m512; T]; N],
) {
    for t in 0..T {
        let scale = _mm512_set1_ps(scales[t][span]);
        for n in 0..N {
            y[n][t] = _mm512_fmadd_ps(sum[n][t], scale, y[n][t]);
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn put<const T: usize, const N: usize>(y: [[__m512; T]; N], [token, block]: [usize; 2], strip: &mut Strip<'_>) {
    for (n, y) in y.iter().enumerate() {
        for (t, y) in y.iter().enumerate() {
            let mut lanes = [0.0f32; PAIR];
            // SAFETY: 64 bytes are there, and the store needs no alignment.
            unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), *y) };
            strip.put(token + t, (block + 2 * n) * LANES, &lanes);
        }
    }
}

/// Codes of the `N` pairs from `block` on, each block by itself, and all with one step: strips begin with blocks that alternate.
fn codes_of<'a, const N: usize>(w: &Packed<'a>, block: usize) -> [[Block<'a>; 2]; N] {
    let mut codes = [[w.block(block), w.block(block + 1)]; N];
    for (n, codes) in codes.iter_mut().enumerate().skip(1) {
        *codes = [w.block(block + 2 * n), w.block(block + 2 * n + 1)];
    }
    debug_assert!(codes.iter().flatten().all(|block| block.step == codes[0][0].step), "blocks that alternate alike");
    codes
}

/// `N` pairs of blocks for `T` tokens.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn pairs_int8<const LOW: u32, const HIGH: u32, const T: usize, const N: usize>(
    w: &Packed<'_>,
    x: &Rounded<'_>,
    starts: &[i32],
    [token, block]: [usize; 2],
) -> [[__m512; T]; N] {
    let bytes = 32 * (LOW + HIGH) as usize;
    let (form, mut walk) = (&w.form, w.form.walk());
    let codes = codes_of::<N>(w, block);
    let values = x.values.as_chunks::<CHUNK>().0;
    let values: [&[[i8; CHUNK]]; T] = by_token(values, token, form.chunks());
    let scales: [&[f32]; T] = by_token(x.scales, token, form.spans());
    let starts: [&[i32]; T] = by_token(starts, token, form.pieces());
    let mut y = [[_mm512_setzero_ps(); T]; N];
    let (mut chunk, mut piece) = (0, 0);
    for span in 0..form.spans() {
        let mut sum = [[_mm512_setzero_ps(); T]; N];
        let end_of_span = form.end_of_span(span);
        while chunk < end_of_span {
            let (group, end) = walk.next(end_of_span);
            let mut dots = first_dots::<T, N>(&starts, piece);
            while chunk < end {
                let at = chunk * codes[0][0].step;
                let mut inputs = [&values[0][chunk]; T];
                for t in 1..T {
                    inputs[t] = &values[t][chunk];
                }
                let mut these = [[codes[0][0].chunk(at, bytes); 2]; N];
                for n in 0..N {
                    these[n] = [codes[n][0].chunk(at, bytes), codes[n][1].chunk(at, bytes)];
                }
                if T == 1 {
                    avx2::fetch::<_MM_HINT_T1>(these.as_flattened(), avx2::AHEAD);
                    avx2::fetch::<_MM_HINT_T0>(these.as_flattened(), NEAR);
                }
                each_vector!(add_quads::<LOW, HIGH, T, N>(&these, &inputs, &mut dots));
                chunk += 1;
            }
            for n in 0..N {
                add_piece(w, int8_params(w, codes[n], group), (&starts, piece), &dots[n], &mut sum[n]);
            }
            piece += 1;
        }
        add_span(&sum, (&scales, span), &mut y);
    }
    y
}

/// Adds the four columns of vector `J`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn add_quads<const LOW: u32, const HIGH: u32, const T: usize, const N: usize, const J: usize>(
    codes: &[[&[u8]; 2]; N],
    x: &[&[i8; CHUNK]; T],
    dots: &mut [[__m512i; T]; N],
) {
    let mut vectors = [_mm512_setzero_si512(); N];
    for (v, codes) in vectors.iter_mut().zip(codes) {
        *v = code_bytes::<LOW, HIGH, J>(*codes);
    }
    for t in 0..T {
        let quad = [x[t][4 * J] as u8, x[t][4 * J + 1] as u8, x[t][4 * J + 2] as u8, x[t][4 * J + 3] as u8];
        let quad = _mm512_set1_epi32(i32::from_le_bytes(quad));
        for n in 0..N {
            dots[n][t] = _mm512_dpbusd_epi32(dots[n][t], vectors[n], quad);
        }
    }
}

/// Vector `J` of a chunk of two blocks, a code in each byte.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn code_bytes<const LOW: u32, const HIGH: u32, const J: usize>(codes: [&[u8]; 2]) -> __m512i {
    let ((low, high), (lower, higher)) = (codes[0].split_at(32 * LOW as usize), codes[1].split_at(32 * LOW as usize));
    let v = vector::<LOW, J>([low, lower]);
    if HIGH == 0 { v } else { _mm512_or_si512(v, _mm512_slli_epi16::<4>(vector::<HIGH, J>([high, higher]))) }
}

/// Vector `J` of a part of a chunk of two blocks, `B` bits in each byte.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn vector<const B: u32, const J: usize>(bytes: [&[u8]; 2]) -> __m512i {
    match B {
        4 => low_bits::<4>(bytes, J % 4, J / 4 * 4),
        2 => low_bits::<2>(bytes, J % 2, J / 2 * 2),
        3 => {
            let top = _mm512_slli_epi16::<2>(low_bits::<1>(bytes, 2, J));
            _mm512_or_si512(low_bits::<2>(bytes, J % 2, J / 2 * 2), top)
        }
        _ => low_bits::<1>(bytes, 0, J),
    }
}

/// `B` bits of every byte of the `i`th vector, from bit `from` on.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn low_bits<const B: u32>(bytes: [&[u8]; 2], i: usize, from: usize) -> __m512i {
    let v = load(bytes, i);
    let v = match from {
        0 => v,
        1 => _mm512_srli_epi16::<1>(v),
        2 => _mm512_srli_epi16::<2>(v),
        3 => _mm512_srli_epi16::<3>(v),
        4 => _mm512_srli_epi16::<4>(v),
        5 => _mm512_srli_epi16::<5>(v),
        6 => _mm512_srli_epi16::<6>(v),
        _ => _mm512_srli_epi16::<7>(v),
    };
    _mm512_and_si512(v, _mm512_set1_epi8(((1u32 << B) - 1) as i8))
}

/// The `i`th 32 bytes of two blocks.
#[inline]
#[target_feature(enable = "avx512f")]
fn load(bytes: [&[u8]; 2], i: usize) -> __m512i {
    let (first, second) = (avx2::load(bytes[0], i), avx2::load(bytes[1], i));
    _mm512_inserti64x4::<1>(_mm512_castsi256_si512(first), second)
}

/// Scales and zero points of the rows of two blocks.
#[inline]
#[target_feature(enable = "avx512f,avx512dq,avx2,f16c")]
pub(super) fn params(w: &Packed<'_>, blocks: [Block<'_>; 2], group: usize) -> (__m512, __m512) {
    let [low, high] = blocks;
    let ((scale, zero), (scales, zeros)) = (avx2::params(w, low.param(group)), avx2::params(w, high.param(group)));
    let scale = _mm512_insertf32x8::<1>(_mm512_castps256_ps512(scale), scales);
    (scale, _mm512_insertf32x8::<1>(_mm512_castps256_ps512(zero), zeros))
}

/// Scales of the rows of two blocks, and how far their zero points lie from the middle, in middles: what the start of a piece
/// has to be multiplied by, to be taken off by zero points.
#[inline]
#[target_feature(enable = "avx512f,avx512dq,avx2,f16c")]
pub(super) fn int8_params(w: &Packed<'_>, blocks: [Block<'_>; 2], group: usize) -> (__m512, __m512) {
    let (scale, zero) = params(w, blocks, group);
    (scale, _mm512_fmadd_ps(zero, _mm512_set1_ps(1.0 / w.form.middle() as f32), _mm512_set1_ps(-1.0)))
}
