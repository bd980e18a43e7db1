//! Sixteen rows of sixteen or thirty-two numbers, turned: what lay in rows lies in lanes. [`bitmill_scheme::turn`] is the
//! definition.
#![cfg(target_arch = "x86_64")]

use crate::level::{Avx2, Avx512};
use bitmill_scheme::{LANES, Turned};
use std::arch::x86_64::*;

/// Turns [`LANES`] rows of `sub` numbers, a multiple of 16.
#[inline(always)]
pub(super) fn avx512(_: Avx512, sub: usize, rows: &[f32], to: &mut Turned) {
    assert!(sub.is_multiple_of(16) && sub <= to.len() && rows.len() == LANES * sub, "whole tiles");
    for column in (0..sub).step_by(16) {
        for lane in (0..LANES).step_by(16) {
            // SAFETY: the token proves AVX-512, and the last row's sixteen numbers from `column` on end within `rows`.
            unsafe { square512(rows.as_ptr().add(lane * sub + column), sub, &mut to[column..column + 16], lane) }
        }
    }
}

/// Turns sixteen rows, `stride` numbers apart, of sixteen numbers, into lanes from `lane` on.
///
/// # Safety
/// The rows are readable from `from` on.
#[target_feature(enable = "avx512f")]
unsafe fn square512(from: *const f32, stride: usize, to: &mut [[f32; LANES]], lane: usize) {
    // SAFETY: as the caller vouches.
    let row = |i: usize| unsafe { _mm512_loadu_ps(from.add(i * stride)) };
    let double = |x: __m512| _mm512_castps_pd(x);
    let single = |x: __m512d| _mm512_castpd_ps(x);
    let mut fours = [_mm512_setzero_ps(); 16];
    for four in 0..4 {
        // Within each quarter of a vector, four rows by four columns.
        let [a, b, c, d] = [0, 1, 2, 3].map(|i| row(4 * four + i));
        let (ab, cd) = (_mm512_unpacklo_ps(a, b), _mm512_unpacklo_ps(c, d));
        let (ab_high, cd_high) = (_mm512_unpackhi_ps(a, b), _mm512_unpackhi_ps(c, d));
        fours[four] = single(_mm512_unpacklo_pd(double(ab), double(cd)));
        fours[4 + four] = single(_mm512_unpackhi_pd(double(ab), double(cd)));
        fours[8 + four] = single(_mm512_unpacklo_pd(double(ab_high), double(cd_high)));
        fours[12 + four] = single(_mm512_unpackhi_pd(double(ab_high), double(cd_high)));
    }
    for (i, [a, b, c, d]) in fours.as_chunks::<4>().0.iter().copied().enumerate() {
        // Quarter q of a, b, c and d makes up column 4q + i.
        let (even, odd) = (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
        let (even_high, odd_high) = (_mm512_shuffle_f32x4::<0x88>(c, d), _mm512_shuffle_f32x4::<0xdd>(c, d));
        let columns = [
            _mm512_shuffle_f32x4::<0x88>(even, even_high),
            _mm512_shuffle_f32x4::<0x88>(odd, odd_high),
            _mm512_shuffle_f32x4::<0xdd>(even, even_high),
            _mm512_shuffle_f32x4::<0xdd>(odd, odd_high),
        ];
        for (quarter, column) in columns.into_iter().enumerate() {
            let sixteen: &mut [f32] = &mut to[4 * quarter + i][lane..lane + 16];
            // SAFETY: a slice of sixteen numbers.
            unsafe { _mm512_storeu_ps(sixteen.as_mut_ptr(), column) }
        }
    }
}

/// Turns [`LANES`] rows of `sub` numbers, a multiple of 8.
#[inline(always)]
pub(super) fn avx2(_: Avx2, sub: usize, rows: &[f32], to: &mut Turned) {
    assert!(sub.is_multiple_of(8) && sub <= to.len() && rows.len() == LANES * sub, "whole tiles");
    for column in (0..sub).step_by(8) {
        for lane in (0..LANES).step_by(8) {
            // SAFETY: the token proves AVX2, and the last row's eight numbers from `column` on end within `rows`.
            unsafe { square256(rows.as_ptr().add(lane * sub + column), sub, &mut to[column..column + 8], lane) }
        }
    }
}

/// Turns eight rows, `stride` numbers apart, of eight numbers, into lanes from `lane` on.
///
/// # Safety
/// The rows are readable from `from` on.
#[target_feature(enable = "avx2")]
unsafe fn square256(from: *const f32, stride: usize, to: &mut [[f32; LANES]], lane: usize) {
    // SAFETY: as the caller vouches.
    let row = |i: usize| unsafe { _mm256_loadu_ps(from.add(i * stride)) };
    let mut fours = [[_mm256_setzero_ps(); 4]; 2];
    for (four, columns) in fours.iter_mut().enumerate() {
        let [a, b, c, d] = [0, 1, 2, 3].map(|i| row(4 * four + i));
        let (ab, cd) = (_mm256_unpacklo_ps(a, b), _mm256_unpacklo_ps(c, d));
        let (ab_high, cd_high) = (_mm256_unpackhi_ps(a, b), _mm256_unpackhi_ps(c, d));
        *columns = [
            _mm256_shuffle_ps::<0x44>(ab, cd),
            _mm256_shuffle_ps::<0xee>(ab, cd),
            _mm256_shuffle_ps::<0x44>(ab_high, cd_high),
            _mm256_shuffle_ps::<0xee>(ab_high, cd_high),
        ];
    }
    let [first, second] = fours;
    for (i, (a, b)) in first.into_iter().zip(second).enumerate() {
        let columns = [(i, _mm256_permute2f128_ps::<0x20>(a, b)), (4 + i, _mm256_permute2f128_ps::<0x31>(a, b))];
        for (column, numbers) in columns {
            let eight: &mut [f32] = &mut to[column][lane..lane + 8];
            // SAFETY: a slice of eight numbers.
            unsafe { _mm256_storeu_ps(eight.as_mut_ptr(), numbers) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_level_turns_alike() {
        for sub in [16, 32] {
            let rows: Vec<f32> = (0..LANES * sub).map(|i| i as f32).collect();
            let (mut plain, mut other) = ([[0.0; LANES]; 32], [[0.0; LANES]; 32]);
            bitmill_scheme::turn(sub, &rows, &mut plain);
            if let Some(token) = Avx2::here() {
                avx2(token, sub, &rows, &mut other);
                assert_eq!(plain, other);
            }
            if let Some(token) = Avx512::here() {
                other = [[0.0; LANES]; 32];
                avx512(token, sub, &rows, &mut other);
                assert_eq!(plain, other);
            }
        }
    }
}
