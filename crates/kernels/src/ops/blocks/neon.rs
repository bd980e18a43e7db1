//! Rows of numbers turned by NEON: what lay in rows lies in lanes. [`bitmill_scheme::turn`] is the definition.

use crate::level::Neon;
use bitmill_scheme::{LANES, Turned};
use std::arch::aarch64::*;

/// Turns [`LANES`] rows of `sub` numbers, a multiple of 4.
#[inline(always)]
pub(super) fn turn(_: Neon, sub: usize, rows: &[f32], to: &mut Turned) {
    assert!(sub.is_multiple_of(4) && sub <= to.len() && rows.len() == LANES * sub, "whole tiles");
    for column in (0..sub).step_by(4) {
        for lane in (0..LANES).step_by(4) {
            // SAFETY: every CPU of the target has NEON, and the last row's four numbers from `column` on end within `rows`.
            unsafe { square(rows.as_ptr().add(lane * sub + column), sub, &mut to[column..column + 4], lane) }
        }
    }
}

/// Turns four rows, `stride` numbers apart, of four numbers, into lanes from `lane` on.
///
/// # Safety
/// The rows are readable from `from` on.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn square(from: *const f32, stride: usize, to: &mut [[f32; LANES]], lane: usize) {
    // SAFETY: as the caller vouches.
    let [a, b, c, d] = [0, 1, 2, 3].map(|i| unsafe { vld1q_f32(from.add(i * stride)) });
    let double = |x: float32x4_t| vreinterpretq_f64_f32(x);
    let single = |x: float64x2_t| vreinterpretq_f32_f64(x);
    // Columns 0 and 2, and columns 1 and 3, of two rows each.
    let [even, odd] = [vtrn1q_f32(a, b), vtrn2q_f32(a, b)].map(double);
    let [even_after, odd_after] = [vtrn1q_f32(c, d), vtrn2q_f32(c, d)].map(double);
    let columns = [
        vzip1q_f64(even, even_after),
        vzip1q_f64(odd, odd_after),
        vzip2q_f64(even, even_after),
        vzip2q_f64(odd, odd_after),
    ];
    for (to, column) in to.iter_mut().zip(columns) {
        let four: &mut [f32] = &mut to[lane..lane + 4];
        // SAFETY: a slice of four numbers.
        unsafe { vst1q_f32(four.as_mut_ptr(), single(column)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_as_the_definition_does() {
        for sub in [4, 16, 32] {
            let rows: Vec<f32> = (0..LANES * sub).map(|i| i as f32).collect();
            let (mut plain, mut other) = ([[0.0; LANES]; 32], [[0.0; LANES]; 32]);
            bitmill_scheme::turn(sub, &rows, &mut plain);
            turn(Neon { dot: None, matrices: None }, sub, &rows, &mut other);
            assert_eq!(plain, other);
        }
    }
}
