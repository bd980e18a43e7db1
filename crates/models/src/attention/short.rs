//! Attention whose products are of what they are of in fewer bits.
//!
//! Keys and values of a head are rounded once for all queries, block by block, and queries in chunks ([`mix`]). Powers of two have the
//! same share of their sum whatever they are shifted by: where no product can be so large that it matters, which the lengths of queries
//! and keys tell, they are not shifted, and the largest product of a query need not be known.

use super::Scoring;
use bitmill_kernels::{
    Bound, Exponents, KEYS, Level, Mixing, Panels, Short, View, ViewMut, filled, largest, largest_norm, mix,
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
    /// What each row sees.
    seen: Vec<Range<usize>>,
    queries: Option<Panels>,
    mixing: Mixing,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
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
        let row = group * dim;
        let width = self.heads.len() * row;
        let (begin, end) = (begin + at, begin + at + out.len() / width);
        let rows = (end - begin) * group;
        let sight = |token: usize| scoring.sight.of(token, tokens);
        // Sight moves on with the token, so the first of the chunk sees the oldest key and the last the newest.
        let blocks = sight(begin).start / BLOCK..sight(end - 1).end.div_ceil(BLOCK);
        scratch.seen.clear();
        scratch.seen.extend((begin..end).flat_map(|token| std::iter::repeat_n(sight(token), group)));
        let memory = scratch.queries.take();
        let left = scratch.queries.insert(Panels::within(memory, short));
        let bound = |products: &mut [f32]| {
            scoring.bounded(products);
        };
        let bound = scoring.cap.map(|_| &bound as Bound<'_>);
        for (number, head) in self.heads.iter().enumerate() {
            let queries = &q[(number * count + at) * row..][..rows * dim];
            left.refill_left(View::new(queries, rows, dim, dim));
            let (scale, furthest) = match scoring.cap {
                Some(cap) => (1.0, cap),
                None => {
                    let longest = largest(Level::best(), &head.norms[blocks.clone()]);
                    // What they are rounded to is a little longer, perhaps.
                    let furthest = 1.02 * scoring.scale * longest * largest_norm(Level::best(), queries, dim);
                    (scoring.scale, furthest)
                }
            };
            let exponents = Exponents { scale: LOG2_E * scale, near: furthest * LOG2_E <= FAR, bound };
            let out = &mut ViewMut::new(&mut out[number * row..], end - begin, row, width);
            let sides = (&head.keys[..], &head.values[..]);
            mix(short, left, sides, (&scratch.seen, exponents), &mut scratch.mixing, out);
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
