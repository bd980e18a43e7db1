//! Dense products of what is rounded to fewer bits than f32 has, with sums in f32, whatever it is rounded to.
//!
//! Each side is rounded and laid out once ([`Panels`]) and may serve many products.

use super::bfloat::append_f32;
use super::brain::{self, Brained, LANES, Old};
use super::eight::{self, Eights};
use super::matrix::{Output, TOKENS, View, ViewMut};
use crate::Level;
#[cfg(target_arch = "x86_64")]
use crate::level::Amx;
use crate::level::{Brain, Eight};
use half::bf16;
use rayon::prelude::*;
use std::cell::Cell;
use std::collections::VecDeque;
use std::ops::Range;

/// What products round their sides to, and the proof that this CPU has the instructions for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Short {
    /// bfloat16: a relative error of at most 2⁻⁸.
    Bf16(Brain),
    /// Eight bits and a scale for 128 neighbours: an error of at most a 254th of the largest of them.
    Int8(Eight),
}

impl Short {
    /// Every way of this CPU.
    #[must_use]
    pub fn all() -> Vec<Self> {
        Brain::all().into_iter().map(Short::Bf16).chain(Eight::here().map(Short::Int8)).collect()
    }
}

/// Columns may be put apart where their number is a multiple of this.
pub const APART: usize = 128;

/// A matrix `[rows, depth]` that is rounded and laid out for products.
#[derive(Debug)]
pub struct Panels(Kept);

#[derive(Debug)]
enum Kept {
    Bf16(Brain, brain::Panels),
    Int8(Eight, eight::Panels),
}

impl Panels {
    /// A matrix without entries.
    #[must_use]
    pub fn empty(short: Short) -> Self {
        Panels(match short {
            Short::Bf16(brain) => Kept::Bf16(brain, brain::Panels::default()),
            Short::Int8(eight) => Kept::Int8(eight, eight::Panels::default()),
        })
    }

    /// The same in `memory` of others, if those are rounded alike.
    #[must_use]
    pub fn within(memory: Option<Panels>, short: Short) -> Self {
        memory.filter(|panels| panels.short() == short).unwrap_or_else(|| Panels::empty(short))
    }

    /// Rounds `matrix`, in parallel over its panels.
    #[must_use]
    pub fn right(short: Short, matrix: View<'_, f32>) -> Self {
        let mut panels = Panels::empty(short);
        match &mut panels.0 {
            Kept::Bf16(brain, panels) => panels.round(*brain, matrix),
            Kept::Int8(eight, panels) => panels.round(*eight, matrix),
        }
        panels
    }

    /// [`Panels::right`] of what is only ever the left side of products, and of several: what some CPUs ask of a left side is
    /// then done once.
    #[must_use]
    pub fn left(short: Short, matrix: View<'_, f32>) -> Self {
        let mut panels = Panels::empty(short);
        panels.refill_left(matrix);
        panels
    }

    /// [`Panels::left`] in the memory of what was there.
    pub fn refill_left(&mut self, matrix: View<'_, f32>) {
        match &mut self.0 {
            Kept::Bf16(brain, panels) => panels.round_left(*brain, matrix),
            Kept::Int8(eight, panels) => panels.round(*eight, matrix),
        }
    }

    /// [`Panels::refill_left`] of rows that are in bfloat16 already.
    ///
    /// # Panics
    /// Where rows do not lie in one piece: a caller's bug.
    pub fn refill_left_rounded(&mut self, matrix: View<'_, bf16>) {
        match &mut self.0 {
            Kept::Bf16(brain, panels) => panels.lay_left(*brain, matrix),
            Kept::Int8(eight, panels) => {
                let mut rows = Vec::with_capacity(matrix.rows() * matrix.cols());
                (0..matrix.rows()).for_each(|i| append_f32(Level::best(), matrix.row(i), &mut rows));
                panels.round(*eight, View::new(&rows, matrix.rows(), matrix.cols(), matrix.cols()));
            }
        }
    }

    /// Rounds the transpose of `tokens`, rows of width `rows` that may lie anywhere, in the memory of what was there.
    ///
    /// # Panics
    /// When a token is of another width: a caller's bug.
    pub fn refill(&mut self, tokens: &[&[f32]], rows: usize) {
        self.reshape([rows, tokens.len()]);
        self.put(0, tokens);
    }

    /// Makes room for a matrix `[rows, depth]`, in the memory of what was there. What it holds is not said before it is put
    /// there.
    pub fn reshape(&mut self, shape: [usize; 2]) {
        match &mut self.0 {
            Kept::Bf16(_, panels) => panels.reshape(shape, false),
            Kept::Int8(_, panels) => panels.reshape(shape),
        }
    }

    /// Rounds `tokens`, rows that may lie anywhere, as the columns of the matrix from column `from` on.
    ///
    /// # Panics
    /// When a token is of another width, there is no room for so many, or columns that share a scale are put apart ([`APART`]):
    /// a caller's bug.
    pub fn put(&mut self, from: usize, tokens: &[&[f32]]) {
        let [rows, _] = self.shape();
        assert!(tokens.iter().all(|token| token.len() == rows), "tokens of one width");
        self.put_some(0, from, tokens);
    }

    /// [`Panels::put`] of some entries of every token alone, which become rows from `row` on: the first of 16, and so many or all
    /// that are left.
    ///
    /// # Panics
    /// As [`Panels::put`], and where there are no such rows.
    pub fn put_some(&mut self, row: usize, from: usize, tokens: &[&[f32]]) {
        let ([rows, depth], to) = (self.shape(), from + tokens.len());
        let some = tokens.first().map_or(0, |token| token.len());
        assert!(tokens.iter().all(|token| token.len() == some), "tokens of one width");
        let ends = [row, row + some];
        assert!(ends[1] <= rows && ends.iter().all(|at| at.is_multiple_of(LANES) || *at == rows), "rows together");
        assert!(
            to <= depth && [from, to].iter().all(|at| at.is_multiple_of(APART) || *at == depth),
            "columns together"
        );
        match &mut self.0 {
            Kept::Bf16(brain, panels) => panels.round_tokens(*brain, [row, from], tokens),
            Kept::Int8(eight, panels) => panels.round_tokens(*eight, [row, from], tokens),
        }
    }

    /// Rows and columns.
    #[must_use]
    pub fn shape(&self) -> [usize; 2] {
        match self.matrix() {
            Matrix::Bf16(_, matrix) => matrix.shape(),
            Matrix::Int8(_, matrix) => matrix.shape(),
        }
    }

    /// Whether it is rounded so.
    pub(super) fn is(&self, short: Short) -> bool {
        self.short() == short
    }

    /// Makes it a left side of so many rows and columns, which hold anything, and returns its rows, where left sides are laid out row
    /// by row.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn turned_rows(&mut self, shape: [usize; 2]) -> Option<brain::TurnedRows<'_>> {
        match &mut self.0 {
            Kept::Bf16(brain, panels) => panels.turned_rows(*brain, shape),
            Kept::Int8(..) => None,
        }
    }

    /// The matrix, where products of it are by tiles, and what proves that there are.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn tiled(&self) -> Option<(Amx, Brained<'_>)> {
        match &self.0 {
            Kept::Bf16(brain, panels) => brain.amx().map(|amx| (amx, panels.matrix())),
            Kept::Int8(..) => None,
        }
    }

    fn short(&self) -> Short {
        match &self.0 {
            Kept::Bf16(brain, _) => Short::Bf16(*brain),
            Kept::Int8(eight, _) => Short::Int8(*eight),
        }
    }

    fn matrix(&self) -> Matrix<'_> {
        match &self.0 {
            Kept::Bf16(brain, panels) => Matrix::Bf16(*brain, panels.matrix()),
            Kept::Int8(eight, panels) => Matrix::Int8(*eight, panels.matrix()),
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Matrix<'a> {
    Bf16(Brain, Brained<'a>),
    Int8(Eight, Eights<'a>),
}

impl Matrix<'_> {
    /// Rows, the first of which is that of a panel.
    fn between(self, rows: Range<usize>) -> Self {
        match self {
            Matrix::Bf16(brain, matrix) => Matrix::Bf16(brain, matrix.between(rows.start, rows.end)),
            Matrix::Int8(eight, matrix) => Matrix::Int8(eight, matrix.between(rows.start, rows.end)),
        }
    }
}

/// `c ← Σ a·bᵀ` or `c ← c + Σ a·bᵀ` over pairs of sides that are all rounded alike, where only entries `(i, j)` with
/// `j ≤ diagonal + i` are asked for; others may be computed, or not.
fn multiply<'a>(sides: &[(Matrix<'a>, Matrix<'a>)], what: (Old, usize), c: &mut Output<'_>) {
    let differ = || -> ! { panic!("sides that are rounded alike") };
    match sides.first() {
        None => {}
        Some((Matrix::Bf16(brain, _), _)) => {
            let of = |side: &(Matrix<'a>, Matrix<'a>)| match *side {
                (Matrix::Bf16(_, a), Matrix::Bf16(_, b)) => (a, b),
                _ => differ(),
            };
            match sides {
                [side] => brain::multiply(*brain, &[of(side)], what, c),
                sides => brain::multiply(*brain, &sides.iter().map(of).collect::<Vec<_>>(), what, c),
            }
        }
        Some((Matrix::Int8(eight, _), _)) => {
            let of = |side: &(Matrix<'a>, Matrix<'a>)| match *side {
                (Matrix::Int8(_, a), Matrix::Int8(_, b)) => (a, b),
                _ => differ(),
            };
            eight::multiply(*eight, &sides.iter().map(of).collect::<Vec<_>>(), what, c);
        }
    }
}

/// `c ← c + a·bᵀ` for the rows `rows` of `a: [m, depth]`, `b: [n, depth]` and `c: [rows, n]`, on the calling thread. The
/// first row is a multiple of 16.
///
/// # Panics
/// When the shapes do not chain, the sides are not rounded alike, or one was made as the left one for other use: a caller's
/// bug.
pub fn short_gemm(a: &Panels, rows: Range<usize>, b: &Panels, c: &mut ViewMut<'_, f32>) {
    multiply(&[(a.matrix().between(rows), b.matrix())], (Old::Counts, usize::MAX), &mut c.output());
}

/// `c ← a·bᵀ`, otherwise as [`short_gemm`]. What `c` held is not even read: fresh memory is not touched twice.
///
/// # Panics
/// As [`short_gemm`].
pub fn short_product(a: &Panels, rows: Range<usize>, b: &Panels, c: &mut ViewMut<'_, f32>) {
    multiply(&[(a.matrix().between(rows), b.matrix())], (Old::Goes, usize::MAX), &mut c.output());
}

/// `c ← Σ a·bᵀ` over pairs of sides `[m, depth]` and `[n, depth]`, otherwise as [`short_product`].
///
/// # Panics
/// As [`short_gemm`].
pub(super) fn short_sum(sides: &[(&Panels, &Panels)], c: &mut ViewMut<'_, f32>) {
    let sides: Vec<_> = sides.iter().map(|(a, b)| (a.matrix(), b.matrix())).collect();
    multiply(&sides, (Old::Goes, usize::MAX), &mut c.output());
}

/// `a·bᵀ`, `[m, n]` for `a: [m, depth]` and `b: [n, depth]`, in memory of its own that is not cleared first; by all threads.
///
/// # Panics
/// As [`short_gemm`].
#[must_use]
pub fn short_outer(a: &Panels, b: &Panels) -> Vec<f32> {
    let ([rows, _], [cols, _]) = (a.shape(), b.shape());
    let mut c = Vec::with_capacity(rows * cols);
    let fresh = &mut c.spare_capacity_mut()[..rows * cols];
    fresh.par_chunks_mut((BAND * cols).max(1)).enumerate().for_each(|(i, c)| {
        let (from, height) = (i * BAND, c.len() / cols);
        let c = &mut Output::new(c, height, cols, cols);
        multiply(&[(a.matrix().between(from..from + height), b.matrix())], (Old::Goes, usize::MAX), c);
    });
    // SAFETY: there is room for them, and a product whose old entries go writes all entries.
    unsafe { c.set_len(rows * cols) };
    c
}

/// [`short_product`] of all of `a` with the rows `which` of `b`, the first of which is a multiple of 16, where of `c` only entries
/// `(i, j)` with `j ≤ diagonal + i` are asked for: what the others become is not said.
///
/// # Panics
/// As [`short_gemm`].
pub(super) fn short_part(a: &Panels, b: &Panels, which: Range<usize>, diagonal: usize, c: &mut ViewMut<'_, f32>) {
    multiply(&[(a.matrix(), b.matrix().between(which))], (Old::Goes, diagonal), &mut c.output());
}

/// Rows that a task of a product computes: fewer would go through the right side too often.
const BAND: usize = 512;
/// Bytes of rounded entries that are made at a time, where those are more tokens than each pass through H should be for.
const ROUNDED: usize = 4 << 20;

thread_local! {
    /// What this thread rounded last for a [`short_syrk`]: memory for the next.
    static ROUNDED_LAST: Cell<Option<Panels>> = const { Cell::new(None) };
}

/// [`syrk`](crate::syrk) of what `x` is when rounded, likewise without what lies above the diagonal. The tokens come in parts that
/// may lie anywhere; results do not depend on how they are parted.
///
/// # Panics
/// When the lengths do not fit `n`: a caller's bug.
pub fn short_syrk(short: Short, x: &[&[f32]], n: usize, h: &mut [f32]) {
    assert!(n > 0 && x.iter().all(|part| part.len().is_multiple_of(n)) && h.len() == n * n, "syrk shapes");
    // The faster products are, the more of them it takes for what H's own way from memory and back costs not to count.
    let (bytes, least) = match short {
        Short::Bf16(_) => (2, TOKENS),
        Short::Int8(_) => (1, 2 * TOKENS),
    };
    let at_once = (ROUNDED / bytes / n).next_multiple_of(TOKENS).max(least);
    let tokens: Vec<&[f32]> = x.iter().flat_map(|part| part.chunks_exact(n)).collect();
    let mut panels = Panels::within(ROUNDED_LAST.take(), short);
    for tokens in tokens.chunks(at_once) {
        panels.refill(tokens, n);
        panels_syrk(&[&panels], h);
    }
    ROUNDED_LAST.set(Some(panels));
}

/// The same of tokens that are rounded: `x` are the transposes of some, `[n, tokens]` each. Where each but the last has whole
/// multiples of 128 of them, results are those of [`short_syrk`] but for the order of sums.
///
/// # Panics
/// When shapes do not fit, or they are not rounded alike: a caller's bug.
pub fn panels_syrk(x: &[&Panels], h: &mut [f32]) {
    let Some(n) = x.first().map(|x| x.shape()[0]).filter(|&n| n > 0) else { return };
    assert!(x.iter().all(|x| x.shape()[0] == n) && h.len() == n * n, "syrk shapes");
    let x: Vec<Matrix<'_>> = x.iter().map(|x| x.matrix()).collect();
    // Few bands, since each goes through what is right of it: two for every thread. What they are changes no sum.
    let band = (n / (2 * rayon::current_num_threads())).next_multiple_of(2 * LANES).clamp(64, BAND);
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
            let sides: Vec<_> = x.iter().map(|x| (x.between(from..to), x.between(0..to))).collect();
            multiply(&sides, (Old::Counts, from), &mut ViewMut::new(rows, height, to, n).output());
        }
    });
}

/// The products of some rounded tokens with themselves: `h ← x·xᵀ` for their transpose `x: [n, tokens]`, on and below the diagonal;
/// what lies above is not said. On the calling thread, for tokens few enough to be in a cache of its core.
///
/// # Panics
/// When `h` is not `[n, n]`: a caller's bug.
pub fn panels_square(x: &Panels, h: &mut [f32]) {
    let [n, _] = x.shape();
    assert_eq!(h.len(), n * n, "matrix shape");
    multiply(&[(x.matrix(), x.matrix())], (Old::Goes, 0), &mut ViewMut::new(h, n, n, n).output());
}

#[cfg(test)]
mod tests;
