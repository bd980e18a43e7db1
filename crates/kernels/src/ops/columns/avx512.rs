//! A column of sixteen rows in a register.

use super::{ByColumn, Column, Columns, ROWS, SHIFT};
use std::arch::x86_64::*;
use std::ops::Range;

/// [`super::round`].
#[target_feature(enable = "avx512f")]
pub(super) fn round(by: &ByColumn<'_>, which: Range<usize>, columns: &mut Columns<'_>) {
    let count = columns.weights.len();
    let (scales, zeros) = (load(&by.scales), load(&by.zeros));
    let (least, most) = (_mm512_sub_ps(_mm512_setzero_ps(), zeros), _mm512_sub_ps(_mm512_set1_ps(by.most), zeros));
    let shift = _mm512_set1_ps(SHIFT);
    for k in which {
        let level = _mm512_div_ps(load(&columns.targets[k]), scales);
        // The second of two that are equal, or of which one is NaN.
        let level = _mm512_min_ps(most, _mm512_max_ps(least, level));
        let level = _mm512_sub_ps(_mm512_add_ps(level, shift), shift);
        let level = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_ORD_Q>(level, level), level);
        let codes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_add_ps(level, zeros)));
        // SAFETY: sixteen bytes are there, and the store needs no alignment.
        unsafe { _mm_storeu_si128(columns.codes[k].as_mut_ptr().cast(), codes) };
        let errors = _mm512_sub_ps(_mm512_mul_ps(level, scales), load(&columns.weights[k]));
        store(&mut columns.errors[k], errors);
        let feedback = &by.feedback[k * by.stride + k + 1..k * by.stride + count];
        for (target, &feedback) in columns.targets[k + 1..].iter_mut().zip(feedback) {
            let off = _mm512_mul_ps(errors, _mm512_set1_ps(feedback));
            store(target, _mm512_sub_ps(load(target), off));
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(column: &Column<f32>) -> __m512 {
    const { assert!(ROWS == 16, "a register") };
    // SAFETY: 64 bytes are there, and the load needs no alignment.
    unsafe { _mm512_loadu_ps(column.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(column: &mut Column<f32>, values: __m512) {
    // SAFETY: 64 bytes are there, and the store needs no alignment.
    unsafe { _mm512_storeu_ps(column.as_mut_ptr(), values) };
}
