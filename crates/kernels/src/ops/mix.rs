//! What attention makes of the values of keys: each query's mix of those of the keys that it sees.

#[cfg(target_arch = "x86_64")]
use super::brain::{can_mix, mix_tiles};
use super::matrix::ViewMut;
use super::short::{Panels, Short, short_part, short_sum};
use super::softmax::largest;
use super::weights::{WeightSums, attention_weights, over_sums};
use crate::Level;
use std::ops::Range;

/// Keys that are rounded together, and their values.
pub const KEYS: usize = 128;

/// Memory of a [`mix`], which may serve the next.
#[derive(Debug, Default)]
pub struct Mixing {
    scores: Vec<f32>,
    weights: Vec<Panels>,
    sums: Vec<WeightSums>,
    shifts: Vec<f32>,
    mixed: Vec<f32>,
}

/// What bounds products of a query, in place.
pub type Bound<'a> = &'a dyn Fn(&mut [f32]);

/// Exponents of two that products of queries with keys become.
#[derive(Clone, Copy)]
pub struct Exponents<'a> {
    /// What products, bounded where they are, are multiplied with.
    pub scale: f32,
    /// Whether all exponents are within 100 of zero. Others are shifted by the largest of each query.
    pub near: bool,
    /// What bounds products, if anything does.
    pub bound: Option<Bound<'a>>,
}

/// `Σ 2^e v / Σ 2^e` over the keys `seen[i]` for query i, where e are the exponents of products with keys, and powers are rounded for
/// their products with values. `queries: [rows, dim]` are a left side; keys come in blocks of [`KEYS`], of which the last may have
/// fewer: `keys[b]: [count, dim]` and `values[b]: [dim, count]`. Query i is the entry `i % group` of token `i / group`, where
/// `out: [tokens, group · dim]`. Each is to see a key: what it mixes is anything else.
///
/// # Panics
/// When shapes do not fit or sides are not rounded so, or a query sees what is no key: a caller's bug.
pub fn mix(
    short: Short,
    queries: &Panels,
    (keys, values): (&[Panels], &[Panels]),
    (seen, exponents): (&[Range<usize>], Exponents<'_>),
    memory: &mut Mixing,
    out: &mut ViewMut<'_, f32>,
) {
    let ([rows, dim], [tokens, width]) = (queries.shape(), out.shape());
    let group = width / dim.max(1);
    assert!(seen.len() == rows && tokens * group == rows && group * dim == width, "a place for every query");
    assert!(keys.len() == values.len(), "values of every key");
    let all = keys.last().map_or(0, |last| (keys.len() - 1) * KEYS + last.shape()[0]);
    for (b, (keys, values)) in keys.iter().zip(values).enumerate() {
        let count = KEYS.min(all - b * KEYS);
        assert!(keys.shape() == [count, dim] && values.shape() == [dim, count], "blocks of keys and values");
    }
    let end = seen.iter().map(|seen| seen.end).max().unwrap_or(0);
    assert!(end <= all && seen.iter().all(|seen| seen.start <= seen.end), "keys that there are");
    let Exponents { scale, near, bound } = exponents;
    #[cfg(target_arch = "x86_64")]
    if let Some((amx, queries)) = queries.tiled()
        && can_mix(dim)
        && bound.is_none()
    {
        let blocks = |b: usize| {
            [&keys[b], &values[b]].map(|panels| match panels.tiled() {
                Some((_, matrix)) => matrix,
                None => panic!("sides that are rounded alike"),
            })
        };
        return mix_tiles(amx, queries, &blocks, (seen, scale, near), (group, out));
    }
    let begin = seen.iter().map(|seen| seen.start).min().unwrap_or(0) / KEYS * KEYS;
    let blocks = begin / KEYS..end.div_ceil(KEYS);
    // Of all keys where the largest of a row is asked for, else of a block, which becomes weights in the first cache.
    let stride = if near { KEYS } else { blocks.len() * KEYS };
    memory.scores.resize((rows * stride).max(memory.scores.len()), 0.0);
    memory.mixed.resize((rows * dim).max(memory.mixed.len()), 0.0);
    memory.shifts.clear();
    memory.shifts.resize(rows, 0.0);
    memory.sums.clear();
    memory.sums.resize(rows, WeightSums::default());
    let more = memory.weights.len()..blocks.len();
    memory.weights.extend(more.map(|_| Panels::empty(short)));
    let Mixing { scores, weights, sums, shifts, mixed } = memory;
    let (weights, mixed) = (&mut weights[..blocks.len()], &mut mixed[..rows * dim]);
    // What row i sees of the keys from one on.
    let sees = |i: usize, from: usize, count: usize| {
        let place = |key: usize| key.saturating_sub(from).min(count);
        place(seen[i].start)..place(seen[i].end)
    };
    let products = |b: usize, scores: &mut [f32]| {
        let from = b * KEYS;
        let which = 0..keys[b].shape()[0].min(end - from);
        // Rows see no more than this lets them, if most of them less.
        let beyond = |(i, seen): (usize, &Range<usize>)| seen.end.saturating_sub(from + i + 1);
        let diagonal = seen.iter().enumerate().map(beyond).max().unwrap_or(0);
        let count = which.len();
        short_part(queries, &keys[b], which, diagonal, &mut ViewMut::new(scores, rows, count, stride));
        if let Some(bound) = bound {
            let rows = scores.chunks_mut(stride).take(rows);
            rows.enumerate().for_each(|(i, scores)| bound(&mut scores[sees(i, from, count)]));
        }
    };
    if !near {
        blocks.clone().for_each(|b| products(b, &mut scores[b * KEYS - begin..]));
        for (i, (scores, shift)) in scores.chunks_exact(stride.max(1)).zip(shifts.iter_mut()).enumerate() {
            *shift = scale * largest(Level::best(), &scores[sees(i, begin, stride)]);
        }
    }
    for (b, weights) in blocks.clone().zip(weights.iter_mut()) {
        let (from, count) = (b * KEYS, keys[b].shape()[0]);
        if near {
            products(b, scores);
        }
        let scores = if near { &mut *scores } else { &mut scores[from - begin..] };
        attention_weights(short, (scores, count, stride), (seen, from), (scale, shifts), weights, sums);
    }
    let sides: Vec<(&Panels, &Panels)> = weights.iter().zip(&values[blocks]).collect();
    short_sum(&sides, &mut ViewMut::new(mixed, rows, dim, dim));
    over_sums(Level::best(), mixed, dim, sums);
    for (i, mixed) in mixed.chunks_exact(dim.max(1)).enumerate() {
        if let Some(out) = out.part(i / group, i % group * dim, dim) {
            out.copy_from_slice(mixed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::View;
    use half::bf16;

    /// Rounded as sides are, where eight bits are not what they are rounded to.
    fn rounded(values: &[f32]) -> Vec<f32> {
        values.iter().map(|&v| bf16::from_f32(v).to_f32()).collect()
    }

    #[test]
    fn queries_mix_the_values_of_what_they_see() {
        let shapes =
            [(1, 1, 1, 32), (5, 1, 7, 64), (40, 2, 300, 64), (33, 3, 256, 32), (16, 1, 129, 96), (20, 4, 140, 6)];
        for (tokens, group, keys, dim) in shapes {
            let rows = tokens * group;
            let sample = |count: usize, by: f32| (0..count).map(|i| (i as f32 * by).sin() * 2.0).collect::<Vec<f32>>();
            let [q, k, v] =
                [(rows, 0.7), (keys, 0.3), (keys, 0.91)].map(|(count, by)| rounded(&sample(count * dim, by)));
            let last = |i: usize| (keys - keys.min(tokens) + i / group).min(keys - 1);
            let sights: [&dyn Fn(usize) -> Range<usize>; 4] =
                [&|_| 0..keys, &|i| 0..last(i) + 1, &|i| last(i).saturating_sub(40)..last(i) + 1, &|i| {
                    i * 37 % keys..i * 37 % keys + 1
                }];
            let cases = Short::all().into_iter().flat_map(|short| sights.map(|seen| (short, seen)));
            for (number, (short, seen)) in cases.enumerate() {
                let seen: Vec<Range<usize>> = (0..rows).map(seen).collect();
                let blocks = |of: &dyn Fn(usize, usize) -> Panels| {
                    (0..keys).step_by(KEYS).map(|from| of(from, KEYS.min(keys - from))).collect::<Vec<_>>()
                };
                let key_panels =
                    blocks(&|from, count| Panels::right(short, View::new(&k[from * dim..], count, dim, dim)));
                let value_panels =
                    blocks(&|from, count| Panels::right(short, View::new(&v[from * dim..], count, dim, dim).t()));
                let queries = Panels::left(short, View::new(&q, rows, dim, dim));
                let (width, near) = (group * dim, number % 3 != 0);
                let int8 = matches!(short, Short::Int8(_));
                // Exponents of any size where they are shifted, and exact products are.
                let scale = if near || int8 { 0.7 } else { 50.0 } / dim as f32;
                let (cap, caps) = (dim as f32, number % 2 == 0);
                let bounded = |v: f32| if caps { cap * (v / cap).tanh() } else { v };
                let bound = |products: &mut [f32]| products.iter_mut().for_each(|v| *v = bounded(*v));
                let bound = caps.then_some(&bound as Bound<'_>);
                let exponents = Exponents { scale, near, bound };
                let (mut out, stride) = (vec![f32::NAN; tokens * (width + 5)], width + 5);
                let to = &mut ViewMut::new(&mut out, tokens, width, stride);
                let sides = (&key_panels[..], &value_panels[..]);
                mix(short, &queries, sides, (&seen, exponents), &mut Mixing::default(), to);
                // Of eight bits, each side is off by a 254th, and so are products.
                let by = if int8 { 24.0 } else { 256.0 };
                for i in 0..rows {
                    let dot = |t: usize| {
                        let (q, k) = (&q[i * dim..][..dim], &k[t * dim..][..dim]);
                        let dot = q.iter().zip(k).map(|(q, k)| f64::from(q * k)).sum::<f64>();
                        if caps { f64::from(cap) * (dot / f64::from(cap)).tanh() } else { dot }
                    };
                    let weights: Vec<f64> = seen[i].clone().map(|t| (f64::from(scale) * dot(t)).exp2()).collect();
                    let sum: f64 = weights.iter().sum();
                    for j in 0..dim {
                        let mixed =
                            seen[i].clone().zip(&weights).map(|(t, w)| w * f64::from(v[t * dim + j])).sum::<f64>();
                        let found = out[i / group * stride + i % group * dim + j];
                        let off = (f64::from(found) - mixed / sum).abs();
                        assert!(off < 2.0 / by, "{short:?} {number} {tokens} {group} {keys} {dim} {i} {j}: {off}");
                    }
                }
                assert!(out.chunks(stride).all(|row| row[width..].iter().all(|v| v.is_nan())));
            }
        }
    }

    #[test]
    fn what_is_no_key_is_not_seen() {
        for short in Short::all() {
            let [side, values] =
                [[3, 32], [32, 3]].map(|[rows, cols]| Panels::right(short, View::new(&[0.5; 96], rows, cols, cols)));
            let queries = Panels::left(short, View::new(&[0.5; 32], 1, 32, 32));
            let sees = |seen: Range<usize>| {
                let mut out = [0.0; 32];
                let to = &mut ViewMut::new(&mut out, 1, 32, 32);
                let seen = (std::slice::from_ref(&seen), Exponents { scale: 1.0, near: true, bound: None });
                let sides = (std::slice::from_ref(&side), std::slice::from_ref(&values));
                mix(short, &queries, sides, seen, &mut Mixing::default(), to);
                out
            };
            assert!(sees(0..3).iter().all(|v| (v - 0.5).abs() < 1e-2));
            assert!(std::panic::catch_unwind(|| sees(0..4)).is_err(), "{short:?}");
        }
    }
}
