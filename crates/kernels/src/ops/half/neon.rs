//! Products with 16-bit floats by NEON: four registers hold the sixteen sums of a row.

use super::{LANES, Strip};
use crate::level::Neon;
use bitmill_scheme::folded;
use half::{bf16, f16};
use std::arch::aarch64::*;

/// Rows that share a load of the input.
const ROWS: usize = 4;

/// [`super::scalar`]; `BF` tells bfloat16 from half precision.
pub(super) fn strip<const BF: bool>(_: Neon, w: &[u16], cols: usize, x: &[f32], strip: &mut Strip<'_>) {
    for (token, x) in x.chunks_exact(cols).enumerate() {
        let mut row = strip.rows.start;
        while row < strip.rows.end {
            let w = &w[row * cols..];
            // SAFETY: every CPU of the target has NEON.
            unsafe {
                if strip.rows.end - row >= ROWS {
                    strip.put(token, row, &rows::<BF, ROWS>(&w[..ROWS * cols], x));
                    row += ROWS;
                } else {
                    strip.put(token, row, &rows::<BF, 1>(&w[..cols], x));
                    row += 1;
                }
            }
        }
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn rows<const BF: bool, const N: usize>(w: &[u16], x: &[f32]) -> [f32; N] {
    let cols = x.len();
    let mut sums = [[vdupq_n_f32(0.0); 4]; N];
    let (inputs, rest) = x.as_chunks::<LANES>();
    for (at, x) in inputs.iter().enumerate() {
        let x = load(x);
        for n in 0..N {
            let w: &[u16] = &w[n * cols + at * LANES..][..LANES];
            let w = widen::<BF>(w);
            for i in 0..4 {
                sums[n][i] = vfmaq_f32(sums[n][i], w[i], x[i]);
            }
        }
    }
    let mut out = [0.0; N];
    for n in 0..N {
        let mut lanes = [0.0f32; LANES];
        for (lanes, sums) in lanes.as_chunks_mut::<4>().0.iter_mut().zip(sums[n]) {
            // SAFETY: four numbers are there.
            unsafe { vst1q_f32(lanes.as_mut_ptr(), sums) };
        }
        let last = &w[n * cols + cols - rest.len()..][..rest.len()];
        for ((lane, &bits), x) in lanes.iter_mut().zip(last).zip(rest) {
            let w = if BF { bf16::from_bits(bits).to_f32() } else { f16::from_bits(bits).to_f32() };
            *lane = w.mul_add(*x, *lane);
        }
        out[n] = folded(lanes);
    }
    out
}

#[inline]
#[target_feature(enable = "neon")]
fn load(x: &[f32; LANES]) -> [float32x4_t; 4] {
    let mut four = [vdupq_n_f32(0.0); 4];
    for (four, x) in four.iter_mut().zip(x.as_chunks::<4>().0) {
        // SAFETY: four numbers are there.
        *four = unsafe { vld1q_f32(x.as_ptr()) };
    }
    four
}

#[inline]
#[target_feature(enable = "neon")]
fn widen<const BF: bool>(w: &[u16]) -> [float32x4_t; 4] {
    let w = &w[..LANES];
    // SAFETY: eight numbers are there, and eight after them.
    let [a, b] = unsafe { [vld1q_u16(w.as_ptr()), vld1q_u16(w[8..].as_ptr())] };
    if BF {
        let low = [a, b].map(|bits| vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_low_u16(bits))));
        let high = [a, b].map(|bits| vreinterpretq_f32_u32(vshll_high_n_u16::<16>(bits)));
        [low[0], high[0], low[1], high[1]]
    } else {
        let (a, b) = (vreinterpretq_f16_u16(a), vreinterpretq_f16_u16(b));
        [vcvt_f32_f16(vget_low_f16(a)), vcvt_high_f32_f16(a), vcvt_f32_f16(vget_low_f16(b)), vcvt_high_f32_f16(b)]
    }
}
