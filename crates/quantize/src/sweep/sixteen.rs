//! Rows of integers, sixteen at a time: a column of them is rounded by one instruction where one row's would take turns.

use super::{Chunk, SweepGrid};
use bitmill_kernels::{ByColumn, Column, Columns, Level, ROWS, round_columns};
use bitmill_scheme::IntGrid;

/// Memory for sixteen rows of a block, column by column.
#[derive(Default)]
pub(super) struct Memory {
    weights: Vec<Column<f32>>,
    targets: Vec<Column<f32>>,
    codes: Vec<Column<u8>>,
    errors: Vec<Column<f32>>,
    part: Vec<f32>,
}

impl<G: SweepGrid> Chunk<'_, G> {
    /// [`Chunk::round_block`] of up to sixteen rows from `first` on, whose targets are `target`, onto `grid`.
    pub(super) fn round_sixteen(
        &mut self,
        (grid, first, start): (IntGrid, usize, usize),
        target: &[f32],
        (codes, params): (&mut [u8], &mut [G::Params]),
        fit: bool,
        memory: &mut Memory,
    ) {
        let (n, groups, group_len) = (self.n, self.groups, self.what.group_len);
        let rows = codes.len() / n;
        let width = target.len() / rows;
        let Memory { weights, targets, codes: found, errors, part } = memory;
        weights.clear();
        targets.clear();
        let column = |of: &[f32], stride: usize, at: usize| {
            std::array::from_fn(|i| if i < rows { of[i * stride + at] } else { 0.0 })
        };
        weights.extend((0..width).map(|k| column(&self.w[first * n + start..], n, k)));
        targets.extend((0..width).map(|k| column(target, width, k)));
        found.resize(width, [0; ROWS]);
        errors.resize(width, [0.0; ROWS]);
        let mut from = 0;
        while from < width {
            let at = start + from;
            let to = if fit { width.min(from + group_len - at % group_len) } else { width };
            let group = if fit { self.what.order.columns[at] as usize / group_len } else { 0 };
            let (mut scales, mut zeros) = ([1.0; ROWS], [0.0; ROWS]);
            for i in 0..rows {
                let own = &mut params[i * groups + group];
                if fit && self.what.fixed.is_none() {
                    part.clear();
                    part.extend(targets[from..to].iter().map(|column| column[i]));
                    *own = self.what.grid.fit(self.part(part, at), self.what.search);
                }
                [scales[i], zeros[i]] = self.what.grid.line(own);
            }
            let by = ByColumn {
                most: f32::from(grid.bits.max_code()),
                scales,
                zeros,
                feedback: &self.what.factor.unit()[start * n + start..],
                stride: n,
            };
            let mut columns = Columns { weights, targets, codes: found, errors };
            round_columns(Level::best(), &by, from..to, &mut columns);
            from = to;
        }
        for (k, (found, errors)) in found.iter().zip(errors.iter()).enumerate() {
            let column = self.what.order.columns[start + k] as usize;
            for i in 0..rows {
                codes[i * n + column] = found[i];
                self.delta[(first + i) * n + start + k] = errors[i];
            }
        }
    }
}
