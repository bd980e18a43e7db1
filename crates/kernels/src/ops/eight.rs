//! Products of matrices whose entries are rounded to eight bits, with sums in integers and then in f32: C ← C + A·Bᵀ.
//!
//! One instruction multiplies four neighbouring entries of sixteen rows and adds all to an integer, which is twice what it
//! does with bfloat16. [`GROUP`] neighbouring entries of a row share a scale, so the integers, which are exact, become f32
//! once a group. Sides are laid out in panels as those of bfloat16 are, four columns beside each other.
//!
//! The instruction takes an unsigned side and a signed one. Entries lie here as unsigned, 128 above what they are, and the
//! right side is made signed when it is read; what 128 too much on the left side adds is known before, from the sum of a
//! row's entries of the group, and sums begin with as much less.
//!
//! An entry is off by at most half of a step, a 254th of the largest of its group. Sums are folded over the groups in one
//! order, so results are the same bits at any thread count. There is no scalar level: who has no [`Eight`] multiplies in f32,
//! and the tests hold results to the sums, in f64, of what was rounded. Tiles of AMX would do twice as much in eight bits as in
//! bfloat16; nothing here uses them.

#[cfg(target_arch = "x86_64")]
mod avx512;

use super::brain::{FEW, LANES, Old, SPARE, TOGETHER, from_line, line_start, of_length};
use super::matrix::{Output, View};
use crate::level::Eight;
use rayon::prelude::*;
use std::ops::Range;

/// Neighbouring entries of a row that share a scale.
pub(super) const GROUP: usize = 128;
/// Entries of a row that are laid out together: sixteen words of four.
const TURN: usize = 4 * LANES;

/// A matrix `[rows, depth]` rounded to eight bits, in panels: `[rows / 16, depth / 4, 16]` words of four entries, the lowest
/// column in the lowest byte, 128 above what they are. The depth is that of whole [`TURN`]s.
#[derive(Debug, Clone, Copy)]
pub(super) struct Eights<'a> {
    rows: usize,
    depth: usize,
    words: &'a [u32],
    /// Of every group, `[rows / 16, groups, 16]`.
    scales: &'a [f32],
    /// −128 · the sum of the entries of every group, likewise.
    starts: &'a [i32],
}

/// Where some panels go, and their parameters.
#[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "nothing rounds there"))]
struct Out<'a> {
    words: &'a mut [u32],
    scales: &'a mut [f32],
    starts: &'a mut [i32],
}

/// Words of a row, to the end of its last turn.
fn row_words(depth: usize) -> usize {
    depth.next_multiple_of(TURN) / 4
}

/// Groups of a row.
fn groups(depth: usize) -> usize {
    depth.div_ceil(GROUP)
}

impl Eights<'_> {
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
        let part = |per_row: usize| from * per_row..to.next_multiple_of(LANES) * per_row;
        let groups = groups(self.depth);
        Eights {
            rows: to - from,
            words: &self.words[part(row_words(self.depth))],
            scales: &self.scales[part(groups)],
            starts: &self.starts[part(groups)],
            ..*self
        }
    }
}

/// A matrix in panels that owns them.
#[derive(Debug, Default)]
pub(super) struct Panels {
    rows: usize,
    depth: usize,
    words: Vec<u32>,
    scales: Vec<f32>,
    starts: Vec<i32>,
}

impl Panels {
    /// Rounds `matrix` in the place of what was there, in parallel over its panels.
    pub(super) fn round(&mut self, eight: Eight, matrix: View<'_, f32>) {
        self.reshape([matrix.rows(), matrix.cols()]);
        self.fill((0..matrix.rows(), matrix.cols()), |first, out| round_panels(eight, matrix, first, out));
    }

    /// Makes room for a matrix, which holds anything.
    pub(super) fn reshape(&mut self, [rows, depth]: [usize; 2]) {
        let (lanes, groups) = (rows.next_multiple_of(LANES), groups(depth));
        (self.rows, self.depth) = (rows, depth);
        of_length(&mut self.words, lanes * row_words(depth) + SPARE);
        of_length(&mut self.scales, lanes * groups);
        of_length(&mut self.starts, lanes * groups);
    }

    /// Rounds `tokens`, rows that may lie anywhere, as columns of the matrix from column `from` on, the first of a group: its rows
    /// from `row` on, the first of a panel.
    pub(super) fn round_tokens(&mut self, eight: Eight, [row, from]: [usize; 2], tokens: &[&[f32]]) {
        let which = (from..from + tokens.len(), self.depth);
        let rows = row..row + tokens.first().map_or(0, |token| token.len());
        self.fill((rows, tokens.len()), |first, out| round_tokens(eight, tokens, which.clone(), first, out));
    }

    /// Has `panels` write so many columns of those of some rows, which they are told to begin so far behind the first of.
    fn fill(&mut self, (rows, cols): (Range<usize>, usize), panels: impl Fn(usize, Out<'_>) + Sync) {
        let (per_row, groups) = (row_words(self.depth), groups(self.depth));
        if rows.len() * cols == 0 {
            return;
        }
        let each = TOGETHER * LANES;
        let part = |per_row: usize| rows.start * per_row..rows.end.next_multiple_of(LANES) * per_row;
        let words = &mut from_line(&mut self.words)[part(per_row)];
        let (scales, starts) = (&mut self.scales[part(groups)], &mut self.starts[part(groups)]);
        if rows.len() * cols <= FEW {
            let params = scales.chunks_mut(each * groups).zip(starts.chunks_mut(each * groups));
            let tasks = words.chunks_mut(each * per_row).zip(params).enumerate();
            return tasks.for_each(|(i, (words, (scales, starts)))| panels(i * each, Out { words, scales, starts }));
        }
        let params = scales.par_chunks_mut(each * groups).zip(starts.par_chunks_mut(each * groups));
        let tasks = words.par_chunks_mut(each * per_row).zip(params).enumerate();
        tasks.for_each(|(i, (words, (scales, starts)))| panels(i * each, Out { words, scales, starts }));
    }

    /// The matrix.
    pub(super) fn matrix(&self) -> Eights<'_> {
        let words = &self.words[line_start(&self.words)..][..self.words.len().saturating_sub(SPARE)];
        Eights { rows: self.rows, depth: self.depth, words, scales: &self.scales, starts: &self.starts }
    }
}

#[cfg(target_arch = "x86_64")]
fn round_panels(eight: Eight, matrix: View<'_, f32>, first: usize, out: Out<'_>) {
    avx512::round(eight, matrix, first, out);
}

#[cfg(not(target_arch = "x86_64"))]
fn round_panels(eight: Eight, _: View<'_, f32>, _: usize, _: Out<'_>) {
    eight.never()
}

#[cfg(target_arch = "x86_64")]
fn round_tokens(eight: Eight, tokens: &[&[f32]], which: (Range<usize>, usize), first: usize, out: Out<'_>) {
    avx512::round_tokens(eight, tokens, which, first, out);
}

#[cfg(not(target_arch = "x86_64"))]
fn round_tokens(eight: Eight, _: &[&[f32]], _: (Range<usize>, usize), _: usize, _: Out<'_>) {
    eight.never()
}

/// As that of bfloat16.
pub(super) fn multiply(
    eight: Eight,
    sides: &[(Eights<'_>, Eights<'_>)],
    (old, diagonal): (Old, usize),
    c: &mut Output<'_>,
) {
    assert!(sides.iter().all(|(a, b)| a.depth == b.depth && [a.rows, b.rows] == c.shape()), "matrix shapes");
    #[cfg(target_arch = "x86_64")]
    {
        // There is no product to put there.
        if old == Old::Goes && sides.iter().all(|(a, _)| a.depth == 0) {
            c.fill(std::mem::MaybeUninit::new(0.0));
        }
        let mut old = old;
        for (a, b) in sides.iter().filter(|(a, _)| a.depth > 0) {
            avx512::gemm(eight, *a, *b, (old, diagonal), c);
            old = Old::Counts;
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = (old, diagonal);
        eight.never()
    }
}
