//! Activations as they are, in f32.

use super::super::{Block, CHUNK, LANES, Packed, avx2, by_token};
use super::{FEW, PAIR, code_bytes, codes_of, params, put};
use crate::ops::strips::Strip;
use std::arch::x86_64::*;
use std::ops::Range;

/// Tokens that one pass over unpacked codes serves: as many sums are under way as two units with a latency of four take.
const TOKENS: usize = 8;
/// Tokens that share unpacked codes: their inputs stay in the second cache from one pair of blocks to the next.
const BATCH: usize = 32;
/// Chunks that are unpacked together: 8 KB, a part of the first cache.
const UNPACKED: usize = 4;
/// Pairs of blocks that one token meets side by side where activations are not rounded.
const PAIRS: usize = 4;

/// Many tokens share codes that were unpacked once; of few, as many sums are under way as hide the latency of a
/// multiply-add: of tokens, or of pairs.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) fn strip_full<const LOW: u32, const HIGH: u32>(
    w: &Packed<'_>,
    x: &[f32],
    sums: &[f32],
    strip: &mut Strip<'_>,
) {
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
                avx2::fetch::<_MM_HINT_T1>(these.as_flattened(), N * 2 * chunks * bytes);
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
