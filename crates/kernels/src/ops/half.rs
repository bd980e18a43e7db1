//! Products with a dense matrix of 16-bit floats: y = x·Wᵀ, read as it is stored.

#[cfg(target_arch = "aarch64")]
mod neon;

use super::strips::{Strip, Strips};
use crate::Level;
use bitmill_scheme::folded;
use half::{bf16, f16};

/// Columns that are added up side by side.
const LANES: usize = 16;
/// Rows of a strip.
const STRIP: usize = 64;

/// A row-major matrix `[rows, cols]` of 16-bit floats.
#[derive(Debug, Clone, Copy)]
pub enum Halves<'a> {
    /// Bits of IEEE half precision.
    F16(&'a [u16]),
    /// Bits of bfloat16.
    Bf16(&'a [u16]),
}

impl<'a> Halves<'a> {
    fn bits(&self) -> &'a [u16] {
        match self {
            Halves::F16(bits) | Halves::Bf16(bits) => bits,
        }
    }
}

/// `out[token, row] = Σ x·W` for `x: [tokens, cols]`, with 16 sums of a row, one for every column modulo that many,
/// that are halved until one is left.
///
/// # Panics
/// When a length does not fit: a caller's bug.
pub fn half_product(level: Level, w: Halves<'_>, cols: usize, x: &[f32], out: &mut [f32]) {
    assert!(cols > 0 && x.len().is_multiple_of(cols) && w.bits().len().is_multiple_of(cols), "matrix shapes");
    let (rows, tokens) = (w.bits().len() / cols, x.len() / cols);
    assert_eq!(out.len(), rows * tokens, "matrix shapes");
    let strips = [Strips::new(out, rows, STRIP)];
    Strips::fill(&strips, rows * cols * tokens, |_, strip| match level {
        Level::Scalar => match w {
            Halves::F16(bits) => scalar(bits, |b| f16::from_bits(b).to_f32(), cols, x, strip),
            Halves::Bf16(bits) => scalar(bits, |b| bf16::from_bits(b).to_f32(), cols, x, strip),
        },
        #[cfg(target_arch = "x86_64")]
        Level::Avx2(token) => match w {
            Halves::F16(bits) => avx2::strip::<false>(token, bits, cols, x, strip),
            Halves::Bf16(bits) => avx2::strip::<true>(token, bits, cols, x, strip),
        },
        #[cfg(target_arch = "x86_64")]
        Level::Avx512(token) => match w {
            Halves::F16(bits) => avx512::strip::<false>(token, bits, cols, x, strip),
            Halves::Bf16(bits) => avx512::strip::<true>(token, bits, cols, x, strip),
        },
        #[cfg(target_arch = "aarch64")]
        Level::Neon(token) => match w {
            Halves::F16(bits) => neon::strip::<false>(token, bits, cols, x, strip),
            Halves::Bf16(bits) => neon::strip::<true>(token, bits, cols, x, strip),
        },
        #[cfg(target_arch = "x86_64")]
        Level::Amx(token) => match w {
            Halves::F16(bits) => avx512::strip::<false>(token.avx512(), bits, cols, x, strip),
            Halves::Bf16(bits) => avx512::strip::<true>(token.avx512(), bits, cols, x, strip),
        },
    });
}

fn scalar(w: &[u16], value: impl Fn(u16) -> f32, cols: usize, x: &[f32], strip: &mut Strip<'_>) {
    for (token, x) in x.chunks_exact(cols).enumerate() {
        for row in strip.rows.clone() {
            let mut sums = [0.0f32; LANES];
            for (i, (&w, x)) in w[row * cols..][..cols].iter().zip(x).enumerate() {
                sums[i % LANES] = value(w).mul_add(*x, sums[i % LANES]);
            }
            strip.put(token, row, &[folded(sums)]);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use super::{LANES, Strip};
    use crate::level::Avx2;
    use bitmill_scheme::folded;
    use half::{bf16, f16};
    use std::arch::x86_64::*;

    /// Rows that share a load of the input.
    const ROWS: usize = 4;

    /// [`super::scalar`]; `BF` tells bfloat16 from half precision.
    pub(super) fn strip<const BF: bool>(_: Avx2, w: &[u16], cols: usize, x: &[f32], strip: &mut Strip<'_>) {
        // SAFETY: the token proves AVX2, FMA and F16C.
        unsafe { compiled::<BF>(w, cols, x, strip) }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    fn compiled<const BF: bool>(w: &[u16], cols: usize, x: &[f32], strip: &mut Strip<'_>) {
        for (token, x) in x.chunks_exact(cols).enumerate() {
            let mut row = strip.rows.start;
            while row < strip.rows.end {
                if strip.rows.end - row >= ROWS {
                    strip.put(token, row, &rows::<BF, ROWS>(&w[row * cols..][..ROWS * cols], x));
                    row += ROWS;
                } else {
                    strip.put(token, row, &rows::<BF, 1>(&w[row * cols..][..cols], x));
                    row += 1;
                }
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn rows<const BF: bool, const N: usize>(w: &[u16], x: &[f32]) -> [f32; N] {
        let cols = x.len();
        let mut sums = [[_mm256_setzero_ps(); 2]; N];
        let whole = cols - cols % LANES;
        for at in (0..whole).step_by(LANES) {
            for half in 0..2 {
                let x = &x[at + 8 * half..][..8];
                // SAFETY: 32 bytes are there, and the load needs no alignment.
                let x = unsafe { _mm256_loadu_ps(x.as_ptr()) };
                for n in 0..N {
                    let w = widen::<BF>(&w[n * cols + at + 8 * half..][..8]);
                    sums[n][half] = _mm256_fmadd_ps(w, x, sums[n][half]);
                }
            }
        }
        let mut out = [0.0; N];
        for n in 0..N {
            let mut lanes = [0.0f32; LANES];
            for half in 0..2 {
                // SAFETY: 32 bytes are there, and the store needs no alignment.
                unsafe { _mm256_storeu_ps(lanes[8 * half..].as_mut_ptr(), sums[n][half]) };
            }
            for i in whole..cols {
                let bits = w[n * cols + i];
                let w = if BF { bf16::from_bits(bits).to_f32() } else { f16::from_bits(bits).to_f32() };
                lanes[i - whole] = w.mul_add(x[i], lanes[i - whole]);
            }
            out[n] = folded(lanes);
        }
        out
    }

    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    fn widen<const BF: bool>(w: &[u16]) -> __m256 {
        // SAFETY: every caller passes eight numbers, and the load needs no alignment.
        let bits = unsafe { _mm_loadu_si128(w[..8].as_ptr().cast()) };
        if BF {
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bits)))
        } else {
            _mm256_cvtph_ps(bits)
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::{LANES, Strip};
    use crate::level::Avx512;
    use bitmill_scheme::folded;
    use std::arch::x86_64::*;

    /// Rows that share a load of the input: as many multiply-adds under way as two units with a latency of four take.
    const ROWS: usize = 8;
    /// Numbers of a line of the cache.
    const LINE: usize = 32;

    /// [`super::scalar`]; `BF` tells bfloat16 from half precision.
    pub(super) fn strip<const BF: bool>(_: Avx512, w: &[u16], cols: usize, x: &[f32], strip: &mut Strip<'_>) {
        // SAFETY: the token proves AVX-512.
        unsafe { compiled::<BF>(w, cols, x, strip) }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    fn compiled<const BF: bool>(w: &[u16], cols: usize, x: &[f32], strip: &mut Strip<'_>) {
        for (token, x) in x.chunks_exact(cols).enumerate() {
            let mut row = strip.rows.start;
            while row < strip.rows.end {
                if strip.rows.end - row >= ROWS {
                    let sums = rows::<BF, ROWS>(&w[row * cols..][..ROWS * cols], x);
                    strip.put(token, row, &all_folded(sums));
                    row += ROWS;
                } else {
                    let [sums] = rows::<BF, 1>(&w[row * cols..][..cols], x);
                    let mut lanes = [0.0f32; LANES];
                    // SAFETY: 64 bytes are there, and the store needs no alignment.
                    unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), sums) };
                    strip.put(token, row, &[folded(lanes)]);
                    row += 1;
                }
            }
        }
    }

    /// The sums of rows, a register each.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    fn rows<const BF: bool, const N: usize>(w: &[u16], x: &[f32]) -> [__m512; N] {
        let cols = x.len();
        let mut sums = [_mm512_setzero_ps(); N];
        let whole = cols / LINE * LINE;
        for at in (0..whole).step_by(LINE) {
            let here: &[f32] = &x[at..][..LINE];
            // SAFETY: 64 bytes are there, and as many after them, and loads need no alignment.
            let x = unsafe { [_mm512_loadu_ps(here.as_ptr()), _mm512_loadu_ps(here[LANES..].as_ptr())] };
            // The rows after these, which a CPU that sees short rows does not expect, from one end to the other, as memory is
            // fastest; beyond the matrix nothing is fetched.
            for n in 0..N {
                _mm_prefetch::<_MM_HINT_T0>(w.as_ptr().wrapping_add(N * (cols + at) + n * LINE).cast());
            }
            for n in 0..N {
                let [a, b] = widened::<BF>(&w[n * cols + at..][..LINE]);
                sums[n] = _mm512_fmadd_ps(b, x[1], _mm512_fmadd_ps(a, x[0], sums[n]));
            }
        }
        for at in (whole..cols).step_by(LANES) {
            let here = (cols - at).min(LANES);
            let mask = (0xffffu32 >> (LANES - here)) as u16;
            // SAFETY: the mask leaves out what lies beyond the slice, and the load needs no alignment.
            let x = unsafe { _mm512_maskz_loadu_ps(mask, x[at..].as_ptr()) };
            for n in 0..N {
                let w = &w[n * cols + at..][..here];
                // SAFETY: as above.
                let bits = unsafe { _mm256_maskz_loadu_epi16(mask, w.as_ptr().cast()) };
                let w = if BF {
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
                } else {
                    _mm512_cvtph_ps(bits)
                };
                sums[n] = _mm512_fmadd_ps(w, x, sums[n]);
            }
        }
        sums
    }

    /// The numbers of a line, the first sixteen and the last.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn widened<const BF: bool>(w: &[u16]) -> [__m512; 2] {
        // SAFETY: every caller passes a whole line, and the load needs no alignment.
        let bits = unsafe { _mm512_loadu_si512(w[..LINE].as_ptr().cast()) };
        if !BF {
            let upper = _mm512_extracti64x4_epi64::<1>(bits);
            return [_mm512_cvtph_ps(_mm512_castsi512_si256(bits)), _mm512_cvtph_ps(upper)];
        }
        // Each of the first is put beside one of the last: it is shifted to where that is, which needs but be alone.
        let beside = _mm512_permutexvar_epi16(lines_beside(), bits);
        let upper = _mm512_and_si512(beside, _mm512_set1_epi32(-0x1_0000));
        [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(beside)), _mm512_castsi512_ps(upper)]
    }

    /// 0, 16, 1, 17 and so on.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn lines_beside() -> __m512i {
        let first = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        _mm512_or_si512(first, _mm512_slli_epi32::<16>(_mm512_add_epi32(first, _mm512_set1_epi32(16))))
    }

    /// What [`folded`] makes of the lanes of each of eight rows.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl")]
    fn all_folded(rows: [__m512; ROWS]) -> [f32; ROWS] {
        let halves = |a: __m512, b: __m512| {
            _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xee>(a, b))
        };
        let quarters = |a: __m512, b: __m512| {
            _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b))
        };
        let [a, b, c, d, e, f, g, h] = rows;
        // Four numbers of each of four rows.
        let (first, last) = (quarters(halves(a, b), halves(c, d)), quarters(halves(e, f), halves(g, h)));
        let two = _mm512_add_ps(_mm512_shuffle_ps::<0x44>(first, last), _mm512_shuffle_ps::<0xee>(first, last));
        let one = _mm512_add_ps(_mm512_shuffle_ps::<0x88>(two, two), _mm512_shuffle_ps::<0xdd>(two, two));
        let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 0, 0, 0, 0, 0, 0, 0);
        let mut out = [0.0f32; ROWS];
        let sums = _mm512_castps512_ps256(_mm512_permutexvar_ps(order, one));
        // SAFETY: 32 bytes are there, and the store needs no alignment.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr(), sums) };
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_level_equals_the_definition_and_the_plain_sum() {
        let number = |i: usize| ((i * 7919 + 13) % 1009) as f32 / 505.0 - 1.0;
        for (rows, cols, tokens) in [(1, 1, 1), (5, 15, 2), (70, 16, 3), (67, 100, 1)] {
            let x: Vec<f32> = (0..tokens * cols).map(number).collect();
            let w: Vec<f32> = (0..rows * cols).map(|i| bf16::from_f32(number(3 * i + 1)).to_f32()).collect();
            let f16s: Vec<u16> = w.iter().map(|&v| f16::from_f32(v).to_bits()).collect();
            let bf16s: Vec<u16> = w.iter().map(|&v| bf16::from_f32(v).to_bits()).collect();
            for w in [Halves::F16(&f16s), Halves::Bf16(&bf16s)] {
                let run = |level| {
                    let mut out = vec![0.0; tokens * rows];
                    half_product(level, w, cols, &x, &mut out);
                    out
                };
                let out = run(Level::Scalar);
                assert!(Level::all().into_iter().all(|level| run(level) == out));
            }
            let mut out = vec![0.0; tokens * rows];
            half_product(Level::best(), Halves::Bf16(&bf16s), cols, &x, &mut out);
            for (i, found) in out.iter().enumerate() {
                let (x, w) = (&x[i / rows * cols..][..cols], &w[i % rows * cols..][..cols]);
                let sum: f64 = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                assert!((f64::from(*found) - sum).abs() < 1e-5 * cols as f64, "{found} {sum}");
            }
        }
    }
}
