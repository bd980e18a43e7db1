//! Packed products with AVX2.
//!
//! With rounded activations, a vector of 32 codes meets one broadcast of four inputs: products of a code of at most four
//! bits and an input of eight add up in pairs, and eight such pairs stay below 2¹⁵ (8 · 2 · 15 · 127 = 30,480), so a chunk
//! is folded in 16-bit lanes and widened once. Codes wider than four bits are two such sums.

use super::super::strips::Strip;
use super::{Block, CHUNK, LANES, Packed, Rounded, RoundedMut, Scales, TOGETHER, by_token, rounded};
use crate::level::Avx2;
use std::arch::x86_64::*;

/// Tokens that one pass over the codes serves.
const TOKENS: usize = 4;
/// Blocks that one token meets side by side: those whose chunks alternate, so that memory is read from end to end.
const BLOCKS: usize = TOGETHER;

/// [`rounded::round`] compiled for AVX2.
pub(super) fn round(_: Avx2, x: &[f32], cols: usize, out: RoundedMut<'_>) {
    #[target_feature(enable = "avx2")]
    fn compiled(x: &[f32], cols: usize, out: RoundedMut<'_>) {
        rounded::round(x, cols, out);
    }
    // SAFETY: the token proves AVX2.
    unsafe { compiled(x, cols, out) }
}

/// [`super::scalar::int8`].
pub(super) fn int8(_: Avx2, w: &Packed<'_>, x: &Rounded<'_>, starts: &[i32], strip: &mut Strip<'_>) {
    let run = by_parts!(w.form.bits, strip_int8);
    // SAFETY: the token proves AVX2, FMA and F16C.
    unsafe { run(w, x, starts, strip) }
}

/// [`super::scalar::full`].
pub(super) fn full(_: Avx2, w: &Packed<'_>, x: &[f32], sums: &[f32], strip: &mut Strip<'_>) {
    let run = by_parts!(w.form.bits, strip_full);
    // SAFETY: the token proves AVX2, FMA and F16C.
    unsafe { run(w, x, sums, strip) }
}

/// Goes over the blocks of a strip, a few tokens at a time: their inputs stay in the first cache and the strip's codes in
/// the second. Many sums are under way, since an addition waits for the one before it: of as many tokens, or of as many blocks.
macro_rules! by_tiles {
    ($tile:ident::<$low:ident, $high:ident>($($arg:ident),*), $strip:ident) => {{
        let (end, tokens) = ($strip.rows.end.div_ceil(LANES), $strip.tokens());
        let mut token = 0;
        while token < tokens {
            let count = if tokens - token >= TOKENS { TOKENS } else { 1 };
            let mut block = $strip.rows.start / LANES;
            while block < end {
                let at = [token, block];
                if count == TOKENS {
                    put($tile::<$low, $high, TOKENS, 1>($($arg,)* at), at, $strip);
                    block += 1;
                } else if end - block >= BLOCKS {
                    put($tile::<$low, $high, 1, BLOCKS>($($arg,)* at), at, $strip);
                    block += BLOCKS;
                } else {
                    put($tile::<$low, $high, 1, 1>($($arg,)* at), at, $strip);
                    block += 1;
                }
            }
            token += count;
        }
    }};
}

#[target_feature(enable = "avx2,fma,f16c")]
fn strip_int8<const LOW: u32, const HIGH: u32>(w: &Packed<'_>, x: &Rounded<'_>, starts: &[i32], strip: &mut Strip<'_>) {
    by_tiles!(blocks_int8::<LOW, HIGH>(w, x, starts), strip);
}

#[target_feature(enable = "avx2,fma,f16c")]
fn strip_full<const LOW: u32, const HIGH: u32>(w: &Packed<'_>, x: &[f32], sums: &[f32], strip: &mut Strip<'_>) {
    by_tiles!(blocks_full::<LOW, HIGH>(w, x, sums), strip);
}

fn put<const T: usize, const N: usize>(y: [[[f32; LANES]; T]; N], [token, block]: [usize; 2], strip: &mut Strip<'_>) {
    for (n, y) in y.iter().enumerate() {
        y.iter().enumerate().for_each(|(t, y)| strip.put(token + t, (block + n) * LANES, y));
    }
}

/// `N` blocks of eight rows for `T` tokens.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn blocks_int8<const LOW: u32, const HIGH: u32, const T: usize, const N: usize>(
    w: &Packed<'_>,
    x: &Rounded<'_>,
    starts: &[i32],
    [token, block]: [usize; 2],
) -> [[[f32; LANES]; T]; N] {
    let bytes = 32 * (LOW + HIGH) as usize;
    let (form, mut walk) = (&w.form, w.form.walk());
    let codes: [Block<'_>; N] = std::array::from_fn(|n| w.block(block + n));
    let values = x.values.as_chunks::<CHUNK>().0;
    let values: [&[[i8; CHUNK]]; T] = by_token(values, token, form.chunks());
    let scales: [&[f32]; T] = by_token(x.scales, token, form.spans());
    let starts: [&[i32]; T] = by_token(starts, token, form.pieces());
    let mut y = [[_mm256_setzero_ps(); T]; N];
    let (mut chunk, mut piece) = (0, 0);
    let mut span = 0;
    while span < form.spans() {
        let mut sum = [[_mm256_setzero_ps(); T]; N];
        let end_of_span = form.end_of_span(span);
        while chunk < end_of_span {
            let (group, end) = walk.next(end_of_span);
            let mut dots = [[_mm256_setzero_si256(); T]; N];
            for dots in &mut dots {
                for t in 0..T {
                    dots[t] = _mm256_set1_epi32(starts[t][piece]);
                }
            }
            while chunk < end {
                let mut inputs = [&values[0][chunk]; T];
                for t in 1..T {
                    inputs[t] = &values[t][chunk];
                }
                for n in 0..N {
                    let these = codes[n].chunk(chunk * codes[n].step, bytes);
                    if T == 1 {
                        fetch::<_MM_HINT_T1>(&[these], AHEAD);
                    }
                    let more = chunk_int8::<LOW, HIGH, T>(these, inputs);
                    for t in 0..T {
                        dots[n][t] = _mm256_add_epi32(dots[n][t], more[t]);
                    }
                }
                chunk += 1;
            }
            for n in 0..N {
                let (scale, zero) = params(w, codes[n].param(group));
                for t in 0..T {
                    let mut dot = _mm256_cvtepi32_ps(dots[n][t]);
                    if !w.zeros.is_empty() {
                        let start = _mm256_set1_ps(starts[t][piece] as f32);
                        dot = _mm256_fmadd_ps(from_middle(w, zero), start, dot);
                    }
                    sum[n][t] = _mm256_fmadd_ps(dot, scale, sum[n][t]);
                }
            }
            piece += 1;
        }
        for n in 0..N {
            for t in 0..T {
                y[n][t] = _mm256_fmadd_ps(sum[n][t], _mm256_set1_ps(scales[t][span]), y[n][t]);
            }
        }
        span += 1;
    }
    all_lanes(y)
}

/// How many bytes ahead of who reads one stretch of memory the second cache is to be, which takes as much from memory at a time as
/// there is, where the first would have inputs wait for it.
pub(super) const AHEAD: usize = 1 << 14;

/// Has what is met `ahead` bytes later come into the cache that `HINT` names: one token waits for nothing but memory.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn fetch<const HINT: i32>(codes: &[&[u8]], ahead: usize) {
    for codes in codes {
        for line in codes.chunks(64) {
            // Beyond the matrix nothing is fetched, which a prefetch may be asked for.
            _mm_prefetch::<HINT>(line.as_ptr().wrapping_add(ahead).cast());
        }
    }
}

/// How far zero points lie from the middle, in middles: what starts have to be multiplied by, to be taken off by zero points.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn from_middle(w: &Packed<'_>, zero: __m256) -> __m256 {
    _mm256_fmadd_ps(zero, _mm256_set1_ps(1.0 / w.form.middle() as f32), _mm256_set1_ps(-1.0))
}

/// Sums of one chunk in 32-bit lanes, a row each.
#[inline]
#[target_feature(enable = "avx2")]
fn chunk_int8<const LOW: u32, const HIGH: u32, const T: usize>(codes: &[u8], x: [&[i8; CHUNK]; T]) -> [__m256i; T] {
    let (low, high) = codes.split_at(32 * LOW as usize);
    let mut sum = pairs::<LOW, T>(low, x);
    for sum in &mut sum {
        *sum = _mm256_madd_epi16(*sum, _mm256_set1_epi16(1));
    }
    if HIGH > 0 {
        let high = pairs::<HIGH, T>(high, x);
        for (sum, high) in sum.iter_mut().zip(high) {
            *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(high, _mm256_set1_epi16(16)));
        }
    }
    sum
}

/// Sums of pairs of columns of one chunk, over codes of `B` bits.
#[inline]
#[target_feature(enable = "avx2")]
fn pairs<const B: u32, const T: usize>(codes: &[u8], x: [&[i8; CHUNK]; T]) -> [__m256i; T] {
    let mut sum = [_mm256_setzero_si256(); T];
    each_vector!(add_pairs::<B, T>(codes, &x, &mut sum));
    sum
}

#[inline]
#[target_feature(enable = "avx2")]
fn add_pairs<const B: u32, const T: usize, const J: usize>(
    codes: &[u8],
    x: &[&[i8; CHUNK]; T],
    sum: &mut [__m256i; T],
) {
    let codes = vector::<B, J>(codes);
    for t in 0..T {
        let x = [x[t][4 * J], x[t][4 * J + 1], x[t][4 * J + 2], x[t][4 * J + 3]].map(|v| v as u8);
        let x = _mm256_set1_epi32(i32::from_le_bytes(x));
        sum[t] = _mm256_add_epi16(sum[t], _mm256_maddubs_epi16(codes, x));
    }
}

/// `N` blocks of eight rows for `T` tokens.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn blocks_full<const LOW: u32, const HIGH: u32, const T: usize, const N: usize>(
    w: &Packed<'_>,
    x: &[f32],
    sums: &[f32],
    [token, block]: [usize; 2],
) -> [[[f32; LANES]; T]; N] {
    let bytes = 32 * (LOW + HIGH) as usize;
    let (chunks, groups) = (w.form.chunks(), w.form.groups());
    let codes: [Block<'_>; N] = std::array::from_fn(|n| w.block(block + n));
    let values = x.as_chunks::<CHUNK>().0;
    let values: [&[[f32; CHUNK]]; T] = by_token(values, token, chunks);
    let mut y = [[_mm256_setzero_ps(); T]; N];
    for group in 0..groups {
        let mut sum = [[_mm256_setzero_ps(); T]; N];
        for chunk in w.form.chunks_of(group) {
            let mut inputs = [&values[0][chunk]; T];
            for t in 1..T {
                inputs[t] = &values[t][chunk];
            }
            let mut these = [codes[0].chunk(chunk * codes[0].step, bytes); N];
            for n in 1..N {
                these[n] = codes[n].chunk(chunk * codes[n].step, bytes);
            }
            each_vector!(add_columns::<LOW, HIGH, T, N>(&these, &inputs, &mut sum));
        }
        for n in 0..N {
            let (scale, zero) = params(w, codes[n].param(group));
            for t in 0..T {
                let total = _mm256_set1_ps(sums[(token + t) * groups + group]);
                y[n][t] = _mm256_fmadd_ps(_mm256_fnmadd_ps(zero, total, sum[n][t]), scale, y[n][t]);
            }
        }
    }
    all_lanes(y)
}

/// Adds the four columns of vector `J`.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn add_columns<const LOW: u32, const HIGH: u32, const T: usize, const N: usize, const J: usize>(
    codes: &[&[u8]; N],
    x: &[&[f32; CHUNK]; T],
    sum: &mut [[__m256; T]; N],
) {
    let mut vectors = [_mm256_setzero_si256(); N];
    for (v, codes) in vectors.iter_mut().zip(codes) {
        let (low, high) = codes.split_at(32 * LOW as usize);
        *v = vector::<LOW, J>(low);
        if HIGH > 0 {
            *v = _mm256_or_si256(*v, _mm256_slli_epi16::<4>(vector::<HIGH, J>(high)));
        }
    }
    for i in 0..4 {
        for n in 0..N {
            let code = _mm256_cvtepi32_ps(_mm256_and_si256(vectors[n], _mm256_set1_epi32(0xff)));
            vectors[n] = _mm256_srli_epi32::<8>(vectors[n]);
            for t in 0..T {
                sum[n][t] = _mm256_fmadd_ps(code, _mm256_set1_ps(x[t][4 * J + i]), sum[n][t]);
            }
        }
    }
}

/// Vector `J` of a chunk, a code of `B` bits in each byte.
#[inline]
#[target_feature(enable = "avx2")]
fn vector<const B: u32, const J: usize>(bytes: &[u8]) -> __m256i {
    match B {
        4 => low_bits::<4>(bytes, J % 4, J / 4 * 4),
        2 => low_bits::<2>(bytes, J % 2, J / 2 * 2),
        3 => {
            let top = _mm256_slli_epi16::<2>(low_bits::<1>(bytes, 2, J));
            _mm256_or_si256(low_bits::<2>(bytes, J % 2, J / 2 * 2), top)
        }
        _ => low_bits::<1>(bytes, 0, J),
    }
}

/// `B` bits of every byte of the `i`th vector, from bit `from` on.
#[inline]
#[target_feature(enable = "avx2")]
fn low_bits<const B: u32>(bytes: &[u8], i: usize, from: usize) -> __m256i {
    let v = load(bytes, i);
    let v = match from {
        0 => v,
        1 => _mm256_srli_epi16::<1>(v),
        2 => _mm256_srli_epi16::<2>(v),
        3 => _mm256_srli_epi16::<3>(v),
        4 => _mm256_srli_epi16::<4>(v),
        5 => _mm256_srli_epi16::<5>(v),
        6 => _mm256_srli_epi16::<6>(v),
        _ => _mm256_srli_epi16::<7>(v),
    };
    _mm256_and_si256(v, _mm256_set1_epi8(((1u32 << B) - 1) as i8))
}

/// The `i`th 32 bytes.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn load(bytes: &[u8], i: usize) -> __m256i {
    let bytes = &bytes[32 * i..][..32];
    // SAFETY: 32 bytes are there, and the load needs no alignment.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

/// Scales and zero points of eight rows.
#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(super) fn params(w: &Packed<'_>, at: usize) -> (__m256, __m256) {
    let halves = |s: &[u16]| {
        let s = &s[at..][..LANES];
        // SAFETY: 16 bytes are there, and the load needs no alignment.
        unsafe { _mm_loadu_si128(s.as_ptr().cast()) }
    };
    let scale = match w.scales {
        // SAFETY: 32 bytes are there, and the load needs no alignment.
        Scales::F32(s) => unsafe { _mm256_loadu_ps(s[at..][..LANES].as_ptr()) },
        Scales::F16(s) => _mm256_cvtph_ps(halves(s)),
        Scales::Bf16(s) => _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves(s)))),
    };
    let zero = if w.zeros.is_empty() {
        _mm256_set1_ps((1u32 << (w.form.bits - 1)) as f32)
    } else {
        let z = &w.zeros[at..][..LANES];
        // SAFETY: 8 bytes are there, and the load needs no alignment.
        _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(unsafe { _mm_loadl_epi64(z.as_ptr().cast()) }))
    };
    (scale, zero)
}

#[inline]
#[target_feature(enable = "avx2")]
fn all_lanes<const T: usize, const N: usize>(y: [[__m256; T]; N]) -> [[[f32; LANES]; T]; N] {
    let mut out = [[[0.0; LANES]; T]; N];
    for (out, y) in out.as_flattened_mut().iter_mut().zip(y.as_flattened()) {
        // SAFETY: 32 bytes are there, and the store needs no alignment.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr(), *y) };
    }
    out
}
