//! Rows weighed and rounded for tiles: sixteen rows of a panel lie side by side, thirty-two columns of each in a line.

use super::super::brain::TurnedRows;
use super::super::brain::avx512::{as_bits, load};
use super::super::softmax::{LANES, LEAST, SERIES, TO_INTEGER};
use super::{WeightSums, weigh};
use std::arch::x86_64::*;
use std::ops::Range;

/// A left side, and the row of it that is meant.
type To<'a, 'b> = (&'a mut TurnedRows<'b>, usize);

/// [`super::weigh`] of every row of some scores, into a left side.
pub(super) fn weigh_rows(
    scores: (&mut [f32], usize, usize),
    seen: &impl Fn(usize) -> Range<usize>,
    by: (f32, &[f32]),
    left: &mut TurnedRows<'_>,
    sums: &mut [WeightSums],
) {
    // SAFETY: there are rows of left sides in this layout, which proves AVX-512 with BF16.
    unsafe { rows_of(scores, seen, by, left, sums) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn rows_of(
    (scores, keys, stride): (&mut [f32], usize, usize),
    seen: &impl Fn(usize) -> Range<usize>,
    (scale, shifts): (f32, &[f32]),
    left: &mut TurnedRows<'_>,
    sums: &mut [WeightSums],
) {
    for (i, (row, sums)) in scores.chunks_mut(stride).zip(sums).enumerate() {
        let (row, seen) = (&mut row[..keys], seen(i));
        // A row of which the first are seen, and as many more fill a vector.
        if seen.start == 0 && seen.end.next_multiple_of(LANES) <= keys {
            weighed(row, seen.end, (scale, shifts[i]), &mut sums.0, (left, i));
        } else {
            weigh(row, seen, (scale, shifts[i]), &mut sums.0);
            rounded(row, (left, i));
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn weighed(row: &mut [f32], seen: usize, (scale, shift): (f32, f32), sums: &mut [f32; LANES], (left, at): To<'_, '_>) {
    let whole = seen.next_multiple_of(LANES);
    row[seen..whole].fill(f32::NEG_INFINITY);
    let (scale, shift) = (_mm512_set1_ps(scale), _mm512_set1_ps(-shift));
    let (mut sum, least) = (load(sums), _mm512_set1_ps(LEAST));
    let tiles = left.tiles();
    for (tile, two) in row[..whole].chunks(2 * LANES).enumerate() {
        let mut powers = [_mm512_setzero_ps(); 2];
        for (j, v) in two.as_chunks::<LANES>().0.iter().enumerate() {
            // NaN stays what it is.
            powers[j] = power(_mm512_max_ps(least, _mm512_fmadd_ps(scale, load(v), shift)));
            sum = _mm512_add_ps(sum, powers[j]);
            powers[j] = before(powers[j], tile * 2 * LANES + j * LANES, seen);
        }
        put(left, (at, tile), powers);
    }
    // What lies beyond is not seen.
    for tile in whole.div_ceil(2 * LANES)..tiles {
        put(left, (at, tile), [_mm512_setzero_ps(); 2]);
    }
    // SAFETY: 64 bytes are there, and the store needs no alignment.
    unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), sum) };
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn rounded(row: &[f32], (left, at): To<'_, '_>) {
    for (tile, part) in row.chunks(2 * LANES).enumerate() {
        let (low, high) = part.split_at(part.len().min(LANES));
        put(left, (at, tile), [load(low), load(high)]);
    }
}

/// [`super::super::softmax::power`].
#[inline]
#[target_feature(enable = "avx512f")]
pub(in crate::ops) fn power(x: __m512) -> __m512 {
    let to_integer = _mm512_set1_ps(TO_INTEGER);
    let shifted = _mm512_add_ps(x, to_integer);
    let r = _mm512_sub_ps(x, _mm512_sub_ps(shifted, to_integer));
    let mut series = _mm512_set1_ps(SERIES[0]);
    for factor in &SERIES[1..] {
        series = _mm512_fmadd_ps(series, r, _mm512_set1_ps(*factor));
    }
    let exponent = _mm512_slli_epi32::<23>(_mm512_castps_si512(shifted));
    _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(series), exponent))
}

/// Those of a vector that begins at `from` that are before `end`, and zeros.
#[inline]
#[target_feature(enable = "avx512f")]
fn before(v: __m512, from: usize, end: usize) -> __m512 {
    if from + LANES <= end {
        return v;
    }
    _mm512_maskz_mov_ps(((1u32 << end.saturating_sub(from)) - 1) as u16, v)
}

/// Columns of a row, as many as a line takes.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn put(left: &mut TurnedRows<'_>, (at, tile): (usize, usize), [low, high]: [__m512; 2]) {
    let line = left.line(at, tile);
    // SAFETY: a line is 64 bytes, and the store needs no alignment.
    unsafe { _mm512_storeu_si512(line.as_mut_ptr().cast(), as_bits(_mm512_cvtne2ps_pbh(high, low))) };
}
