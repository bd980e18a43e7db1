//! Coordinate descent over codes that are chosen one by one.

use bitmill_kernels::{Level, axpy};
use bitmill_scheme::{Affine, BlockForm, Grid, GroupParams, Quantized};
use std::ops::Range;

/// Columns whose moves are seen at once among themselves, and by all others when the last of them has moved: their rows of H
/// are in the second cache then, whichever row of the matrix asks for them.
const BLOCK: usize = 128;
/// Columns of those rows that are in that cache at a time.
const STRIP: usize = 1024;

/// Where the values of a matrix may lie, column by column.
pub(super) trait Values: Sync {
    /// What decides the values of one weight.
    type Local: Copy;
    /// Neighbouring columns, from a multiple of it on, whose values lie alike.
    fn alike(&self) -> usize;
    fn local(&self, row: usize, col: usize) -> Self::Local;
    fn nearest(&self, x: f32, local: Self::Local) -> u8;
    fn value(&self, code: u8, local: Self::Local) -> f32;
}

pub(super) struct GroupValues<'a, G> {
    pub(super) q: &'a Quantized,
    pub(super) grid: G,
}

impl<G: Grid + Sync> Values for GroupValues<'_, G> {
    type Local = GroupParams;

    fn alike(&self) -> usize {
        if self.q.group_of.is_empty() { self.q.scheme.group_len(self.q.shape[1]) } else { 1 }
    }

    #[inline]
    fn local(&self, row: usize, col: usize) -> GroupParams {
        self.q.params(row, self.q.group(col))
    }

    #[inline]
    fn nearest(&self, x: f32, local: GroupParams) -> u8 {
        self.grid.nearest(x, local)
    }

    #[inline]
    fn value(&self, code: u8, local: GroupParams) -> f32 {
        self.grid.value(code, local)
    }
}

pub(super) struct BlockValues<'a> {
    form: &'a BlockForm,
    /// Sub-blocks of a row.
    subs: usize,
    affine: Vec<Affine>,
}

impl<'a> BlockValues<'a> {
    pub(super) fn new(form: &'a BlockForm, q: &Quantized) -> Self {
        let [rows, cols] = q.shape;
        let subs = cols / form.sub;
        let of = |i: usize| {
            let (row, sub) = (i / subs, i % subs);
            form.affine(&q.block(form, row, sub / form.subs()), sub % form.subs())
        };
        BlockValues { form, subs, affine: (0..rows * subs).map(of).collect() }
    }
}

impl Values for BlockValues<'_> {
    type Local = Affine;

    fn alike(&self) -> usize {
        self.form.sub
    }

    #[inline]
    fn local(&self, row: usize, col: usize) -> Affine {
        self.affine[row * self.subs + col / self.form.sub]
    }

    #[inline]
    fn nearest(&self, x: f32, local: Affine) -> u8 {
        self.form.nearest(x, local)
    }

    #[inline]
    fn value(&self, code: u8, local: Affine) -> f32 {
        self.form.value(code, local)
    }
}

/// A code that moved: its column, and by how much its value did.
type Move = (usize, f32);

/// Descent of rows from `first` on: their `codes`, and G = (Ŵ−W)·H, which follows them. Returns the number of codes changed.
pub(super) fn descend_rows<V: Values>(
    values: &V,
    (h, diagonal): (&[f32], &[f32]),
    sweeps: u32,
    first: usize,
    codes: &mut [u8],
    g: &mut [f32],
) -> usize {
    let (n, level) = (diagonal.len(), Level::best());
    let mut changed = 0;
    // Rows in which something moved in the sweep before.
    let mut rows: Vec<usize> = (0..codes.len() / n).collect();
    let (mut moves, mut of_row): (Vec<Move>, Vec<(usize, Range<usize>)>) = (Vec::new(), Vec::new());
    for _ in 0..sweeps {
        let mut moved = vec![false; codes.len() / n];
        for from in (0..n).step_by(BLOCK) {
            let block = from..n.min(from + BLOCK);
            moves.clear();
            of_row.clear();
            for &row in &rows {
                let start = moves.len();
                let at = row * n + block.start..row * n + block.end;
                let part = Part { values, level, h, diagonal, row: first + row, columns: block.clone() };
                part.descend(&mut codes[at.clone()], &mut g[at], &mut moves);
                if moves.len() > start {
                    moved[row] = true;
                    of_row.push((row, start..moves.len()));
                }
            }
            changed += moves.len();
            for strip in [0..block.start, block.end..n].into_iter().flat_map(strips) {
                for (row, which) in &of_row {
                    let g = &mut g[row * n + strip.start..row * n + strip.end];
                    for &(k, step) in &moves[which.clone()] {
                        axpy(level, step, &h[k * n + strip.start..k * n + strip.end], g);
                    }
                }
            }
        }
        rows.retain(|&row| moved[row]);
        if rows.is_empty() {
            break;
        }
    }
    changed
}

/// Columns in strips.
fn strips(columns: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    columns.clone().step_by(STRIP).map(move |from| from..columns.end.min(from + STRIP))
}

/// A block of columns in one row.
struct Part<'a, V> {
    values: &'a V,
    level: Level,
    h: &'a [f32],
    diagonal: &'a [f32],
    row: usize,
    columns: Range<usize>,
}

impl<V: Values> Part<'_, V> {
    /// Moves each code of the block once and notes the `moves`; `g` of the block follows them.
    fn descend(&self, codes: &mut [u8], g: &mut [f32], moves: &mut Vec<Move>) {
        let (n, values, Range { start, end }) = (self.diagonal.len(), self.values, self.columns.clone());
        let mut from = start;
        while from < end {
            let local = values.local(self.row, from);
            let to = end.min((from + 1).next_multiple_of(values.alike()));
            for k in from..to {
                let i = k - start;
                let (curvature, old) = (self.diagonal[k], values.value(codes[i], local));
                let code = values.nearest(old - g[i] / curvature, local);
                if code == codes[i] {
                    continue;
                }
                let step = values.value(code, local) - old;
                // The nearest value to the minimum of a parabola lowers it, except for ties and rounding of G.
                if 2.0 * g[i] * step + curvature * step * step >= 0.0 {
                    continue;
                }
                codes[i] = code;
                moves.push((k, step));
                axpy(self.level, step, &self.h[k * n + start..k * n + end], g);
            }
            from = to;
        }
    }
}
