//! Packed products with AVX-512: two blocks beside each other in a register, sixteen rows.
//!
//! VNNI adds four products of an unsigned code and a signed input to a 32-bit lane without a sum of 16 bits between, so a
//! code of any width is one operand. A lane folds its row in the order of the definition, whichever lanes lie beside it.
//!
//! The inner functions use no closures: what takes one is compiled for less, and would call it.

use super::super::strips::Strip;
use super::{Block, CHUNK, LANES, Packed, Rounded, avx2, by_token};
use crate::level::Avx512;
use std::arch::x86_64::*;
use std::ops::Range;

/// Rows of a register: two blocks.
pub(super) const PAIR: usize = 2 * LANES;
/// Tokens that one pass over unpacked codes serves: as many sums are under way as two units with a latency of four take.
const TOKENS: usize = 8;
/// Tokens that one pass over packed codes serves.
const FEW: usize = 4;
/// Tokens of whom more than that many meet codes that were unpacked once for all of them.
const MANY: usize = 2 * TILE;
/// Tokens that meet the rows of two pairs of blocks side by side: twelve sums of a chunk and twelve of a group are in registers,
/// and eight loads of codes and inputs feed twelve products.
const TILE: usize = 6;
/// Tokens that share unpacked codes: their inputs stay in the second cache from one pair of blocks to the next.
const BATCH: usize = 32;
/// Chunks that are unpacked together: 8 KB, a part of the first cache.
const UNPACKED: usize = 4;
/// Pairs of blocks that one token meets side by side where activations are not rounded.
const PAIRS: usize = 4;

/// [`super::round`] compiled for AVX-512.
pub(super) fn round(_: Avx512, x: &[f32], cols: usize, values: &mut [i8], scales: &mut [f32]) {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn compiled(x: &[f32], cols: usize, values: &mut [i8], scales: &mut [f32]) {
        super::round(x, cols, values, scales);
    }
    // SAFETY: the token proves AVX-512.
    unsafe { compiled(x, cols, values, scales) }
}

/// [`super::scalar::int8`].
pub(super) fn int8(token: Avx512, w: &Packed<'_>, x: &Rounded<'_>, sums: &[f32], strip: &mut Strip<'_>) {
    let (mut pairs, mut last) = strip.split(end_of_pairs(strip));
    let run =
        if pairs.tokens() > MANY { by_parts!(w.form.bits, many_int8) } else { by_parts!(w.form.bits, strip_int8) };
    // SAFETY: the token proves AVX-512 with VNNI, and AVX2, FMA and F16C.
    unsafe { run(w, x, sums, &mut pairs) };
    if !last.rows.is_empty() {
        avx2::int8(token.avx2(), w, x, sums, &mut last);
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
fn strip_int8<const LOW: u32, const HIGH: u32>(w: &Packed<'_>, x: &Rounded<'_>, sums: &[f32], strip: &mut Strip<'_>) {
    let mut token = 0;
    while token < strip.tokens() {
        let count = if strip.tokens() - token >= FEW { FEW } else { 1 };
        let mut row = strip.rows.start;
        while row < strip.rows.end {
            let (at, two) = ([token, row / LANES], strip.rows.end - row > PAIR);
            match (count, two) {
                (FEW, true) => put(pairs_int8::<LOW, HIGH, FEW, 2>(w, x, sums, at), at, strip),
                (FEW, false) => put(pairs_int8::<LOW, HIGH, FEW, 1>(w, x, sums, at), at, strip),
                (_, true) => put(pairs_int8::<LOW, HIGH, 1, 2>(w, x, sums, at), at, strip),
                (_, false) => put(pairs_int8::<LOW, HIGH, 1, 1>(w, x, sums, at), at, strip),
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
    /// Scales and zero points of every group, pair by pair.
    params: Vec<(__m512, __m512)>,
}

/// Goes over the pairs of a strip, whose codes are unpacked once, into the second cache, for all tokens.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn many_int8<const LOW: u32, const HIGH: u32>(w: &Packed<'_>, x: &Rounded<'_>, sums: &[f32], strip: &mut Strip<'_>) {
    let mut unpacked = Unpacked {
        codes: vec![[_mm512_setzero_si512(); CHUNK / 4]; 2 * w.form.chunks()],
        params: vec![(_mm512_setzero_ps(), _mm512_setzero_ps()); 2 * w.form.groups()],
    };
    let mut row = strip.rows.start;
    while row < strip.rows.end {
        let two = strip.rows.end - row > PAIR;
        if two {
            tokens_int8::<LOW, HIGH, 2>(w, x, sums, row / LANES, &mut unpacked, strip);
        } else {
            tokens_int8::<LOW, HIGH, 1>(w, x, sums, row / LANES, &mut unpacked, strip);
        }
        row += if two { 2 * PAIR } else { PAIR };
    }
}

/// All tokens for `N` pairs of blocks.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn tokens_int8<const LOW: u32, const HIGH: u32, const N: usize>(
    w: &Packed<'_>,
    x: &Rounded<'_>,
    sums: &[f32],
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
            unpacked[n] = params(w, codes[n], group);
        }
    }
    let mut token = 0;
    while token < strip.tokens() {
        let (at, left) = ([token, block], strip.tokens() - token);
        if left >= TILE {
            put(tile_int8::<TILE, N>(w, x, sums, token, unpacked), at, strip);
        } else if left >= 2 {
            put(tile_int8::<2, N>(w, x, sums, token, unpacked), at, strip);
        } else {
            put(tile_int8::<1, N>(w, x, sums, token, unpacked), at, strip);
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
    sums: &[f32],
    token: usize,
    unpacked: &Unpacked,
) -> [[__m512; T]; N] {
    let (chunks, groups) = (w.form.chunks(), w.form.groups());
    let values = x.values.as_chunks::<CHUNK>().0;
    let values: [&[[i8; CHUNK]]; T] = by_token(values, token, chunks);
    let scales: [&[f32]; T] = by_token(x.scales, token, chunks);
    let mut y = [[_mm512_setzero_ps(); T]; N];
    for group in 0..groups {
        let mut sum = [[_mm512_setzero_ps(); T]; N];
        for chunk in w.form.chunks_of(group) {
            let these = &unpacked.codes[chunk * N..][..N];
            let mut inputs = [&values[0][chunk]; T];
            for t in 1..T {
                inputs[t] = &values[t][chunk];
            }
            let mut dots = [[_mm512_setzero_si512(); T]; N];
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
            for t in 0..T {
                let scale = _mm512_set1_ps(scales[t][chunk]);
                for n in 0..N {
                    sum[n][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[n][t]), scale, sum[n][t]);
                }
            }
        }
        for n in 0..N {
            let (scale, zero) = unpacked.params[group * N + n];
            for t in 0..T {
                let centred = _mm512_fnmadd_ps(zero, _mm512_set1_ps(sums[(token + t) * groups + group]), sum[n][t]);
                y[n][t] = _mm512_fmadd_ps(centred, scale, y[n][t]);
            }
        }
    }
    y
}

/// Many tokens share codes that were unpacked once; of few, as many sums are under way as hide the latency of a
/// multiply-add: of tokens, or of pairs.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn strip_full<const LOW: u32, const HIGH: u32>(w: &Packed<'_>, x: &[f32], sums: &[f32], strip: &mut Strip<'_>) {
    let whole = strip.tokens() / TOKENS * TOKENS;
    for token in (0..whole).step_by(BATCH) {
        let count = BATCH.min(whole - token);
        for row in strip.rows.clone().step_by(PAIR) {
            batch_full::<LOW, HIGH>(w, x, sums, [token, row / LANES], count, strip);
        }
    }
    let mut token = whole;
    while token < strip.tokens() {
        let count = if strip.tokens() - token >= FEW { FEW } else { 1 };
        let mut row = strip.rows.start;
        while row < strip.rows.end {
            let (at, pairs) = ([token, row / LANES], (strip.rows.end - row).div_ceil(PAIR));
            let pairs = if count == 1 && pairs >= PAIRS { PAIRS } else { 1 };
            match (count, pairs) {
                (FEW, _) => put(pairs_full::<LOW, HIGH, FEW, 1>(w, x, sums, at), at, strip),
                (_, PAIRS) => put(pairs_full::<LOW, HIGH, 1, PAIRS>(w, x, sums, at), at, strip),
                _ => put(pairs_full::<LOW, HIGH, 1, 1>(w, x, sums, at), at, strip),
            }
            row += pairs * PAIR;
        }
        token += count;
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

/// Bytes that are fetched before they are needed, by who reads one stretch of memory: a third of the first cache.
const AHEAD: usize = 1 << 14;

/// Has what is met `ahead` bytes later come into the first cache: one token waits for nothing but memory.
#[inline]
#[target_feature(enable = "avx512f")]
fn fetch_ahead<const N: usize>(codes: &[[&[u8]; 2]; N], ahead: usize) {
    for pair in codes {
        for codes in pair {
            for line in codes.chunks(64) {
                // Beyond the matrix nothing is fetched, which a prefetch may be asked for.
                _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().wrapping_add(ahead).cast());
            }
        }
    }
}

/// `N` pairs of blocks for `T` tokens.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn pairs_int8<const LOW: u32, const HIGH: u32, const T: usize, const N: usize>(
    w: &Packed<'_>,
    x: &Rounded<'_>,
    sums: &[f32],
    [token, block]: [usize; 2],
) -> [[__m512; T]; N] {
    let bytes = 32 * (LOW + HIGH) as usize;
    let (chunks, groups) = (w.form.chunks(), w.form.groups());
    let codes = codes_of::<N>(w, block);
    let values = x.values.as_chunks::<CHUNK>().0;
    let values: [&[[i8; CHUNK]]; T] = by_token(values, token, chunks);
    let scales: [&[f32]; T] = by_token(x.scales, token, chunks);
    let mut y = [[_mm512_setzero_ps(); T]; N];
    for group in 0..groups {
        let mut sum = [[_mm512_setzero_ps(); T]; N];
        for chunk in w.form.chunks_of(group) {
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
                fetch_ahead(&these, AHEAD);
            }
            let mut dots = [[_mm512_setzero_si512(); T]; N];
            each_vector!(add_quads::<LOW, HIGH, T, N>(&these, &inputs, &mut dots));
            for t in 0..T {
                let scale = _mm512_set1_ps(scales[t][chunk]);
                for n in 0..N {
                    sum[n][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[n][t]), scale, sum[n][t]);
                }
            }
        }
        for n in 0..N {
            let (scale, zero) = params(w, codes[n], group);
            for t in 0..T {
                let total = _mm512_set1_ps(sums[(token + t) * groups + group]);
                y[n][t] = _mm512_fmadd_ps(_mm512_fnmadd_ps(zero, total, sum[n][t]), scale, y[n][t]);
            }
        }
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

/// A pair of blocks for `count` tokens, a multiple of [`TOKENS`] and at most [`BATCH`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn batch_full<const LOW: u32, const HIGH: u32>(
    w: &Packed<'_>,
    x: &[f32],
    sums: &[f32],
    [token, block]: [usize; 2],
    count: usize,
    strip: &mut Strip<'_>,
) {
    let (chunks, groups, per_group) = (w.form.chunks(), w.form.groups(), w.form.group_chunks());
    let [codes] = codes_of::<1>(w, block);
    let mut unpacked = [_mm512_setzero_ps(); UNPACKED * CHUNK];
    // What a token's sum of this group and its output are so far.
    let (mut sum, mut y) = ([_mm512_setzero_ps(); BATCH], [_mm512_setzero_ps(); BATCH]);
    for group in 0..groups {
        let end = ((group + 1) * per_group).min(chunks);
        let mut from = group * per_group;
        while from < end {
            let to = (from + UNPACKED).min(end);
            unpack::<LOW, HIGH>(codes, from..to, &mut unpacked);
            for t in (0..count).step_by(TOKENS) {
                let mut rows = [&x[..0]; TOKENS];
                for i in 0..TOKENS {
                    rows[i] = &x[(token + t + i) * chunks * CHUNK..][from * CHUNK..to * CHUNK];
                }
                columns(&unpacked[..(to - from) * CHUNK], rows, &mut sum[t..t + TOKENS]);
            }
            from = to;
        }
        let (scale, zero) = params(w, codes, group);
        for t in 0..count {
            let centred = _mm512_fnmadd_ps(zero, _mm512_set1_ps(sums[(token + t) * groups + group]), sum[t]);
            y[t] = _mm512_fmadd_ps(centred, scale, y[t]);
            sum[t] = _mm512_setzero_ps();
        }
    }
    for (t, y) in y.into_iter().enumerate().take(count) {
        put([[y]], [token + t, block], strip);
    }
}

/// Codes of the chunks `which` of two blocks as numbers, a register for each column.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx2")]
fn unpack<const LOW: u32, const HIGH: u32>(codes: [Block<'_>; 2], which: Range<usize>, out: &mut [__m512]) {
    let bytes = 32 * (LOW + HIGH) as usize;
    for (chunk, out) in which.zip(out.as_chunks_mut::<CHUNK>().0) {
        let at = chunk * codes[0].step;
        let codes = codes.map(|codes| codes.chunk(at, bytes));
        each_vector!(unpack_vector::<LOW, HIGH>(codes, out));
    }
}

/// The four columns of vector `J`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx2")]
fn unpack_vector<const LOW: u32, const HIGH: u32, const J: usize>(codes: [&[u8]; 2], out: &mut [__m512; CHUNK]) {
    let mut v = code_bytes::<LOW, HIGH, J>(codes);
    for i in 0..4 {
        out[4 * J + i] = _mm512_cvtepi32_ps(_mm512_and_si512(v, _mm512_set1_epi32(0xff)));
        v = _mm512_srli_epi32::<8>(v);
    }
}

/// Adds `w · x` of every column, one after another, to the sums of eight tokens.
#[inline]
#[target_feature(enable = "avx512f")]
fn columns(w: &[__m512], x: [&[f32]; TOKENS], sum: &mut [__m512]) {
    let [a, b, c, d, e, f, g, h] = x;
    let mut s = [_mm512_setzero_ps(); TOKENS];
    s.copy_from_slice(sum);
    let inputs = a.iter().zip(b).zip(c).zip(d).zip(e).zip(f).zip(g).zip(h);
    for (w, (((((((a, b), c), d), e), f), g), h)) in w.iter().zip(inputs) {
        for (s, x) in s.iter_mut().zip([a, b, c, d, e, f, g, h]) {
            *s = _mm512_fmadd_ps(*w, _mm512_set1_ps(*x), *s);
        }
    }
    sum.copy_from_slice(&s);
}

/// `N` pairs of blocks for `T` tokens.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn pairs_full<const LOW: u32, const HIGH: u32, const T: usize, const N: usize>(
    w: &Packed<'_>,
    x: &[f32],
    sums: &[f32],
    [token, block]: [usize; 2],
) -> [[__m512; T]; N] {
    let bytes = 32 * (LOW + HIGH) as usize;
    let (chunks, groups) = (w.form.chunks(), w.form.groups());
    let codes = codes_of::<N>(w, block);
    let values = x.as_chunks::<CHUNK>().0;
    let values: [&[[f32; CHUNK]]; T] = by_token(values, token, chunks);
    let mut y = [[_mm512_setzero_ps(); T]; N];
    for group in 0..groups {
        let mut sum = [[_mm512_setzero_ps(); T]; N];
        for chunk in w.form.chunks_of(group) {
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
                // The same chunks of the next blocks, since these are more than those that alternate.
                fetch_ahead(&these, N * 2 * chunks * bytes);
            }
            each_vector!(add_columns::<LOW, HIGH, T, N>(&these, &inputs, &mut sum));
        }
        for n in 0..N {
            let (scale, zero) = params(w, codes[n], group);
            for t in 0..T {
                let total = _mm512_set1_ps(sums[(token + t) * groups + group]);
                y[n][t] = _mm512_fmadd_ps(_mm512_fnmadd_ps(zero, total, sum[n][t]), scale, y[n][t]);
            }
        }
    }
    y
}

/// Adds the four columns of vector `J`, one after another.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn add_columns<const LOW: u32, const HIGH: u32, const T: usize, const N: usize, const J: usize>(
    codes: &[[&[u8]; 2]; N],
    x: &[&[f32; CHUNK]; T],
    sum: &mut [[__m512; T]; N],
) {
    let mut vectors = [_mm512_setzero_si512(); N];
    for (v, codes) in vectors.iter_mut().zip(codes) {
        *v = code_bytes::<LOW, HIGH, J>(*codes);
    }
    for i in 0..4 {
        for n in 0..N {
            let code = _mm512_cvtepi32_ps(_mm512_and_si512(vectors[n], _mm512_set1_epi32(0xff)));
            vectors[n] = _mm512_srli_epi32::<8>(vectors[n]);
            for t in 0..T {
                sum[n][t] = _mm512_fmadd_ps(code, _mm512_set1_ps(x[t][4 * J + i]), sum[n][t]);
            }
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
