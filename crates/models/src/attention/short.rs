//! Attention whose products are of what they are of in fewer bits.
//!
//! Keys and values of a head are rounded once for all queries, values block by block, since a block is what the weights of a
//! chunk of queries are rounded and multiplied with at a time. The weights are mixed before they are divided by their sum,
//! which the mix is instead.

use super::{Inputs, Scoring, Sight};
use bitmill_kernels::{Level, Panels, Short, View, ViewMut, exponentials, short_gemm, short_part, short_product};
use rayon::prelude::*;
use std::cell::RefCell;
use std::ops::Range;

/// Rows of scores computed at once: their weights are to stay in the cache that is next to the first.
const ROWS: usize = 64;
/// Tokens whose values are rounded together.
const BLOCK: usize = 128;
/// What a row of weights is filled up to: no vector is left in part.
const LANES: usize = 16;

/// What one head reads.
struct Head {
    /// `[tokens, dim]`.
    keys: Panels,
    /// Of every [`BLOCK`] tokens, `[dim, tokens]`.
    values: Vec<Panels>,
}

/// Memory of a chunk, kept by its thread for the next.
#[derive(Default)]
struct Scratch {
    scores: Vec<f32>,
    mixed: Vec<f32>,
    /// One over the sum of each row of weights.
    inverses: Vec<f32>,
    left: Option<Panels>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// [`super::attend`] into `out`.
pub(super) fn attend(inputs: &Inputs<'_>, short: Short, scoring: Scoring, out: &mut [f32]) {
    let Inputs { kv_heads, tokens, dim, group, .. } = *inputs;
    let width = kv_heads * group * dim;
    let head = |head: usize| {
        let keys = View::new(&inputs.k[head * tokens * dim..], tokens, dim, dim);
        let values = |begin: usize| {
            let count = BLOCK.min(tokens - begin);
            let values = &inputs.v[begin * kv_heads * dim + head * dim..];
            Panels::right(short, View::new(values, count, dim, kv_heads * dim).t())
        };
        Head { keys: Panels::right(short, keys), values: (0..tokens).step_by(BLOCK).map(values).collect() }
    };
    let heads: Vec<Head> = (0..kv_heads).into_par_iter().map(head).collect();
    let chunk = (ROWS / group.max(1)).clamp(16, BLOCK);
    out.par_chunks_mut((chunk * width).max(1)).enumerate().for_each(|(i, out)| {
        // Not lent: while this waits for other threads, its own may begin another chunk.
        let mut scratch = SCRATCH.take();
        inputs.attend_chunk(i * chunk, (short, scoring), &heads, &mut scratch, out);
        SCRATCH.set(scratch);
    });
}

/// The first `count` of `values`, of which there are as many from here on.
fn first(values: &mut Vec<f32>, count: usize) -> &mut [f32] {
    if values.len() < count {
        *values = vec![0.0; count];
    }
    &mut values[..count]
}

impl Inputs<'_> {
    /// Fills `out`, the rows of the tokens from `begin` on.
    fn attend_chunk(
        &self,
        begin: usize,
        (short, scoring): (Short, Scoring),
        heads: &[Head],
        scratch: &mut Scratch,
        out: &mut [f32],
    ) {
        let Inputs { kv_heads, tokens, dim, group, .. } = *self;
        let (width, row, sight) = (kv_heads * group * dim, group * dim, scoring.sight);
        let end = begin + out.len() / width;
        // Sight moves on with the token, so the first of the chunk sees the oldest key and the last the newest.
        let (oldest, newest) = (sight.of(begin, tokens).start / BLOCK * BLOCK, sight.of(end - 1, tokens).end);
        let blocks = oldest / BLOCK..newest.div_ceil(BLOCK);
        let (rows, keys) = ((end - begin) * group, tokens.min(blocks.end * BLOCK) - oldest);
        let diagonal = match sight {
            // A row is of a token, or of the same one as the last.
            Sight::Past { .. } | Sight::Stretch { .. } => begin - oldest,
            Sight::Around { .. } | Sight::All => usize::MAX,
        };
        let (scores, mixed) = (first(&mut scratch.scores, rows * keys), first(&mut scratch.mixed, rows * dim));
        let inverses = first(&mut scratch.inverses, rows);
        let memory = scratch.left.take();
        let left = scratch.left.insert(Panels::within(memory, short));
        for (head, Head { keys: head_keys, values }) in heads.iter().enumerate() {
            left.refill_left(View::new(&self.q[(head * tokens + begin) * row..], rows, dim, dim));
            let products = &mut ViewMut::new(scores, rows, newest - oldest, keys);
            short_part(left, head_keys, oldest..newest, diagonal, products);
            for (i, (scores, inverse)) in scores.chunks_exact_mut(keys).zip(inverses.iter_mut()).enumerate() {
                let seen = sight.of(begin + i / group, tokens);
                *inverse = weigh(scores, seen.start - oldest..seen.end - oldest, scoring);
            }
            for (i, block) in blocks.clone().enumerate() {
                let values = &values[block];
                left.refill_left(View::new(&scores[i * BLOCK..], rows, values.shape()[1], keys));
                let mixed = &mut ViewMut::new(mixed, rows, dim, dim);
                match i {
                    0 => short_product(left, 0..rows, values, mixed),
                    _ => short_gemm(left, 0..rows, values, mixed),
                }
            }
            for (i, (mixed, inverse)) in mixed.chunks_exact(dim).zip(inverses.iter()).enumerate() {
                let out = &mut out[i / group * width + head * row + i % group * dim..][..dim];
                out.iter_mut().zip(mixed).for_each(|(out, v)| *out = v * inverse);
            }
        }
    }
}

/// Turns one query's products with the keys that it sees, `seen`, into weights, up to a multiple that is returned, and those with
/// others into zeros.
fn weigh(products: &mut [f32], seen: Range<usize>, scoring: Scoring) -> f32 {
    let (first, past) = (seen.start, seen.end);
    let scale = scoring.bounded(&mut products[first..past]);
    let whole = (first + (past - first).next_multiple_of(LANES)).min(products.len());
    products[past..whole].fill(f32::NEG_INFINITY);
    let inverse = exponentials(Level::best(), &mut products[first..whole], scale);
    products[..first].fill(0.0);
    products[past..].fill(0.0);
    inverse
}
