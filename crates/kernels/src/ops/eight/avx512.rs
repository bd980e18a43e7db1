//! Panels rounded and multiplied by AVX-512 with VNNI.
//!
//! A tile of C is eight rows by three panels, 24 registers of integers: eleven loads feed 24 products of four columns, which
//! take twelve cycles of the two units that multiply. A group of 128 columns is 384 cycles of that, and another 36 to turn its
//! sums to f32, so nine tenths of the peak are what to expect. The f32 sums of a tile stay in the first cache, the panels of B
//! in the second, as in bfloat16.

use super::super::brain::avx512::{AHEAD, ROWS, asked, fetch_columns, fetch_tile, finish, load, panels_at, turn};
use super::super::brain::{LANES, Old, TOGETHER};
use super::super::matrix::{Output, View};
use super::{Eights, GROUP, Out, TURN, groups, row_words};
use crate::level::Eight;
use std::arch::x86_64::*;
use std::ops::Range;

/// Panels of a tile, at most.
const PANELS: usize = 3;
/// Groups that are multiplied before the next rows are: 96 KB of B.
const DEPTH: usize = 16;
/// Words of a group of a row.
const WORDS: usize = GROUP / 4;

/// [`super::round_panels`].
pub(super) fn round(_: Eight, matrix: View<'_, f32>, first: usize, mut out: Out<'_>) {
    // SAFETY: the token proves AVX-512 with VNNI.
    unsafe {
        if matrix.has_whole_rows() {
            along_rows(matrix, first, &mut out);
        } else {
            along_columns(|j| matrix.column(j), (0..matrix.cols(), matrix.cols()), first, &mut out);
        }
    }
}

/// [`super::round_tokens`].
pub(super) fn round_tokens(
    _: Eight,
    tokens: &[&[f32]],
    (which, depth): (Range<usize>, usize),
    first: usize,
    mut out: Out<'_>,
) {
    let from = which.start;
    // SAFETY: the token proves AVX-512 with VNNI.
    unsafe { along_columns(|j| tokens[j - from], (which, depth), first, &mut out) }
}

/// By what numbers are multiplied whose largest magnitude is `most`, and the scale of the integers.
#[inline]
#[target_feature(enable = "avx512f")]
fn steps(most: __m512) -> (__m512, __m512) {
    let top = _mm512_set1_ps(127.0);
    let some = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(most, _mm512_setzero_ps());
    (_mm512_maskz_div_ps(some, top, most), _mm512_div_ps(most, top))
}

/// Numbers rounded to integers.
#[inline]
#[target_feature(enable = "avx512f")]
fn whole(values: __m512, inverse: __m512) -> __m512i {
    _mm512_cvtps_epi32(_mm512_mul_ps(values, inverse))
}

/// Rows lie in one piece: sixteen words of sixteen rows are turned at a time.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn along_rows(matrix: View<'_, f32>, first: usize, out: &mut Out<'_>) {
    let (depth, groups) = (matrix.cols(), groups(matrix.cols()));
    let panels = out.words.chunks_exact_mut(LANES * row_words(depth));
    let params = out.scales.chunks_exact_mut(LANES * groups).zip(out.starts.chunks_exact_mut(LANES * groups));
    for (i, (words, (scales, starts))) in panels.zip(params).enumerate() {
        let first = first + i * LANES;
        let rows = (matrix.rows() - first).min(LANES);
        let params = scales.as_chunks_mut::<LANES>().0.iter_mut().zip(starts.as_chunks_mut::<LANES>().0);
        for ((g, (scales, starts)), words) in params.enumerate().zip(words.chunks_mut(LANES * WORDS)) {
            let part = |r: usize| &matrix.row(first + r)[g * GROUP..depth.min((g + 1) * GROUP)];
            let mut most = [0.0f32; LANES];
            for (r, most) in most.iter_mut().enumerate().take(rows) {
                let mut all = _mm512_setzero_ps();
                for values in part(r).chunks(LANES) {
                    all = _mm512_max_ps(all, _mm512_abs_ps(load(values)));
                }
                *most = _mm512_reduce_max_ps(all);
            }
            let (inverse, scale) = steps(load(&most));
            let mut inverses = [0.0f32; LANES];
            let mut sums = _mm512_setzero_si512();
            store_floats(&mut inverses, inverse);
            store_floats(scales, scale);
            for (t, out) in words.chunks_exact_mut(LANES * LANES).enumerate() {
                let mut tile = [_mm512_setzero_si512(); LANES];
                for (r, tile) in tile.iter_mut().enumerate().take(rows) {
                    let values = part(r);
                    *tile = bytes(&values[values.len().min(t * TURN)..], _mm512_set1_ps(inverses[r]));
                }
                for (out, v) in out.as_chunks_mut::<LANES>().0.iter_mut().zip(turn(tile)) {
                    sums = put_words(v, sums, out);
                }
            }
            store_starts(starts, sums);
        }
    }
}

/// Up to 64 numbers of a row as signed bytes, and zeros.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn bytes(values: &[f32], inverse: __m512) -> __m512i {
    let part = |i: usize| whole(load(&values[values.len().min(i * LANES)..]), inverse);
    let (low, high) = (_mm512_packs_epi32(part(0), part(1)), _mm512_packs_epi32(part(2), part(3)));
    // Quarters of registers are packed by themselves: word 4l + k is the lth of the kth sixteen numbers.
    let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high))
}

/// Lays down a column of words, made unsigned, and adds what its bytes are in sum.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn put_words(v: __m512i, sums: __m512i, out: &mut [u32; LANES]) -> __m512i {
    // SAFETY: 64 bytes are there, and the store needs no alignment.
    unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), flip(v)) };
    _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), v)
}

/// Signed bytes 128 above what they are, and back.
#[inline]
#[target_feature(enable = "avx512f")]
fn flip(v: __m512i) -> __m512i {
    _mm512_xor_si512(v, _mm512_set1_epi8(-128))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store_floats(out: &mut [f32; LANES], v: __m512) {
    // SAFETY: 64 bytes are there, and the store needs no alignment.
    unsafe { _mm512_storeu_ps(out.as_mut_ptr(), v) }
}

/// −128 times the sums of a group.
#[inline]
#[target_feature(enable = "avx512f")]
fn store_starts(out: &mut [i32; LANES], sums: __m512i) {
    let starts = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32::<7>(sums));
    // SAFETY: 64 bytes are there, and the store needs no alignment.
    unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), starts) }
}

/// Columns lie in one piece, as those of a transpose do: four of them are laid into each other. The columns of a group are
/// read twice, the second time from a copy: where they lie, they would throw each other out of the caches. Whole groups are, or
/// what there is up to the last column.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn along_columns<'a>(
    column: impl Fn(usize) -> &'a [f32],
    (which, depth): (Range<usize>, usize),
    first: usize,
    out: &mut Out<'_>,
) {
    let (per_panel, groups) = (LANES * row_words(depth), groups(depth));
    let panels = 0..out.words.len() / per_panel;
    let side = |j: usize| if j < which.end { &column(j)[first..] } else { &[] };
    let mut copy = [[_mm512_setzero_ps(); GROUP]; TOGETHER];
    for g in which.start / GROUP..which.end.div_ceil(GROUP) {
        let begin = g * GROUP;
        let mut most = [_mm512_setzero_ps(); TOGETHER];
        for j in begin..begin + GROUP {
            let column = side(j);
            fetch_columns(side(j + AHEAD), &panels);
            for panel in panels.clone() {
                let values = load(&column[column.len().min(panel * LANES)..]);
                copy[panel][j - begin] = values;
                most[panel] = _mm512_max_ps(most[panel], _mm512_abs_ps(values));
            }
        }
        let words = row_words(depth).min((g + 1) * WORDS) - g * WORDS;
        for panel in panels.clone() {
            let (inverse, scale) = steps(most[panel]);
            let at = (panel * groups + g) * LANES;
            store_floats(&mut out.scales[at..].as_chunks_mut().0[0], scale);
            let mut sums = _mm512_setzero_si512();
            let to = out.words[panel * per_panel + g * WORDS * LANES..].as_chunks_mut().0;
            for (four, to) in copy[panel].as_chunks::<4>().0.iter().zip(to).take(words) {
                sums = put_words(columns(four, inverse), sums, to);
            }
            store_starts(&mut out.starts[at..].as_chunks_mut().0[0], sums);
        }
    }
}

/// Four columns of sixteen rows as words of signed bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn columns(values: &[__m512; 4], inverse: __m512) -> __m512i {
    let [a, b, c, d] = values;
    let v = whole(*a, inverse);
    let v = _mm512_mask_mov_epi8(v, 0x2222_2222_2222_2222, _mm512_slli_epi32::<8>(whole(*b, inverse)));
    let v = _mm512_mask_mov_epi8(v, 0x4444_4444_4444_4444, _mm512_slli_epi32::<16>(whole(*c, inverse)));
    _mm512_mask_mov_epi8(v, 0x8888_8888_8888_8888, _mm512_slli_epi32::<24>(whole(*d, inverse)))
}

/// [`super::multiply`].
pub(super) fn gemm(_: Eight, a: Eights<'_>, b: Eights<'_>, (old, diagonal): (Old, usize), c: &mut Output<'_>) {
    // SAFETY: the token proves AVX-512 with VNNI.
    unsafe { blocks(a, b, (old, diagonal), c) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn blocks(a: Eights<'_>, b: Eights<'_>, (old, diagonal): (Old, usize), c: &mut Output<'_>) {
    let all = groups(a.depth);
    for from in (0..all).step_by(DEPTH) {
        let deep = from..all.min(from + DEPTH);
        let old = if from == 0 { old } else { Old::Counts };
        let mut next = 0;
        while next < b.rows {
            let (col, panels) = (next, panels_at(next, b.rows));
            next += panels * LANES;
            // Rows above are asked for none of these columns.
            let top = col.saturating_sub(diagonal) / ROWS * ROWS;
            let tiles = a.rows.saturating_sub(top).div_ceil(ROWS);
            for (i, row) in (top..a.rows).step_by(ROWS).enumerate() {
                fetch(b, col / LANES + PANELS, &deep, (i, tiles));
                match panels.min(asked(row, col, diagonal)) {
                    1 => tile::<1>(a, b, &deep, ([row, col], old), c),
                    2 => tile::<2>(a, b, &deep, ([row, col], old), c),
                    _ => tile::<PANELS>(a, b, &deep, ([row, col], old), c),
                }
            }
        }
    }
}

/// The words of some groups of a panel.
fn words(depth: usize, panel: usize, groups: &Range<usize>) -> Range<usize> {
    let per_row = row_words(depth);
    let at = |group: usize| (panel * per_row + per_row.min(group * WORDS)) * LANES;
    at(groups.start)..at(groups.end)
}

/// Brings part `i` of so many `parts` of the next panels of B, which may lie far away, into the second cache.
#[inline]
#[target_feature(enable = "avx512f")]
fn fetch(b: Eights<'_>, first: usize, deep: &Range<usize>, (i, parts): (usize, usize)) {
    for panel in first..(first + PANELS).min(b.rows.div_ceil(LANES)) {
        let panel = &b.words[words(b.depth, panel, deep)];
        let share = (panel.len() / LANES).div_ceil(parts) * LANES;
        let part = panel.len().min(i * share)..panel.len().min((i + 1) * share);
        for line in panel[part].chunks_exact(LANES) {
            _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().cast());
        }
    }
}

/// Adds the products of eight rows of a panel of A with `N` panels of B to C, from a row and a column on, or puts them there.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn tile<const N: usize>(
    a: Eights<'_>,
    b: Eights<'_>,
    deep: &Range<usize>,
    ([row, col], old): ([usize; 2], Old),
    c: &mut Output<'_>,
) {
    fetch_tile::<N>(([row, col], old), c);
    let mut sums = [[_mm512_setzero_ps(); N]; ROWS];
    let all = groups(a.depth);
    for g in deep.clone() {
        let group = g..g + 1;
        let left = a.words[words(a.depth, row / LANES, &group)].as_chunks::<ROWS>().0;
        let left = left.iter().skip(row % LANES / ROWS).step_by(2);
        let mut right: [&[u32]; N] = [&[]; N];
        let mut dots = [[_mm512_setzero_si512(); N]; ROWS];
        let mut scales = [_mm512_setzero_ps(); N];
        for n in 0..N {
            right[n] = &b.words[words(b.depth, col / LANES + n, &group)];
            let at = ((col / LANES + n) * all + g) * LANES;
            scales[n] = load(&b.scales[at..][..LANES]);
            let starts = &b.starts[at..][..LANES];
            // SAFETY: 64 bytes are there, and the load needs no alignment.
            let start = unsafe { _mm512_loadu_si512(starts.as_ptr().cast()) };
            for dots in &mut dots {
                dots[n] = start;
            }
        }
        for (p, left) in left.enumerate() {
            let mut columns = [_mm512_setzero_si512(); N];
            for n in 0..N {
                let right = &right[n][p * LANES..][..LANES];
                // SAFETY: 64 bytes are there, and the load needs no alignment.
                columns[n] = flip(unsafe { _mm512_loadu_si512(right.as_ptr().cast()) });
            }
            for r in 0..ROWS {
                let word = _mm512_set1_epi32(left[r] as i32);
                for n in 0..N {
                    dots[r][n] = _mm512_dpbusd_epi32(dots[r][n], word, columns[n]);
                }
            }
        }
        let own = &a.scales[(row / LANES * all + g) * LANES + row % LANES..][..ROWS];
        for r in 0..ROWS {
            let own = _mm512_set1_ps(own[r]);
            for n in 0..N {
                let dot = _mm512_mul_ps(_mm512_cvtepi32_ps(dots[r][n]), scales[n]);
                sums[r][n] = _mm512_fmadd_ps(dot, own, sums[r][n]);
            }
        }
    }
    finish(&sums, ([row, col], old), c);
}
