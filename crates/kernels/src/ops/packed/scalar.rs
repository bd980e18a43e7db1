//! The definition of a packed product, number by number.

use super::super::strips::Strip;
use super::{CHUNK, Packed, Rounded};

/// With rounded activations: integers within a piece, then one multiply-add a piece, and one a span.
pub(super) fn int8(w: &Packed<'_>, x: &Rounded<'_>, strip: &mut Strip<'_>) {
    let (form, width) = (&w.form, w.form.chunks() * CHUNK);
    for token in 0..strip.tokens() {
        let (values, scales) = (&x.values[token * width..][..width], &x.scales[token * form.spans()..]);
        for row in strip.rows.clone() {
            let mut y = 0.0f32;
            for (span, scale) in scales.iter().enumerate().take(form.spans()) {
                let mut sum = 0.0f32;
                for piece in form.pieces_of(span) {
                    let i = form.param(row, piece.start / form.group_chunks());
                    let code = |col| i32::from(form.code(w.codes, row, col)) - w.zero(i) as i32;
                    let dot: i32 =
                        (piece.start * CHUNK..piece.end * CHUNK).map(|col| code(col) * i32::from(values[col])).sum();
                    sum = (dot as f32).mul_add(w.scales.at(i), sum);
                }
                y = sum.mul_add(*scale, y);
            }
            strip.put(token, row, &[y]);
        }
    }
}

/// With activations as they are: one multiply-add a weight, and of every group scale · (Σ code·x − zero · Σ x).
pub(super) fn full(w: &Packed<'_>, x: &[f32], sums: &[f32], strip: &mut Strip<'_>) {
    let form = &w.form;
    let (width, groups) = (form.chunks() * CHUNK, form.groups());
    for token in 0..strip.tokens() {
        for row in strip.rows.clone() {
            let mut y = 0.0f32;
            for group in 0..groups {
                let i = form.param(row, group);
                let cols = group * form.group..((group + 1) * form.group).min(width);
                let code = |col| f32::from(form.code(w.codes, row, col));
                let dot = cols.fold(0.0f32, |sum, col| code(col).mul_add(x[token * width + col], sum));
                let centred = (-w.zero(i)).mul_add(sums[token * groups + group], dot);
                y = centred.mul_add(w.scales.at(i), y);
            }
            strip.put(token, row, &[y]);
        }
    }
}
