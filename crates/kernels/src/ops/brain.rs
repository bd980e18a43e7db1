//! Products of matrices whose entries are rounded to bfloat16, with sums in f32: C ← C + A·Bᵀ.
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
pub(super) mod avx512;

#[cfg(target_arch = "x86_64")]
pub(super) use amx::gated::gate_tiles;
#[cfg(target_arch = "x86_64")]
pub(super) use amx::mix::{can_mix, mix_tiles};

use super::matrix::{Output, View};
use crate::level::Brain;
use half::bf16;
use rayon::prelude::*;
use std::ops::Range;

/// Rows of a panel, and pairs of a row that make a tile.
pub(super) const LANES: usize = 16;
/// Panels that are filled together: of a transpose, whose columns are in one piece, they take 512 bytes of each.
pub(super) const TOGETHER: usize = 8;
/// So many entries are rounded sooner than other threads are told.
pub(super) const FEW: usize = 1 << 16;
/// Pairs beyond a matrix's own, for the first panel to begin at a line of the cache wherever the slice does.
pub(super) const SPARE: usize = LANES - 1;

/// A matrix `[rows, depth]` rounded to bfloat16, in panels: `[rows / 16, depth / 2, 16]` pairs, the entry of the lower column
/// in the low half. The depth is that of whole tiles.
#[derive(Debug, Clone, Copy)]
pub(super) struct Brained<'a> {
    rows: usize,
    depth: usize,
    pairs: &'a [u32],
    /// Whether every sixteen pairs of a panel are row by row, as a tile of A is read.
    turned: bool,
}

impl Brained<'_> {
    /// Rows and columns.
    pub(super) fn shape(&self) -> [usize; 2] {
        [self.rows, self.depth]
    }

    /// Rows `from..to`, where `from` is the first of a panel.
    ///
    /// # Panics
    /// Where it is not, or the matrix has no such rows: a caller's bug.
    pub(super) fn between(&self, from: usize, to: usize) -> Self {
        assert!(from.is_multiple_of(LANES) && from <= to && to <= self.rows, "rows of whole panels");
        let per_row = row_pairs(self.depth);
        let pairs = &self.pairs[from * per_row..to.next_multiple_of(LANES) * per_row];
        Brained { rows: to - from, pairs, ..*self }
    }
}

/// Pairs of a row, to the end of its last tile. Of many tiles there is an odd number: were panels a large power of two apart,
/// parts of them would meet in few places of the caches.
fn row_pairs(depth: usize) -> usize {
    let tiles = depth.div_ceil(2).div_ceil(LANES);
    (if tiles > 8 { tiles | 1 } else { tiles }) * LANES
}

/// How many words go before the first line of the cache: fewer than a line has, since a slice of words begins at one.
pub(super) fn line_start(words: &[u32]) -> usize {
    words.as_ptr().align_offset(size_of::<[u32; LANES]>()).min(SPARE)
}

/// What begins at a line of the cache, without [`SPARE`] words.
pub(super) fn from_line(words: &mut [u32]) -> &mut [u32] {
    let (begin, count) = (line_start(words), words.len() - SPARE);
    &mut words[begin..][..count]
}

/// A matrix in panels that owns them.
#[derive(Debug, Default)]
pub(super) struct Panels {
    rows: usize,
    depth: usize,
    pairs: Vec<u32>,
    turned: bool,
}

impl Panels {
    /// Rounds `matrix` in the place of what was there, in parallel over its panels.
    pub(super) fn round(&mut self, brain: Brain, matrix: View<'_, f32>) {
        self.rounded(brain, matrix, false);
    }

    /// [`Panels::round`] of what is only ever the left side of products, and of several: what some CPUs ask of a left side is
    /// then done once.
    pub(super) fn round_left(&mut self, brain: Brain, matrix: View<'_, f32>) {
        self.rounded(brain, matrix, turns(brain) && matrix.has_whole_rows());
    }

    /// The same of what is rounded, and whose rows lie in one piece each.
    pub(super) fn lay_left(&mut self, brain: Brain, matrix: View<'_, bf16>) {
        let turned = turns(brain);
        self.reshape([matrix.rows(), matrix.cols()], turned);
        self.fill((0..matrix.rows(), matrix.cols()), |first, out| lay_panels(brain, matrix, first, turned, out));
    }

    /// Makes it a left side that holds anything, and returns its rows, where products ask of one that it be turned.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn turned_rows(&mut self, brain: Brain, shape: [usize; 2]) -> Option<TurnedRows<'_>> {
        turns(brain).then(|| {
            self.reshape(shape, true);
            TurnedRows {
                words: from_line(&mut self.pairs),
                per_row: row_pairs(shape[1]),
                tiles: shape[1].div_ceil(2 * LANES),
            }
        })
    }

    /// Makes room for a matrix, which holds anything.
    pub(super) fn reshape(&mut self, [rows, depth]: [usize; 2], turned: bool) {
        (self.rows, self.depth, self.turned) = (rows, depth, turned);
        of_length(&mut self.pairs, rows.next_multiple_of(LANES) * row_pairs(depth) + SPARE);
    }

    /// Rounds `tokens`, rows that may lie anywhere, as columns of the matrix from column `from` on: its rows from `row` on, the
    /// first of a panel.
    ///
    /// # Panics
    /// Where the matrix was made as a left side: a caller's bug.
    pub(super) fn round_tokens(&mut self, brain: Brain, [row, from]: [usize; 2], tokens: &[&[f32]]) {
        assert!(!self.turned, "a right side");
        let which = (from..from + tokens.len(), self.depth);
        let rows = row..row + tokens.first().map_or(0, |token| token.len());
        self.fill((rows, tokens.len()), |first, out| round_tokens(brain, tokens, which.clone(), first, out));
    }

    fn rounded(&mut self, brain: Brain, matrix: View<'_, f32>, turned: bool) {
        self.reshape([matrix.rows(), matrix.cols()], turned);
        self.fill((0..matrix.rows(), matrix.cols()), |first, out| round_panels(brain, matrix, first, turned, out));
    }

    /// Has `panels` write so many columns of those of some rows, which they are told to begin so far behind the first of.
    fn fill(&mut self, (rows, cols): (Range<usize>, usize), panels: impl Fn(usize, &mut [u32]) + Sync) {
        let per_row = row_pairs(self.depth);
        let out = &mut from_line(&mut self.pairs)[rows.start * per_row..rows.end.next_multiple_of(LANES) * per_row];
        let each = TOGETHER * LANES * per_row;
        if rows.len() * cols <= FEW {
            return out.chunks_mut(each.max(1)).enumerate().for_each(|(i, out)| panels(i * TOGETHER * LANES, out));
        }
        out.par_chunks_mut(each).enumerate().for_each(|(i, out)| panels(i * TOGETHER * LANES, out));
    }

    /// The matrix.
    pub(super) fn matrix(&self) -> Brained<'_> {
        let pairs = &self.pairs[line_start(&self.pairs)..][..self.pairs.len().saturating_sub(SPARE)];
        Brained { rows: self.rows, depth: self.depth, pairs, turned: self.turned }
    }
}

/// The rows of a left side that is turned, thirty-two columns of each in a line. That there are such proves AVX-512 with BF16.
#[cfg(target_arch = "x86_64")]
pub(super) struct TurnedRows<'a> {
    words: &'a mut [u32],
    per_row: usize,
    tiles: usize,
}

#[cfg(target_arch = "x86_64")]
impl TurnedRows<'_> {
    /// Lines that hold a row's columns.
    pub(super) fn tiles(&self) -> usize {
        self.tiles
    }

    /// One of them.
    #[inline(always)]
    pub(super) fn line(&mut self, row: usize, tile: usize) -> &mut [u32; LANES] {
        let at = row / LANES * LANES * self.per_row + tile * LANES * LANES + row % LANES * LANES;
        match self.words[at..].first_chunk_mut() {
            Some(line) => line,
            None => panic!("a line of a row"),
        }
    }
}

/// Whether products ask of a left side that it be turned.
fn turns(brain: Brain) -> bool {
    #[cfg(target_arch = "x86_64")]
    return brain.amx().is_some();
    #[cfg(not(target_arch = "x86_64"))]
    brain.never()
}

/// Makes `values` so many, whatever they are. New memory is not touched.
pub(super) fn of_length<T: Copy + Default>(values: &mut Vec<T>, count: usize) {
    if values.capacity() < count {
        *values = vec![T::default(); count];
    } else {
        values.resize(count, T::default());
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
fn lay_panels(brain: Brain, matrix: View<'_, bf16>, first: usize, turned: bool, out: &mut [u32]) {
    avx512::lay(brain, matrix, first, turned, out);
}

#[cfg(not(target_arch = "x86_64"))]
fn lay_panels(brain: Brain, _: View<'_, bf16>, _: usize, _: bool, _: &mut [u32]) {
    brain.never()
}

#[cfg(target_arch = "x86_64")]
fn round_tokens(brain: Brain, tokens: &[&[f32]], which: (Range<usize>, usize), first: usize, out: &mut [u32]) {
    avx512::round_tokens(brain, tokens, which, first, out);
}

#[cfg(not(target_arch = "x86_64"))]
fn round_tokens(brain: Brain, _: &[&[f32]], _: (Range<usize>, usize), _: usize, _: &mut [u32]) {
    brain.never()
}

/// What becomes of what C holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Old {
    Counts,
    Goes,
}

/// `c ← Σ a·bᵀ` or `c ← c + Σ a·bᵀ` over pairs of `a: [m, depth]` and `b: [n, depth]`, for `c: [m, n]`, on the calling thread,
/// where only entries `(i, j)` with `j ≤ diagonal + i` are asked for; others may be computed, or not.
///
/// # Panics
/// When the shapes do not chain, or a side was made as the left one for other use: a caller's bug.
pub(super) fn multiply(
    brain: Brain,
    sides: &[(Brained<'_>, Brained<'_>)],
    (old, diagonal): (Old, usize),
    c: &mut Output<'_>,
) {
    for (a, b) in sides {
        assert!(a.depth == b.depth && [a.rows, b.rows] == c.shape(), "matrix shapes");
        assert!(!b.turned, "a right side");
    }
    #[cfg(target_arch = "x86_64")]
    match brain.amx() {
        // There is no product to put there.
        _ if old == Old::Goes && sides.iter().all(|(a, _)| a.depth == 0) => c.fill(std::mem::MaybeUninit::new(0.0)),
        Some(amx) => amx::gemm(amx, sides, (old, diagonal), c),
        None => {
            let mut old = old;
            for (a, b) in sides.iter().filter(|(a, _)| a.depth > 0) {
                assert!(!a.turned, "a left side of this way");
                avx512::gemm(brain, *a, *b, (old, diagonal), c);
                old = Old::Counts;
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = (old, diagonal);
        brain.never()
    }
}
