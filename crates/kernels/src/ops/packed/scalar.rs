//! The definition of a packed product, number by number.

use super::super::strips::Strip;
use super::{CHUNK, Packed, Rounded};

/// With rounded activations: integers within a chunk, then one multiply-add a chunk, and one a group.
pub(super) fn int8(w: &Packed<'_>, x: &Rounded<'_>, sums: &[f32], strip: &mut Strip<'_>) {
    let form = &w.form;
    let chunks = form.chunks();
    each(w, sums, strip, |token, row, group| {
        let mut sum = 0.0f32;
        for chunk in w.form.chunks_of(group) {
            let values = &x.values[(token * chunks + chunk) * CHUNK..][..CHUNK];
            let dot: i32 =
                (0..CHUNK).map(|i| i32::from(form.code(w.codes, row, chunk * CHUNK + i)) * i32::from(values[i])).sum();
            sum = (dot as f32).mul_add(x.scales[token * chunks + chunk], sum);
        }
        sum
    });
}

/// With activations as they are: one multiply-add a weight.
pub(super) fn full(w: &Packed<'_>, x: &[f32], sums: &[f32], strip: &mut Strip<'_>) {
    let form = &w.form;
    let width = form.chunks() * CHUNK;
    each(w, sums, strip, |token, row, group| {
        let cols = group * form.group..((group + 1) * form.group).min(width);
        let code = |col| f32::from(form.code(w.codes, row, col));
        cols.fold(0.0, |sum, col| code(col).mul_add(x[token * width + col], sum))
    });
}

/// Every output as scale · (Σ code·x − zero · Σ x), summed over the groups.
fn each(w: &Packed<'_>, sums: &[f32], strip: &mut Strip<'_>, dot: impl Fn(usize, usize, usize) -> f32) {
    let groups = w.form.groups();
    for token in 0..strip.tokens() {
        for row in strip.rows.clone() {
            let mut y = 0.0f32;
            for group in 0..groups {
                let i = w.form.param(row, group);
                let centred = (-w.zero(i)).mul_add(sums[token * groups + group], dot(token, row, group));
                y = centred.mul_add(w.scales.at(i), y);
            }
            strip.put(token, row, &[y]);
        }
    }
}
