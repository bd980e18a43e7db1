//! What a gated MLP makes of its input, some columns at a time.

#[cfg(target_arch = "x86_64")]
use super::brain::gate_tiles;
use super::matrix::ViewMut;
use super::short::{Panels, short_part};
use super::softmax::silu_mul;
use crate::Level;
use std::ops::Range;

/// Columns that come together: two lines of the cache of each row in bfloat16.
const STRIP: usize = 64;

/// `silu(x·gateᵀ) · (x·upᵀ)` for `x: [m, depth]` and `gate, up: [n, depth]`, on the calling thread, in strips of columns from the left
/// to the right: `take` gets the columns of each, and its entries, `[m, columns]`. All entries are those of
/// [`short_outer`](crate::short_outer) and [`silu_mul`], but where `m` is small, strips are in the first cache when they are made and
/// when they are taken. `memory` is for the next.
///
/// # Panics
/// When the shapes do not chain, or the sides are not rounded alike: a caller's bug.
pub fn gated_strips(
    x: &Panels,
    [gate, up]: [&Panels; 2],
    memory: &mut Vec<f32>,
    take: &mut dyn FnMut(Range<usize>, &[f32]),
) {
    let ([rows, _], [cols, _]) = (x.shape(), gate.shape());
    assert_eq!(gate.shape(), up.shape(), "a gate for every column");
    memory.resize((2 * rows * STRIP).max(memory.len()), 0.0);
    for from in (0..cols).step_by(STRIP) {
        let columns = from..cols.min(from + STRIP);
        let width = columns.len();
        #[cfg(target_arch = "x86_64")]
        if let (Some((amx, x)), Some((_, gate)), Some((_, up))) = (x.tiled(), gate.tiled(), up.tiled()) {
            gate_tiles(amx, x, [gate, up], columns.clone(), &mut memory[..rows * width]);
            take(columns, &memory[..rows * width]);
            continue;
        }
        let (gates, rest) = memory.split_at_mut(rows * width);
        let ups = &mut rest[..rows * width];
        for (weight, out) in [(gate, &mut *gates), (up, &mut *ups)] {
            short_part(x, weight, columns.clone(), usize::MAX, &mut ViewMut::new(out, rows, width, width));
        }
        silu_mul(Level::best(), gates, ups);
        take(columns, gates);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Short, View, short_outer};

    #[test]
    fn strips_are_the_columns_of_the_whole() {
        for (m, n, depth) in [(1, 1, 1), (33, 70, 40), (128, 96, 256)] {
            let values = |count: usize, by: f32| (0..count).map(|i| (i as f32 * by).sin()).collect::<Vec<f32>>();
            let (x, gate, up) = (values(m * depth, 0.7), values(n * depth, 0.3), values(n * depth, 0.9));
            for short in Short::all() {
                let right = |w: &[f32]| Panels::right(short, View::new(w, n, depth, depth));
                let (x, gate, up) = (Panels::left(short, View::new(&x, m, depth, depth)), right(&gate), right(&up));
                let mut whole = short_outer(&x, &gate);
                silu_mul(Level::best(), &mut whole, &short_outer(&x, &up));
                let (mut found, mut next) = (vec![f32::NAN; m * n], 0);
                gated_strips(&x, [&gate, &up], &mut vec![7.0; 3], &mut |columns, strip| {
                    assert_eq!(std::mem::replace(&mut next, columns.end), columns.start);
                    for (row, strip) in found.chunks_exact_mut(n).zip(strip.chunks_exact(columns.len())) {
                        row[columns.clone()].copy_from_slice(strip);
                    }
                });
                assert_eq!((found, next), (whole, n));
            }
        }
    }
}
