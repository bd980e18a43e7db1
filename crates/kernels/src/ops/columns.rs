//! Columns of sixteen rows rounded to integers one after another, each compensating for the errors of those before it.
//!
//! Rows share nothing, so a column of sixteen is worked at a time. Nothing is fused, and every number is that of
//! [`Grid::nearest`](bitmill_scheme::Grid::nearest) and of the row by itself, so each instruction set gives the same bits.

#[cfg(target_arch = "x86_64")]
mod avx512;

use crate::Level;
use crate::level::at_level;
use std::ops::Range;

/// Rows that are worked together.
pub const ROWS: usize = 16;
/// 1.5·2²³: what is added to it is rounded to a whole number, which the lowest bits then are.
const SHIFT: f32 = 12_582_912.0;

/// A column of [`ROWS`] rows.
pub type Column<T> = [T; ROWS];

/// What columns are rounded by.
#[derive(Debug, Clone, Copy)]
pub struct ByColumn<'a> {
    /// The largest code.
    pub most: f32,
    /// Scale and zero point of each row.
    pub scales: Column<f32>,
    /// The code of zero.
    pub zeros: Column<f32>,
    /// Of the error of column k, entry `k · stride + j` is what column j, which is after it, makes up for.
    pub feedback: &'a [f32],
    /// How far apart these are.
    pub stride: usize,
}

/// Columns of some rows on their way.
#[derive(Debug)]
pub struct Columns<'a> {
    /// The weights.
    pub weights: &'a [Column<f32>],
    /// What they should be, given all columns before them.
    pub targets: &'a mut [Column<f32>],
    /// What they become.
    pub codes: &'a mut [Column<u8>],
    /// How much more that is than the weights.
    pub errors: &'a mut [Column<f32>],
}

/// Rounds the columns `which`, and takes what their errors cost off the targets of all that follow.
///
/// # Panics
/// When lengths do not fit: a caller's bug.
pub fn round_columns(level: Level, by: &ByColumn<'_>, which: Range<usize>, columns: &mut Columns<'_>) {
    let count = columns.weights.len();
    let lengths = [columns.targets.len(), columns.codes.len(), columns.errors.len()];
    assert!(lengths == [count; 3] && which.end <= count, "columns of all");
    assert!(which.is_empty() || by.feedback.len() >= (which.end - 1) * by.stride + count, "feedback of all columns");
    match level {
        // What a compiler makes of the definition there gathers columns instead of rows.
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the level's token proves AVX-512.
        Level::Avx512(_) | Level::Amx(_) => unsafe { avx512::round(by, which, columns) },
        level => at_level!(level, round, (by: &ByColumn<'_>, which: Range<usize>, columns: &mut Columns<'_>)),
    }
}

#[inline(always)]
fn round(by: &ByColumn<'_>, which: Range<usize>, columns: &mut Columns<'_>) {
    let count = columns.weights.len();
    for k in which {
        let (now, rest) = columns.targets[k..].split_at_mut(1);
        let (now, weights, errors) = (&now[0], &columns.weights[k], &mut columns.errors[k]);
        for i in 0..ROWS {
            let (zero, scale) = (by.zeros[i], by.scales[i]);
            let (least, most) = (-zero, by.most - zero);
            let level = now[i] / scale;
            let level = if level < least { least } else { level };
            let level = if level > most { most } else { level };
            let level = (level + SHIFT) - SHIFT;
            // A group of zeros may have made 0/0.
            let level = if level.is_nan() { 0.0 } else { level };
            columns.codes[k][i] = (level + zero + SHIFT).to_bits() as u8;
            errors[i] = level * scale - weights[i];
        }
        let errors = *errors;
        for (target, feedback) in rest.iter_mut().zip(&by.feedback[k * by.stride + k + 1..k * by.stride + count]) {
            for i in 0..ROWS {
                target[i] -= errors[i] * feedback;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bitmill_scheme::{Bits, Grid, GroupParams, IntGrid, ScaleType};

    #[test]
    fn every_level_rounds_rows_as_each_by_itself() {
        let (count, stride) = (40, 57);
        let value = |i: usize, by: f32| (i as f32 * by).sin();
        let weights: Vec<Column<f32>> =
            (0..count).map(|k| std::array::from_fn(|i| 3.0 * value(k * ROWS + i, 0.7))).collect();
        let feedback: Vec<f32> = (0..count * stride).map(|i| value(i, 0.3)).collect();
        for (bits, symmetric) in [(2, true), (4, true), (4, false), (8, false)] {
            let grid = IntGrid { bits: Bits::new(bits).unwrap(), symmetric, scale: ScaleType::F32 };
            let zero = |i: usize| if symmetric { grid.bits.middle() } else { (i * 7 % (1 << bits)) as u8 };
            // One scale is negative, one is what a group of zeros leaves.
            let scale = |i: usize| [0.3, -0.2, 0.0, 0.05][i % 4];
            let params: [GroupParams; ROWS] = std::array::from_fn(|i| GroupParams { scale: scale(i), zero: zero(i) });
            let by = ByColumn {
                most: f32::from(grid.bits.max_code()),
                scales: params.map(|p| p.scale),
                zeros: params.map(|p| f32::from(p.zero)),
                feedback: &feedback,
                stride,
            };
            let run = |level| {
                let mut weights = weights.clone();
                weights.iter_mut().for_each(|column| column[2] = 0.0);
                let (mut targets, mut codes, mut errors) =
                    (weights.clone(), vec![[0; ROWS]; count], vec![[0.0; ROWS]; count]);
                let mut columns =
                    Columns { weights: &weights, targets: &mut targets, codes: &mut codes, errors: &mut errors };
                round_columns(level, &by, 0..30, &mut columns);
                (targets, codes, errors)
            };
            let (targets, codes, errors) = run(Level::best());
            for (i, p) in params.iter().enumerate() {
                let w: Vec<f32> = weights.iter().map(|column| if i == 2 { 0.0 } else { column[i] }).collect();
                let mut t = w.clone();
                for k in 0..30 {
                    let code = grid.nearest(t[k], *p);
                    let error = grid.value(code, *p) - w[k];
                    assert_eq!((codes[k][i], errors[k][i].to_bits()), (code, error.to_bits()), "{bits} {i} {k}");
                    (k + 1..count).for_each(|j| t[j] -= error * feedback[k * stride + j]);
                }
                let same = |(j, t): (usize, &f32)| targets[j][i].to_bits() == t.to_bits() || t.is_nan();
                assert!(t.iter().enumerate().all(same));
            }
            for level in Level::all() {
                let found = run(level);
                assert_eq!((found.1, format!("{:?}", found.2)), (codes.clone(), format!("{errors:?}")));
            }
        }
    }
}
