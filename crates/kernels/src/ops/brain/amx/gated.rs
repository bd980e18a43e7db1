//! Strips of a gated MLP by tiles: sixteen columns of both branches are made side by side, and meet in the first cache.

use super::super::avx512::{first_lanes, load as sixteen};
use super::super::{Brained, LANES};
use super::steps::{step, store, zero};
use super::{Pairs, SIDE, Sums, panel, panels};
use crate::level::Amx;
use crate::ops::softmax::{INVERSE, LEAST, MOST, STEPS};
use crate::ops::weights::power;
use std::arch::x86_64::*;
use std::ops::Range;

/// Some `columns`, from the first of a panel on, of `silu(x·gateᵀ) · (x·upᵀ)` in `out: [rows, columns]`, with the bits of products by
/// themselves.
///
/// # Panics
/// When shapes do not fit, or `x` is not turned: a caller's bug.
pub(in crate::ops) fn gate_tiles(
    amx: Amx,
    x: Brained<'_>,
    [gate, up]: [Brained<'_>; 2],
    columns: Range<usize>,
    out: &mut [f32],
) {
    assert!(x.turned && !gate.turned && !up.turned && [gate.depth, up.depth] == [x.depth; 2], "sides of products");
    assert!(columns.start.is_multiple_of(LANES) && columns.end <= gate.rows.min(up.rows), "columns of both");
    assert!(x.depth > 0 && out.len() == x.rows * columns.len(), "entries of every row");
    let tiles = Pairs::configure(amx);
    // SAFETY: the token proves AVX-512.
    unsafe { strip(&tiles, x, [gate, up], columns, out) }
}

/// Parts of a block's work: its products, and the gates of the one before, take turns.
const PARTS: usize = 8;

#[target_feature(enable = "avx512f")]
fn strip(tiles: &Pairs, x: Brained<'_>, [gate, up]: [Brained<'_>; 2], columns: Range<usize>, out: &mut [f32]) {
    let mut sums = [Sums([[0.0; SIDE]; SIDE]); 2];
    let [mut own, mut next] = sums.each_mut();
    let width = columns.len();
    let mut before = None;
    for at in columns.clone().step_by(LANES) {
        let [b, d] = [panel(&gate, at / LANES), panel(&up, at / LANES)];
        for row in (0..x.rows).step_by(SIDE) {
            let [a, c] = panels(&x, row / LANES);
            let deep = a.len();
            assert!(c.len() == deep && b.len() == deep && d.len() == deep, "panels of one depth");
            zero(tiles);
            for part in 0..PARTS {
                for i in deep * part / PARTS..deep * (part + 1) / PARTS {
                    step(tiles, [[&a[i], &c[i]], [&b[i], &d[i]]]);
                }
                if let Some(before) = before {
                    meet(own, part, before, (width, &mut *out));
                }
            }
            store(tiles, next);
            std::mem::swap(&mut own, &mut next);
            before = Some((row, at - columns.start));
        }
    }
    if let Some(before) = before {
        (0..PARTS).for_each(|part| meet(own, part, before, (width, &mut *out)));
    }
}

/// A part of the rows of a block that begins there in `out`, of rows of `width`.
#[inline]
#[target_feature(enable = "avx512f")]
fn meet(sums: &Sums, part: usize, (row, column): (usize, usize), (width, out): (usize, &mut [f32])) {
    const EACH: usize = SIDE / PARTS;
    let from = ((row + part * EACH) * width).min(out.len());
    for (out, sums) in out[from..].chunks_exact_mut(width).zip(&sums.0.as_chunks::<EACH>().0[part]) {
        let (gates, ups) = sums.split_at(LANES);
        let out = &mut out[column..];
        let gated = silu_mul(sixteen(gates), sixteen(ups));
        // SAFETY: the mask leaves out what lies beyond the row, and the store needs no alignment.
        unsafe { _mm512_mask_storeu_ps(out.as_mut_ptr(), first_lanes(out.len()), gated) };
    }
}

/// `silu(gate) · up`, to the bits of [`crate::silu_mul`].
#[inline]
#[target_feature(enable = "avx512f")]
fn silu_mul(gate: __m512, up: __m512) -> __m512 {
    let [one, least, most] = [1.0, LEAST, MOST].map(|v| _mm512_set1_ps(v));
    let exponent = _mm512_max_ps(least, _mm512_mul_ps(gate, _mm512_set1_ps(-std::f32::consts::LOG2_E)));
    let x = _mm512_add_ps(one, power(_mm512_min_ps(most, exponent)));
    let guess = _mm512_sub_epi32(_mm512_set1_epi32(INVERSE as i32), _mm512_castps_si512(x));
    let mut inverse = _mm512_castsi512_ps(guess);
    for _ in 0..STEPS {
        inverse = _mm512_fmadd_ps(inverse, _mm512_fnmadd_ps(x, inverse, one), inverse);
    }
    _mm512_mul_ps(_mm512_mul_ps(gate, up), inverse)
}
