//! Panels rounded and multiplied by AVX-512 with BF16.
//!
//! A tile of C is eight rows by three panels, 24 registers: eleven loads feed 24 products of a pair, so the two units that
//! multiply are what it waits for. The depth is cut so that three panels of B stay in the second cache while A passes: a tile of
//! C comes from further away than they do, and is brought in once for every cut.

use super::super::matrix::{Element, Output, View};
use super::{Brained, LANES, Old, row_pairs};
use crate::level::Brain;
use half::bf16;
use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Rows of a tile: half a panel.
pub(in crate::ops) const ROWS: usize = LANES / 2;
/// Panels of a tile, at most.
const PANELS: usize = 3;
/// Pairs of a row that are multiplied before the next rows are: 96 KB of B.
const DEPTH: usize = 512;
/// Pairs of a row whose products are added up before C takes them: the longer a chain of sums is, the more it rounds.
const CHAIN: usize = 128;

/// Columns that are fetched before they are needed: where each is far from the last, no CPU does so by itself.
pub(in crate::ops) const AHEAD: usize = 16;

/// [`super::round_panels`].
pub(super) fn round(_: Brain, matrix: View<'_, f32>, first: usize, turned: bool, out: &mut [u32]) {
    // SAFETY: the token proves AVX-512 with BF16.
    unsafe {
        if matrix.has_whole_rows() {
            let panels = out.chunks_exact_mut(LANES * row_pairs(matrix.cols()));
            panels.enumerate().for_each(|(i, out)| along_rows(matrix, first + i * LANES, turned, out));
        } else {
            along_columns(|j| matrix.column(j), (0..matrix.cols(), matrix.cols()), first, out);
        }
    }
}

/// [`super::lay_panels`].
pub(super) fn lay(_: Brain, matrix: View<'_, bf16>, first: usize, turned: bool, out: &mut [u32]) {
    let panels = out.chunks_exact_mut(LANES * row_pairs(matrix.cols()));
    // SAFETY: the token proves AVX-512 with BF16.
    unsafe { panels.enumerate().for_each(|(i, out)| along_rounded_rows(matrix, first + i * LANES, turned, out)) }
}

/// [`super::round_tokens`].
pub(super) fn round_tokens(
    _: Brain,
    tokens: &[&[f32]],
    (which, depth): (Range<usize>, usize),
    first: usize,
    out: &mut [u32],
) {
    let from = which.start;
    // SAFETY: the token proves AVX-512 with BF16.
    unsafe { along_columns(|j| tokens[j - from], (which, depth), first, out) }
}

/// A mask of the first `count` of sixteen lanes, all of them where there are more.
pub(super) fn first_lanes(count: usize) -> u16 {
    (0xffffu32 >> (LANES - count.min(LANES))) as u16
}

/// Up to sixteen numbers, and zeros.
#[inline]
#[target_feature(enable = "avx512f")]
pub(in crate::ops) fn load(values: &[f32]) -> __m512 {
    // SAFETY: the mask leaves out what lies beyond the slice, and the load needs no alignment.
    unsafe { _mm512_maskz_loadu_ps(first_lanes(values.len()), values.as_ptr()) }
}

/// Rows lie in one piece: sixteen pairs of sixteen rows are turned at a time, or left as they are.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn along_rows(matrix: View<'_, f32>, first: usize, turned: bool, out: &mut [u32]) {
    let (rows, count) = rows_of(matrix, first);
    for (i, out) in out.as_chunks_mut().0.iter_mut().enumerate() {
        let mut pairs = [_mm512_setzero_si512(); LANES];
        for r in 0..count {
            let row = &rows[r][(2 * LANES * i).min(rows[r].len())..];
            let [low, high] = match row.first_chunk::<{ 2 * LANES }>() {
                // SAFETY: 128 bytes are there, and the loads need no alignment.
                Some(row) => unsafe { [_mm512_loadu_ps(row.as_ptr()), _mm512_loadu_ps(row.as_ptr().add(LANES))] },
                // The last tile may be none of its own.
                None => [load(row), load(&row[row.len().min(LANES)..])],
            };
            pairs[r] = as_bits(_mm512_cvtne2ps_pbh(high, low));
        }
        put_tile(pairs, turned, out);
    }
}

/// The same of rows that are rounded.
#[target_feature(enable = "avx512f,avx512bw")]
fn along_rounded_rows(matrix: View<'_, bf16>, first: usize, turned: bool, out: &mut [u32]) {
    let (rows, count) = rows_of(matrix, first);
    for (i, out) in out.as_chunks_mut().0.iter_mut().enumerate() {
        let mut pairs = [_mm512_setzero_si512(); LANES];
        for r in 0..count {
            let row = &rows[r][(2 * LANES * i).min(rows[r].len())..];
            let mask = if row.is_empty() { 0 } else { u32::MAX >> (2 * LANES - row.len().min(2 * LANES)) };
            // SAFETY: the mask leaves out what lies beyond the row, and the load needs no alignment.
            pairs[r] = unsafe { _mm512_maskz_loadu_epi16(mask, row.as_ptr().cast()) };
        }
        put_tile(pairs, turned, out);
    }
}

/// The rows of a panel, and how many it has.
fn rows_of<T: Element>(matrix: View<'_, T>, first: usize) -> ([&[T]; LANES], usize) {
    let mut rows: [&[T]; LANES] = [&[]; LANES];
    let count = (matrix.rows() - first).min(LANES);
    rows[..count].iter_mut().enumerate().for_each(|(r, row)| *row = matrix.row(first + r));
    (rows, count)
}

/// Pairs of sixteen rows as a tile, turned or, for the left side, as they are.
#[inline]
#[target_feature(enable = "avx512f")]
fn put_tile(pairs: [__m512i; LANES], turned: bool, out: &mut [u32; LANES * LANES]) {
    let tile = if turned { pairs } else { turn(pairs) };
    let out = out.as_mut_ptr();
    for (i, &line) in tile.iter().enumerate() {
        // SAFETY: the tile has so many lines of 64 bytes, and the store needs no alignment.
        unsafe { _mm512_storeu_si512(out.add(i * LANES).cast(), line) };
    }
}

/// Columns lie in one piece, as those of a transpose do: two of them are laid into each other. Some are, an even number from an
/// even one on, or up to the last, with the zeros that follow it.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn along_columns<'a>(
    column: impl Fn(usize) -> &'a [f32],
    (which, depth): (Range<usize>, usize),
    first: usize,
    out: &mut [u32],
) {
    let mut order = [0u16; 2 * LANES];
    for i in 0..LANES {
        (order[2 * i], order[2 * i + 1]) = (i as u16, (LANES + i) as u16);
    }
    // SAFETY: 64 bytes are there, and the load needs no alignment.
    let order = unsafe { _mm512_loadu_si512(order.as_ptr().cast()) };
    let per_panel = LANES * row_pairs(depth);
    let panels = out.len() / per_panel;
    let end = if which.end == depth { row_pairs(depth) } else { which.end / 2 };
    for from in (which.start / 2..end).step_by(SOME) {
        let mut sides: [[&[f32]; 2]; SOME] = [[&[]; 2]; SOME];
        // Rows that all of them have.
        let mut rows = usize::MAX;
        for (i, pair) in sides.iter_mut().enumerate() {
            for (j, side) in pair.iter_mut().enumerate() {
                let at = 2 * (from + i) + j;
                if at < which.end {
                    *side = &column(at)[first..];
                }
                rows = rows.min(side.len());
            }
        }
        // Loops alone: what iterators are given is not inlined here.
        for i in 0..panels {
            let panel = &mut out[i * per_panel..(i + 1) * per_panel];
            let lines = panel[from * LANES..].as_chunks_mut::<LANES>().0;
            if (i + 1) * LANES <= rows
                && let Some(lines) = lines.first_chunk_mut::<SOME>()
            {
                for j in 0..SOME {
                    let [low, high] = sides[j];
                    // SAFETY: both have sixteen numbers from there on, and nothing needs alignment.
                    unsafe {
                        let low = _mm512_loadu_ps(low.as_ptr().add(i * LANES));
                        let high = _mm512_loadu_ps(high.as_ptr().add(i * LANES));
                        _mm512_storeu_si512(lines[j].as_mut_ptr().cast(), paired(low, high, order));
                    }
                }
                continue;
            }
            for j in 0..SOME.min(end - from) {
                let [low, high] = sides[j];
                let low = load(&low[low.len().min(i * LANES)..]);
                let high = load(&high[high.len().min(i * LANES)..]);
                // SAFETY: 64 bytes are there, and the store needs no alignment.
                unsafe { _mm512_storeu_si512(lines[j].as_mut_ptr().cast(), paired(low, high, order)) };
            }
        }
    }
}

/// Pairs of columns that are laid together: lines of a panel one after another.
const SOME: usize = 4;

/// Sixteen numbers of two columns, laid into each other in `order`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn paired(low: __m512, high: __m512, order: __m512i) -> __m512i {
    _mm512_permutexvar_epi16(order, as_bits(_mm512_cvtne2ps_pbh(high, low)))
}

/// Brings the part of a column that some panels are of into the first cache. It may begin within a line, so its end is in one more.
#[inline]
#[target_feature(enable = "avx512f")]
pub(in crate::ops) fn fetch_columns(column: &[f32], panels: &Range<usize>) {
    for at in panels.clone().map(|panel| panel * LANES).chain([panels.end * LANES - 1]) {
        if let Some(line) = column.get(at) {
            _mm_prefetch::<_MM_HINT_T0>((&raw const *line).cast());
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(in crate::ops) fn as_bits(v: __m512bh) -> __m512i {
    // SAFETY: both are 64 bytes of which any are a value.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(v) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn as_pairs(v: __m512i) -> __m512bh {
    // SAFETY: both are 64 bytes of which any are a value.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(v) }
}

/// The transpose of sixteen rows of sixteen.
#[inline]
#[target_feature(enable = "avx512f")]
pub(in crate::ops) fn turn(rows: [__m512i; LANES]) -> [__m512i; LANES] {
    // Four by four within every quarter of a register, then quarters among registers.
    let mut fours = rows;
    for i in (0..LANES).step_by(4) {
        let (ab, cd) = (_mm512_unpacklo_epi32(rows[i], rows[i + 1]), _mm512_unpacklo_epi32(rows[i + 2], rows[i + 3]));
        let (ef, gh) = (_mm512_unpackhi_epi32(rows[i], rows[i + 1]), _mm512_unpackhi_epi32(rows[i + 2], rows[i + 3]));
        fours[i] = _mm512_unpacklo_epi64(ab, cd);
        fours[i + 1] = _mm512_unpackhi_epi64(ab, cd);
        fours[i + 2] = _mm512_unpacklo_epi64(ef, gh);
        fours[i + 3] = _mm512_unpackhi_epi64(ef, gh);
    }
    let mut turned = rows;
    for i in 0..4 {
        let (a, b) = (
            _mm512_shuffle_i32x4::<0x88>(fours[i], fours[4 + i]),
            _mm512_shuffle_i32x4::<0x88>(fours[8 + i], fours[12 + i]),
        );
        let (c, d) = (
            _mm512_shuffle_i32x4::<0xdd>(fours[i], fours[4 + i]),
            _mm512_shuffle_i32x4::<0xdd>(fours[8 + i], fours[12 + i]),
        );
        turned[i] = _mm512_shuffle_i32x4::<0x88>(a, b);
        turned[8 + i] = _mm512_shuffle_i32x4::<0xdd>(a, b);
        turned[4 + i] = _mm512_shuffle_i32x4::<0x88>(c, d);
        turned[12 + i] = _mm512_shuffle_i32x4::<0xdd>(c, d);
    }
    turned
}

/// [`super::multiply`].
pub(super) fn gemm(_: Brain, a: Brained<'_>, b: Brained<'_>, (old, diagonal): (Old, usize), c: &mut Output<'_>) {
    // SAFETY: the token proves AVX-512 with BF16.
    unsafe { blocks(a, b, (old, diagonal), c) }
}

#[target_feature(enable = "avx512f,avx512bf16")]
fn blocks(a: Brained<'_>, b: Brained<'_>, (old, diagonal): (Old, usize), c: &mut Output<'_>) {
    let pairs = a.depth.div_ceil(2);
    for from in (0..pairs).step_by(DEPTH) {
        let deep = from..pairs.min(from + DEPTH);
        let mut next = 0;
        while next < b.rows {
            let (col, panels) = (next, panels_at(next, b.rows));
            next += panels * LANES;
            // Rows above are asked for none of these columns.
            let top = col.saturating_sub(diagonal) / ROWS * ROWS;
            let tiles = a.rows.saturating_sub(top).div_ceil(ROWS);
            for (i, row) in (top..a.rows).step_by(ROWS).enumerate() {
                fetch(b, col / LANES + PANELS, &deep, (i, tiles));
                let panels = panels.min(asked(row, col, diagonal));
                for begin in deep.clone().step_by(CHAIN) {
                    let old = if begin == 0 { old } else { Old::Counts };
                    chain(a, b, begin..deep.end.min(begin + CHAIN), ([row, col], panels, old), c);
                }
            }
        }
    }
}

/// Panels of the tiles that begin at column `col` of so many: of four that are left two at a time, since those of a single one
/// would load more than they multiply.
pub(in crate::ops) fn panels_at(col: usize, cols: usize) -> usize {
    match (cols - col).div_ceil(LANES) {
        4 => 2,
        left => left.min(PANELS),
    }
}

/// Panels from column `col` on of which the rows of a tile from `row` on are asked for anything, where there is no end of panels.
pub(in crate::ops) fn asked(row: usize, col: usize, diagonal: usize) -> usize {
    diagonal.saturating_add(row + ROWS).saturating_sub(col).div_ceil(LANES)
}

/// The products of the pairs `chain` of eight rows with `panels` panels.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn chain(
    a: Brained<'_>,
    b: Brained<'_>,
    chain: Range<usize>,
    ([row, col], panels, old): ([usize; 2], usize, Old),
    c: &mut Output<'_>,
) {
    let stride = row_pairs(a.depth);
    let panel = |i: usize| (i * stride + chain.start) * LANES..(i * stride + chain.end) * LANES;
    let first = col / LANES;
    let side = &a.pairs[panel(row / LANES)];
    let of = |n: usize| &b.pairs[panel((first + n).min(first + panels - 1))];
    match panels {
        1 => tile(side, [of(0)], ([row, col], old), c),
        2 => tile(side, [of(0), of(1)], ([row, col], old), c),
        _ => tile(side, [of(0), of(1), of(2)], ([row, col], old), c),
    }
}

/// Brings part `i` of so many `parts` of the next panels of B, which may lie far away, into the second cache.
#[inline]
#[target_feature(enable = "avx512f")]
fn fetch(b: Brained<'_>, first: usize, deep: &Range<usize>, (i, parts): (usize, usize)) {
    let share = deep.len().div_ceil(parts);
    let from = deep.end.min(deep.start + i * share);
    for panel in first..(first + PANELS).min(b.rows.div_ceil(LANES)) {
        let panel = &b.pairs[panel * row_pairs(b.depth) * LANES..];
        for line in panel[from * LANES..deep.end.min(from + share) * LANES].chunks_exact(LANES) {
            _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().cast());
        }
    }
}

/// Adds the products of eight rows of a panel of A with `N` panels of B to C, from a row and a column on, or puts them there.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn tile<const N: usize>(a: &[u32], b: [&[u32]; N], ([row, col], old): ([usize; 2], Old), c: &mut Output<'_>) {
    let mut sums = [[_mm512_setzero_ps(); N]; ROWS];
    fetch_tile::<N>(([row, col], old), c);
    let a = a.as_chunks::<ROWS>().0.iter().skip(row % LANES / ROWS).step_by(2);
    for (p, a) in a.enumerate() {
        let mut columns = [_mm512_setzero_si512(); N];
        for n in 0..N {
            let b = &b[n][p * LANES..][..LANES];
            // SAFETY: 64 bytes are there, and the load needs no alignment.
            columns[n] = unsafe { _mm512_loadu_si512(b.as_ptr().cast()) };
        }
        for r in 0..ROWS {
            let pair = as_pairs(_mm512_set1_epi32(a[r] as i32));
            for n in 0..N {
                sums[r][n] = _mm512_dpbf16_ps(sums[r][n], pair, as_pairs(columns[n]));
            }
        }
    }
    finish(&sums, ([row, col], old), c);
}

/// Brings what a tile of C holds into the first cache, where it counts: it is there when the sums are.
#[inline]
#[target_feature(enable = "avx512f")]
pub(in crate::ops) fn fetch_tile<const N: usize>(([row, col], old): ([usize; 2], Old), c: &mut Output<'_>) {
    if old == Old::Goes {
        return;
    }
    if let Some((c, stride)) = c.whole((row, col), (ROWS, N * LANES)) {
        for r in 0..ROWS {
            for n in 0..N {
                _mm_prefetch::<_MM_HINT_T0>(c[r * stride + n * LANES..].as_ptr().cast());
            }
        }
    }
}

/// Adds a tile's sums to C, from a row and a column on, or puts them there.
#[inline]
#[target_feature(enable = "avx512f")]
pub(in crate::ops) fn finish<const N: usize>(
    sums: &[[__m512; N]; ROWS],
    ([row, col], old): ([usize; 2], Old),
    c: &mut Output<'_>,
) {
    if let Some((c, stride)) = c.whole((row, col), (ROWS, N * LANES)) {
        let c: *mut f32 = c.as_mut_ptr().cast();
        for (r, sums) in sums.iter().enumerate() {
            for (n, &sum) in sums.iter().enumerate() {
                // SAFETY: a whole tile lies from here on, and neither needs alignment.
                unsafe {
                    let c = c.add(r * stride + n * LANES);
                    let sum = match old {
                        Old::Counts => _mm512_add_ps(_mm512_loadu_ps(c), sum),
                        Old::Goes => sum,
                    };
                    _mm512_storeu_ps(c, sum);
                }
            }
        }
        return;
    }
    for (r, sums) in sums.iter().enumerate() {
        for (n, sum) in sums.iter().enumerate() {
            if let Some(c) = c.part(row + r, col + n * LANES, LANES) {
                match old {
                    Old::Counts => add(c, *sum),
                    Old::Goes => put(c, *sum),
                }
            }
        }
    }
}

/// Makes the entries of C that there are, sixteen at most, the first sums.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn put(c: &mut [MaybeUninit<f32>], sums: __m512) {
    // SAFETY: the mask leaves out what lies beyond the slice, and the store needs no alignment.
    unsafe { _mm512_mask_storeu_ps(c.as_mut_ptr().cast(), first_lanes(c.len()), sums) }
}

/// [`put`] past the caches, where the entries are a line of them: for what is not read again soon. A fence is to follow.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn put_past(c: &mut [MaybeUninit<f32>], sums: __m512) {
    let to: *mut f32 = c.as_mut_ptr().cast();
    match c.len() == LANES && to.addr().is_multiple_of(size_of::<__m512>()) {
        // SAFETY: so many entries are there, and they begin at a line.
        true => unsafe { _mm512_stream_ps(to, sums) },
        false => put(c, sums),
    }
}

/// Adds the first sums to the entries of C that there are, sixteen at most, and hold numbers.
#[inline]
#[target_feature(enable = "avx512f")]
pub(in crate::ops) fn add(c: &mut [MaybeUninit<f32>], sums: __m512) {
    let mask = first_lanes(c.len());
    // SAFETY: the mask leaves out what lies beyond the slice, and neither needs alignment.
    unsafe {
        let old = _mm512_maskz_loadu_ps(mask, c.as_ptr().cast());
        _mm512_mask_storeu_ps(c.as_mut_ptr().cast(), mask, _mm512_add_ps(old, sums));
    }
}
