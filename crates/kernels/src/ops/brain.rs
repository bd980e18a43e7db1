//! Products of matrices whose entries are rounded to bfloat16, with sums in f32: C ← C + A·Bᵀ, and H ← H + XᵀX.
//!
//! One instruction multiplies two neighbouring entries of sixteen rows and adds both to an f32, which is twice what it does
//! with f32, so both sides are laid out in panels of sixteen rows, two columns beside each other. A panel serves as either
//! side: as B by a register, as A by one pair at a time. Sixteen pairs of a panel's columns are also a tile of B as AMX reads
//! it, so panels begin at a line of the cache and end with a whole tile, in zeros.
//!
//! An entry is rounded to nearest even, once, to a relative error of at most 2⁻⁹; products of two are exact in f32. Sums are
//! folded over the columns in one order, so results are the same bits at any thread count. There is no scalar level: who
//! has no [`Brain`] multiplies in f32, and the tests hold results to the sums, in f64, of what was rounded.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(test)]
mod tests;

use super::matrix::{TOKENS, View, ViewMut, band};
use crate::level::Brain;
use rayon::prelude::*;

/// Rows of a panel, and pairs of a row that make a tile.
const LANES: usize = 16;
/// Pairs beyond a matrix's own, for the first panel to begin at a line of the cache wherever the slice does.
const SPARE: usize = LANES - 1;

/// A matrix `[rows, depth]` rounded to bfloat16, in panels: `[rows / 16, depth / 2, 16]` pairs, the entry of the lower column
/// in the low half. The depth is that of whole tiles.
#[derive(Debug, Clone, Copy)]
pub struct Brained<'a> {
    rows: usize,
    depth: usize,
    pairs: &'a [u32],
    /// Whether every sixteen pairs of a panel are row by row, as a tile of A is read.
    turned: bool,
}

impl<'a> Brained<'a> {
    /// Pairs of a matrix `[rows, depth]`, those that fill up its last panel and tile and go before its first included.
    #[must_use]
    pub fn pairs(rows: usize, depth: usize) -> usize {
        rows.next_multiple_of(LANES) * row_pairs(depth) + SPARE
    }

    /// Rounds `matrix` into `out`, in parallel over its panels.
    ///
    /// # Panics
    /// When `out` does not hold [`Brained::pairs`] entries: a caller's bug.
    pub fn round(brain: Brain, matrix: View<'_, f32>, out: &'a mut [u32]) -> Self {
        Brained::laid_out(brain, matrix, false, out)
    }

    /// [`Brained::round`] of what is only ever the left side of products, and of several: what some CPUs ask of a left side
    /// is then done once.
    ///
    /// # Panics
    /// When `out` does not hold [`Brained::pairs`] entries: a caller's bug.
    pub fn left(brain: Brain, matrix: View<'_, f32>, out: &'a mut [u32]) -> Self {
        #[cfg(target_arch = "x86_64")]
        let turned = brain.amx().is_some() && matrix.has_whole_rows();
        #[cfg(not(target_arch = "x86_64"))]
        let turned = false;
        Brained::laid_out(brain, matrix, turned, out)
    }

    fn laid_out(brain: Brain, matrix: View<'_, f32>, turned: bool, out: &'a mut [u32]) -> Self {
        let (rows, depth) = (matrix.rows(), matrix.cols());
        assert_eq!(out.len(), Brained::pairs(rows, depth), "pairs of the matrix");
        let out = from_line(out);
        if !out.is_empty() {
            let panel = |(i, out): (usize, &mut [u32])| round_panel(brain, matrix, i * LANES, turned, out);
            out.par_chunks_mut(LANES * row_pairs(depth)).enumerate().for_each(panel);
        }
        Brained { rows, depth, pairs: out, turned }
    }

    /// Rows `from..to`, where `from` is the first of a panel.
    ///
    /// # Panics
    /// Where it is not, or the matrix has no such rows: a caller's bug.
    #[must_use]
    pub fn between(&self, from: usize, to: usize) -> Self {
        assert!(from.is_multiple_of(LANES) && from <= to && to <= self.rows, "rows of whole panels");
        let per_row = row_pairs(self.depth);
        Brained {
            rows: to - from,
            depth: self.depth,
            pairs: &self.pairs[from * per_row..to.next_multiple_of(LANES) * per_row],
            turned: self.turned,
        }
    }
}

/// Pairs of a row, to the end of its last tile.
fn row_pairs(depth: usize) -> usize {
    depth.div_ceil(2).next_multiple_of(LANES)
}

/// What begins at a line of the cache, without [`SPARE`] words.
fn from_line(words: &mut [u32]) -> &mut [u32] {
    // Fewer words than a line has, since a slice of words begins at one.
    let skipped = words.as_ptr().align_offset(size_of::<[u32; LANES]>()).min(SPARE);
    let count = words.len() - SPARE;
    &mut words[skipped..][..count]
}

#[cfg(target_arch = "x86_64")]
fn round_panel(brain: Brain, matrix: View<'_, f32>, first: usize, turned: bool, out: &mut [u32]) {
    avx512::round(brain, matrix, first, turned, out);
}

#[cfg(not(target_arch = "x86_64"))]
fn round_panel(brain: Brain, _: View<'_, f32>, _: usize, _: bool, _: &mut [u32]) {
    brain.never()
}

/// `c ← c + a·bᵀ` for `a: [m, depth]`, `b: [n, depth]`, `c: [m, n]`, on the calling thread.
///
/// # Panics
/// When the shapes do not chain, or a side was made as the left one for other use: a caller's bug.
pub fn brain_gemm(brain: Brain, a: Brained<'_>, b: Brained<'_>, c: &mut ViewMut<'_, f32>) {
    assert!(a.depth == b.depth && [a.rows, b.rows] == c.shape(), "matrix shapes");
    assert!(!b.turned, "a right side");
    #[cfg(target_arch = "x86_64")]
    match brain.amx() {
        Some(amx) => amx::gemm(amx, a, b, c),
        None => {
            assert!(!a.turned, "a left side of this way");
            avx512::gemm(brain, a, b, c);
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    brain.never()
}

/// [`syrk`](crate::syrk) of what `x` is when rounded to bfloat16: likewise without what lies above the diagonal.
///
/// # Panics
/// When the lengths do not fit `n`: a caller's bug.
pub fn brain_syrk(brain: Brain, x: &[f32], n: usize, h: &mut [f32]) {
    assert!(n > 0 && x.len().is_multiple_of(n) && h.len() == n * n, "syrk shapes");
    let band = band(n);
    let mut pairs = Vec::new();
    for part in x.chunks(TOKENS * n) {
        let tokens = part.len() / n;
        pairs.resize(Brained::pairs(n, tokens), 0);
        let part = Brained::round(brain, View::new(part, tokens, n, n).t(), &mut pairs);
        h.par_chunks_mut(band * n).enumerate().for_each(|(i, rows)| {
            let (from, height) = (i * band, rows.len() / n);
            let to = from + height;
            let c = &mut ViewMut::new(rows, height, to, n);
            brain_gemm(brain, part.between(from, to), part.between(0, to), c);
        });
    }
}
