//! Attention whose products are of what they are of in fewer bits.
//!
//! Keys and values of a head are rounded once for all queries, values block by block, since a block is what the weights of a
//! chunk of queries are rounded and multiplied with at a time. The weights are mixed before they are divided by their sum,
//! which the mix is instead.
//!
//! Powers of two have the same share of their sum whatever they are shifted by. Where no product can be so large that it matters,
//! which the lengths of queries and keys tell, they are not shifted, and become weights where they are made ([`mix`]); else, and where
//! products are bounded, all of a row are there first, and its largest is the shift.

use super::{Scoring, Sight};
use bitmill_kernels::{
    KEYS, Level, Mixing, Panels, Short, View, ViewMut, WeightSums, attention_weights, filled, largest, largest_norm,
    mix, over_sums, short_part, short_sum,
};
use rayon::prelude::*;
use std::cell::RefCell;
use std::f32::consts::LOG2_E;
use std::ops::Range;

/// Rows of scores computed at once: their weights are to stay in the cache that is next to the first.
const ROWS: usize = 64;
/// Tokens whose values are rounded together.
const BLOCK: usize = KEYS;

/// Exponents that weights may have without a shift, of either sign: sums of a million of them, and of as large values, are numbers.
const FAR: f32 = 80.0;

/// What one head reads, in blocks of tokens.
#[derive(Debug, Default)]
struct Head {
    /// `[block, dim]`.
    keys: Vec<Panels>,
    /// The norms of the longest.
    norms: Vec<f32>,
    /// `[dim, block]`.
    values: Vec<Panels>,
}

/// Keys and values of the tokens of a window so far.
#[derive(Debug)]
pub(crate) struct Past {
    short: Short,
    dim: usize,
    heads: Vec<Head>,
    tokens: usize,
}

/// Memory of a chunk, kept by its thread for the next.
#[derive(Default)]
struct Scratch {
    scores: Vec<f32>,
    mixed: Vec<f32>,
    /// The sum of each row of weights, and what their exponents are less than products.
    sums: Vec<WeightSums>,
    shifts: Vec<f32>,
    /// What each row sees.
    seen: Vec<Range<usize>>,
    /// Queries, and weights block by block.
    left: Option<Panels>,
    weights: Vec<Panels>,
    mixing: Mixing,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// The first `count` of `values`, of which there are as many from here on.
fn first<T: Copy + Default>(values: &mut Vec<T>, count: usize) -> &mut [T] {
    if values.len() < count {
        *values = vec![T::default(); count];
    }
    &mut values[..count]
}

impl Past {
    /// No tokens yet, of so many heads of `dim` channels.
    pub(crate) fn new(short: Short, kv_heads: usize, dim: usize) -> Self {
        Past { short, dim, heads: (0..kv_heads).map(|_| Head::default()).collect(), tokens: 0 }
    }

    /// Tokens so far.
    pub(crate) fn tokens(&self) -> usize {
        self.tokens
    }

    /// Adds the next tokens, `k [kv_heads, tokens, dim]` and `v [tokens, kv_heads · dim]`: whole blocks, unless they are the last.
    ///
    /// # Panics
    /// Where those before were no whole blocks: a caller's bug.
    pub(crate) fn add(&mut self, k: &[f32], v: &[f32]) {
        let (short, dim, kv_heads) = (self.short, self.dim, self.heads.len());
        let tokens = v.len() / (kv_heads * dim).max(1);
        assert!(self.tokens.is_multiple_of(BLOCK) && k.len() == v.len(), "blocks of tokens");
        self.heads.par_iter_mut().enumerate().for_each(|(i, head)| {
            for begin in (0..tokens).step_by(BLOCK) {
                let count = BLOCK.min(tokens - begin);
                let keys = &k[(i * tokens + begin) * dim..][..count * dim];
                let values = View::new(&v[begin * kv_heads * dim + i * dim..], count, dim, kv_heads * dim);
                head.norms.push(largest_norm(Level::best(), keys, dim));
                head.keys.push(Panels::right(short, View::new(keys, count, dim, dim)));
                head.values.push(Panels::right(short, values.t()));
            }
        });
        self.tokens += tokens;
    }

    /// Attends the queries of the last tokens, `q [kv_heads, tokens · group, dim]`, to what they see: `[tokens, kv_heads · group · dim]`.
    /// Those before are whole blocks.
    pub(crate) fn attend(&self, q: &[f32], group: usize, scoring: Scoring) -> Vec<f32> {
        let width = self.heads.len() * group * self.dim;
        let count = q.len() / width.max(1);
        let queries = Queries { q, begin: self.tokens - count, count, group };
        // Chunks are the same wherever a part begins.
        let chunk = 1 << (ROWS / group.max(1)).clamp(16, BLOCK).ilog2();
        filled(q.len(), ((chunk * width).max(1), 1), |i, out| {
            // Not lent: while this waits for other threads, its own may begin another chunk.
            let mut scratch = SCRATCH.take();
            self.attend_chunk(&queries, i * chunk, scoring, &mut scratch, out);
            SCRATCH.set(scratch);
        })
    }

    /// Fills `out`, the rows of the tokens from the `at`-th of the queries on.
    fn attend_chunk(&self, queries: &Queries<'_>, at: usize, scoring: Scoring, scratch: &mut Scratch, out: &mut [f32]) {
        let (Past { short, dim, tokens, .. }, Queries { q, begin, count, group }) = (self, *queries);
        let (short, dim, tokens) = (*short, *dim, *tokens);
        let (row, sight) = (group * dim, scoring.sight);
        let width = self.heads.len() * row;
        let (begin, end) = (begin + at, begin + at + out.len() / width);
        // Sight moves on with the token, so the first of the chunk sees the oldest key and the last the newest.
        let (oldest, newest) = (sight.of(begin, tokens).start / BLOCK * BLOCK, sight.of(end - 1, tokens).end);
        let blocks = oldest / BLOCK..newest.div_ceil(BLOCK);
        let (rows, keys) = ((end - begin) * group, tokens.min(blocks.end * BLOCK) - oldest);
        let diagonal = |from: usize| match sight {
            // A row is of a token, or of the same one as the last.
            Sight::Past { .. } | Sight::Stretch { .. } => begin.saturating_sub(from),
            Sight::Around { .. } | Sight::All => usize::MAX,
        };
        scratch.seen.clear();
        scratch.seen.extend((begin..end).flat_map(|token| std::iter::repeat_n(sight.of(token, tokens), group)));
        // What row i sees of the keys from one on.
        let ranges = &scratch.seen;
        let seen = |i: usize, from: usize, count: usize| {
            let place = |key: usize| key.saturating_sub(from).min(count);
            place(ranges[i].start)..place(ranges[i].end)
        };
        let mixed = first(&mut scratch.mixed, rows * dim);
        let (sums, shifts) = (first(&mut scratch.sums, rows), first(&mut scratch.shifts, rows));
        let memory = scratch.left.take();
        let left = scratch.left.insert(Panels::within(memory, short));
        let more = scratch.weights.len()..blocks.len();
        scratch.weights.extend(more.map(|_| Panels::empty(short)));
        let weights = &mut scratch.weights[..blocks.len()];
        for (number, head) in self.heads.iter().enumerate() {
            let queries = &q[(number * count + at) * row..][..rows * dim];
            left.refill_left(View::new(queries, rows, dim, dim));
            let longest = largest(Level::best(), &head.norms[blocks.clone()]);
            // What they are rounded to is a little longer, perhaps.
            let furthest = 1.02 * scoring.scale * longest * largest_norm(Level::best(), queries, dim);
            if scoring.cap.is_none() && furthest * LOG2_E <= FAR {
                let out = &mut ViewMut::new(&mut out[number * row..], end - begin, row, width);
                let sides = (&head.keys[..], &head.values[..]);
                mix(short, left, sides, (ranges, LOG2_E * scoring.scale), &mut scratch.mixing, out);
                continue;
            }
            let scores = first(&mut scratch.scores, rows * keys);
            let mut scale = scoring.scale;
            for block in blocks.clone() {
                let from = block * BLOCK;
                let which = 0..head.keys[block].shape()[0].min(newest - from);
                let out = &mut ViewMut::new(&mut scores[from - oldest..], rows, which.len(), keys);
                short_part(left, &head.keys[block], which, diagonal(from), out);
            }
            if scoring.cap.is_some() {
                for (i, scores) in scores.chunks_exact_mut(keys).enumerate() {
                    scale = scoring.bounded(&mut scores[seen(i, oldest, keys)]);
                }
            }
            let scale = LOG2_E * scale;
            for (i, (scores, shift)) in scores.chunks_exact(keys).zip(shifts.iter_mut()).enumerate() {
                *shift = scale * largest(Level::best(), &scores[seen(i, oldest, keys)]);
            }
            sums.fill(WeightSums::default());
            for (block, weights) in blocks.clone().zip(weights.iter_mut()) {
                let (from, count) = (block * BLOCK, head.keys[block].shape()[0]);
                let scores = (&mut scores[from - oldest..], count, keys);
                attention_weights(short, scores, (ranges, from), (scale, shifts), weights, sums);
            }
            let sides: Vec<(&Panels, &Panels)> = weights.iter().zip(&head.values[blocks.clone()]).collect();
            short_sum(&sides, &mut ViewMut::new(mixed, rows, dim, dim));
            over_sums(Level::best(), mixed, dim, sums);
            for (out, mixed) in out.chunks_exact_mut(width).zip(mixed.chunks_exact(row)) {
                out[number * row..][..row].copy_from_slice(mixed);
            }
        }
    }
}

/// Queries of some tokens, `[kv_heads, count · group, dim]`, the first of which is token `begin`.
#[derive(Clone, Copy)]
struct Queries<'a> {
    q: &'a [f32],
    begin: usize,
    count: usize,
    group: usize,
}
