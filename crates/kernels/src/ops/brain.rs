//! Products of matrices whose entries are rounded to bfloat16, with sums in f32: C ← C + A·Bᵀ, and H ← H + XᵀX.
//!
//! One instruction multiplies two neighbouring entries of sixteen rows and adds both to an f32, which is twice what it does
//! with f32, so both sides are laid out in panels of sixteen rows, two columns beside each other. A panel serves as either
//! side: as B by a register, as A by one pair at a time. Sixteen pairs of a panel's columns are also a tile of B as AMX reads
//! it, so panels begin at a line of the cache and end with a whole tile, in zeros.
//!
//! An entry is rounded to nearest even, once, to a relative error of at most 2⁻⁸; products of two are exact in f32. Sums are
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
use std::collections::VecDeque;

/// Rows of a panel, and pairs of a row that make a tile.
const LANES: usize = 16;
/// Panels that are filled together: of a transpose, whose columns are in one piece, they take 512 bytes of each.
const TOGETHER: usize = 8;
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
        Brained::rounded(brain, matrix, false, out)
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
        Brained::rounded(brain, matrix, turned, out)
    }

    /// [`Brained::round`] of the transpose of `tokens`, rows of width `rows` that may lie anywhere.
    ///
    /// # Panics
    /// When `out` does not hold [`Brained::pairs`] entries, or a token is of another width: a caller's bug.
    pub fn tokens(brain: Brain, tokens: &[&[f32]], rows: usize, out: &'a mut [u32]) -> Self {
        assert!(tokens.iter().all(|token| token.len() == rows), "tokens of one width");
        let panels = |first: usize, out: &mut [u32]| round_tokens(brain, tokens, first, out);
        Brained::laid_out([rows, tokens.len()], false, panels, out)
    }

    fn rounded(brain: Brain, matrix: View<'_, f32>, turned: bool, out: &'a mut [u32]) -> Self {
        let panels = |first: usize, out: &mut [u32]| round_panels(brain, matrix, first, turned, out);
        Brained::laid_out([matrix.rows(), matrix.cols()], turned, panels, out)
    }

    fn laid_out(
        [rows, depth]: [usize; 2],
        turned: bool,
        panels: impl Fn(usize, &mut [u32]) + Sync,
        out: &'a mut [u32],
    ) -> Self {
        assert_eq!(out.len(), Brained::pairs(rows, depth), "pairs of the matrix");
        let out = from_line(out);
        if !out.is_empty() {
            let tasks = out.par_chunks_mut(TOGETHER * LANES * row_pairs(depth)).enumerate();
            tasks.for_each(|(i, out)| panels(i * TOGETHER * LANES, out));
        }
        Brained { rows, depth, pairs: out, turned }
    }

    /// Rows and columns.
    #[must_use]
    pub fn shape(&self) -> [usize; 2] {
        [self.rows, self.depth]
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

/// How many words go before the first line of the cache: fewer than a line has, since a slice of words begins at one.
fn line_start(words: &[u32]) -> usize {
    words.as_ptr().align_offset(size_of::<[u32; LANES]>()).min(SPARE)
}

/// What begins at a line of the cache, without [`SPARE`] words.
fn from_line(words: &mut [u32]) -> &mut [u32] {
    let (begin, count) = (line_start(words), words.len() - SPARE);
    &mut words[begin..][..count]
}

/// A matrix in panels that owns them.
#[derive(Debug)]
pub struct Panels {
    rows: usize,
    depth: usize,
    pairs: Vec<u32>,
    turned: bool,
}

impl Panels {
    /// Rounds `matrix`, in parallel over its panels.
    #[must_use]
    pub fn round(brain: Brain, matrix: View<'_, f32>) -> Self {
        Panels::filled(matrix, |pairs| Brained::round(brain, matrix, pairs).turned)
    }

    /// The same as [`Brained::left`] does it.
    #[must_use]
    pub fn left(brain: Brain, matrix: View<'_, f32>) -> Self {
        Panels::filled(matrix, |pairs| Brained::left(brain, matrix, pairs).turned)
    }

    fn filled(matrix: View<'_, f32>, fill: impl FnOnce(&mut [u32]) -> bool) -> Self {
        let (rows, depth) = (matrix.rows(), matrix.cols());
        let mut pairs = vec![0; Brained::pairs(rows, depth)];
        let turned = fill(&mut pairs);
        Panels { rows, depth, pairs, turned }
    }

    /// The matrix.
    #[must_use]
    pub fn matrix(&self) -> Brained<'_> {
        let pairs = &self.pairs[line_start(&self.pairs)..][..self.pairs.len() - SPARE];
        Brained { rows: self.rows, depth: self.depth, pairs, turned: self.turned }
    }
}

#[cfg(target_arch = "x86_64")]
fn round_panels(brain: Brain, matrix: View<'_, f32>, first: usize, turned: bool, out: &mut [u32]) {
    avx512::round(brain, matrix, first, turned, out);
}

#[cfg(not(target_arch = "x86_64"))]
fn round_panels(brain: Brain, _: View<'_, f32>, _: usize, _: bool, _: &mut [u32]) {
    brain.never()
}

#[cfg(target_arch = "x86_64")]
fn round_tokens(brain: Brain, tokens: &[&[f32]], first: usize, out: &mut [u32]) {
    avx512::round_tokens(brain, tokens, first, out);
}

#[cfg(not(target_arch = "x86_64"))]
fn round_tokens(brain: Brain, _: &[&[f32]], _: usize, _: &mut [u32]) {
    brain.never()
}

/// `c ← c + a·bᵀ` for `a: [m, depth]`, `b: [n, depth]`, `c: [m, n]`, on the calling thread.
///
/// # Panics
/// When the shapes do not chain, or a side was made as the left one for other use: a caller's bug.
pub fn brain_gemm(brain: Brain, a: Brained<'_>, b: Brained<'_>, c: &mut ViewMut<'_, f32>) {
    multiply(brain, a, b, (Old::Counts, usize::MAX), c);
}

/// `c ← a·bᵀ`, otherwise as [`brain_gemm`]. What `c` held is not even read: fresh memory is not touched twice.
///
/// # Panics
/// As [`brain_gemm`].
pub fn brain_product(brain: Brain, a: Brained<'_>, b: Brained<'_>, c: &mut ViewMut<'_, f32>) {
    multiply(brain, a, b, (Old::Goes, usize::MAX), c);
}

/// What becomes of what C holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Old {
    Counts,
    Goes,
}

/// [`brain_gemm`] or [`brain_product`] where only entries `(i, j)` with `j ≤ diagonal + i` are asked for; others may be
/// computed, or not.
fn multiply(brain: Brain, a: Brained<'_>, b: Brained<'_>, (old, diagonal): (Old, usize), c: &mut ViewMut<'_, f32>) {
    assert!(a.depth == b.depth && [a.rows, b.rows] == c.shape(), "matrix shapes");
    assert!(!b.turned, "a right side");
    #[cfg(target_arch = "x86_64")]
    match brain.amx() {
        Some(amx) => {
            if old == Old::Goes {
                c.fill(0.0);
            }
            amx::gemm(amx, a, b, c);
        }
        // There is no product to put there.
        None if a.depth == 0 && old == Old::Goes => c.fill(0.0),
        None => {
            assert!(!a.turned, "a left side of this way");
            avx512::gemm(brain, a, b, (old, diagonal), c);
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = diagonal;
        brain.never()
    }
}

/// Entries that are rounded at a time, where that is more than the tokens of [`TOKENS`]: 4 MB.
const ROUNDED: usize = 1 << 21;

/// [`syrk`](crate::syrk) of what `x` is when rounded to bfloat16, likewise without what lies above the diagonal. The tokens come
/// in parts that may lie anywhere; results do not depend on how they are parted.
///
/// # Panics
/// When the lengths do not fit `n`: a caller's bug.
pub fn brain_syrk(brain: Brain, x: &[&[f32]], n: usize, h: &mut [f32]) {
    assert!(n > 0 && x.iter().all(|part| part.len().is_multiple_of(n)) && h.len() == n * n, "syrk shapes");
    let (band, at_once) = (band(n), TOKENS.max((ROUNDED / n).next_multiple_of(TOKENS)));
    let tokens: Vec<&[f32]> = x.iter().flat_map(|part| part.chunks_exact(n)).collect();
    let mut pairs = Vec::new();
    for tokens in tokens.chunks(at_once) {
        pairs.resize(Brained::pairs(n, tokens.len()), 0);
        let x = Brained::tokens(brain, tokens, n, &mut pairs);
        // The first band has the shortest rows and the last the longest: with one of either all tasks are alike.
        let mut bands: VecDeque<(usize, &mut [f32])> = h.chunks_mut(band * n).enumerate().collect();
        let mut tasks = Vec::new();
        while let Some(last) = bands.pop_back() {
            tasks.push([Some(last), bands.pop_front()]);
        }
        tasks.into_par_iter().with_max_len(1).for_each(|task| {
            for (i, rows) in task.into_iter().flatten() {
                let (from, height) = (i * band, rows.len() / n);
                let to = from + height;
                let c = &mut ViewMut::new(rows, height, to, n);
                multiply(brain, x.between(from, to), x.between(0, to), (Old::Counts, from), c);
            }
        });
    }
}
