//! [`crate::mix`] by tiles: 32 queries at a time, whose products with 32 keys become powers in the first cache.
//!
//! Products of a block of keys take 128 cycles of the tiles where queries have 64 entries, those of its powers with values as many,
//! and its powers some 350 of the units of vectors, which do not wait for the tiles: the products of the next block are under way
//! while they run. The powers of all keys stay until values are mixed, at 64 bytes a key, and keys and values come from the second
//! cache, once for 32 queries.
//!
//! What is rounded to 2⁻⁹ need not be known to 2⁻²⁴: powers are found to 2⁻¹³.

use super::super::avx512::{as_bits, load as sixteen};
use super::super::{Brained, LANES, from_line};
use super::steps::{multiply_alone, step, store, zero};
use super::{Pairs, SIDE, SPARE, Sums, TILE, panels};
use crate::ViewMut;
use crate::level::Amx;
use crate::ops::mix::KEYS;
use crate::ops::softmax::{LEAST, TO_INTEGER};
use std::arch::x86_64::*;
use std::cell::RefCell;
use std::ops::Range;

/// The polynomial of least relative error for 2^r, |r| ≤ 1/2: 7.5e-5. Its last factor first.
const SERIES: [f32; 4] = [5.517_16e-2, 2.426_111_3e-1, 6.932_61e-1, 9.999_280_7e-1];

/// The sum of a row's powers, or the largest of its products, in parts.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Folded([f32; LANES]);

/// Powers as a left side, products that are to become them, what is folded of each row, and by what its exponents are shifted.
struct Memory {
    powers: Vec<u32>,
    products: [Sums; 2],
    folded: [Folded; SIDE],
    shifts: [f32; SIDE],
}

thread_local! {
    static MEMORY: RefCell<Memory> = const {
        let products = [const { Sums([[0.0; SIDE]; SIDE]) }; 2];
        RefCell::new(Memory { powers: Vec::new(), products, folded: [Folded([0.0; LANES]); SIDE], shifts: [0.0; SIDE] })
    };
}

/// What is done with products: the largest of each row is found, they become powers, or powers of what is shifted.
const LARGEST: u8 = 0;
const POWERS: u8 = 1;
const SHIFTED: u8 = 2;

/// Whether heads of so many entries are mixed by tiles: whole blocks.
pub(in crate::ops) fn can_mix(dim: usize) -> bool {
    dim > 0 && dim.is_multiple_of(SIDE)
}

/// [`crate::mix`] of `queries` that are turned, with keys and values that `blocks` has.
pub(in crate::ops) fn mix_tiles<'a>(
    amx: Amx,
    queries: Brained<'_>,
    blocks: &dyn Fn(usize) -> [Brained<'a>; 2],
    (seen, scale, near): (&[Range<usize>], f32, bool),
    (group, out): (usize, &mut ViewMut<'_, f32>),
) {
    assert!(queries.turned && can_mix(queries.depth), "queries for tiles");
    let tiles = Pairs::configure(amx);
    MEMORY.with_borrow_mut(|memory| {
        for (i, seen) in seen.chunks(SIDE).enumerate() {
            let few = Few { queries, first: i * SIDE, seen, scale, near, group };
            // SAFETY: the token proves AVX-512 with BF16.
            unsafe { few.mix(&tiles, blocks, memory, out) };
        }
    });
}

/// Queries that are worked together, at most [`SIDE`].
struct Few<'a> {
    queries: Brained<'a>,
    first: usize,
    seen: &'a [Range<usize>],
    scale: f32,
    near: bool,
    group: usize,
}

impl Few<'_> {
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn mix<'a>(
        &self,
        tiles: &Pairs,
        blocks: &dyn Fn(usize) -> [Brained<'a>; 2],
        memory: &mut Memory,
        out: &mut ViewMut<'_, f32>,
    ) {
        let edge =
            |of: fn(&Range<usize>) -> usize, than: fn(usize, usize) -> usize| self.seen.iter().map(of).reduce(than);
        let starts = [edge(|seen| seen.start, usize::min), edge(|seen| seen.start, usize::max)];
        let ends = [edge(|seen| seen.end, usize::min), edge(|seen| seen.end, usize::max)];
        let ([Some(begin), Some(start)], [Some(end), Some(past)]) = (starts, ends) else { return };
        // Blocks of keys that any of them sees, and those that all see all of.
        let which = begin / SIDE..past.div_ceil(SIDE);
        let all = start.div_ceil(SIDE)..end / SIDE;
        if which.is_empty() {
            return;
        }
        let deep = which.len();
        memory.powers.resize((2 * deep * TILE + SPARE).max(memory.powers.len()), 0);
        let sweep = (&which, &all);
        if self.near {
            self.sweep::<POWERS>(tiles, blocks, sweep, memory);
        } else {
            // Made twice, which takes less time than to keep them.
            self.sweep::<LARGEST>(tiles, blocks, sweep, memory);
            for (shift, largest) in memory.shifts.iter_mut().zip(&memory.folded) {
                *shift = self.scale * _mm512_reduce_max_ps(sixteen(&largest.0));
            }
            self.sweep::<SHIFTED>(tiles, blocks, sweep, memory);
        }
        let Memory { powers, products: [own, _], folded, .. } = memory;
        let (upper, lower) = from_line(powers).as_chunks::<TILE>().0.split_at(deep);
        let mut inverse = [0.0f32; SIDE];
        for (inverse, sums) in inverse.iter_mut().zip(&folded[..self.seen.len()]) {
            *inverse = 1.0 / _mm512_reduce_add_ps(sixteen(&sums.0));
        }
        for dim in (0..self.queries.depth).step_by(SIDE) {
            zero(tiles);
            let mut at = which.start;
            while at < which.end {
                let to = ((at / EACH + 1) * EACH).min(which.end);
                let [_, values] = blocks(at / EACH);
                let some = at - which.start..to - which.start;
                let values = panels(&values, dim / LANES).map(|tiles| &tiles[at % EACH..][..some.len()]);
                multiply_alone(tiles, [[&upper[some.clone()], &lower[some]], values]);
                at = to;
            }
            store(tiles, own);
            let (mut token, mut head) = (self.first / self.group, self.first % self.group);
            for (row, inverse) in own.0.iter().zip(&inverse[..self.seen.len()]) {
                let inverse = _mm512_set1_ps(*inverse);
                if let Some(out) = out.part(token, head * self.queries.depth + dim, SIDE) {
                    for (out, row) in out.as_chunks_mut::<LANES>().0.iter_mut().zip(row.as_chunks::<LANES>().0) {
                        // SAFETY: 64 bytes are there, and the store needs no alignment.
                        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), _mm512_mul_ps(sixteen(row), inverse)) };
                    }
                }
                head += 1;
                if head == self.group {
                    (token, head) = (token + 1, 0);
                }
            }
        }
    }

    /// Which keys of a block query i sees, lowest first.
    #[inline(always)]
    fn sees(&self, i: usize, at: usize) -> u32 {
        let before = |key: usize| match key.saturating_sub(at * SIDE) {
            0 => 0,
            count => u32::MAX >> (SIDE - count.min(SIDE)),
        };
        self.seen.get(i).map_or(0, |seen| before(seen.end) & !before(seen.start))
    }

    /// Goes through the products with all blocks `which`, of which those in `all` are of keys that each query sees.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn sweep<'a, const WHAT: u8>(
        &self,
        tiles: &Pairs,
        blocks: &dyn Fn(usize) -> [Brained<'a>; 2],
        (which, all): (&Range<usize>, &Range<usize>),
        memory: &mut Memory,
    ) {
        let Memory { powers, products: [own, next], folded, shifts } = memory;
        let (mut own, mut next) = (own, next);
        let (upper, lower) = from_line(powers).as_chunks_mut::<TILE>().0.split_at_mut(which.len());
        folded.fill(Folded([if WHAT == LARGEST { f32::NEG_INFINITY } else { 0.0 }; LANES]));
        let left = panels(&self.queries, self.first / LANES);
        let right = |at: usize| panels(&blocks(at / EACH)[0], at % EACH * 2);
        zero(tiles);
        multiply_alone(tiles, [left, right(which.start)]);
        store(tiles, own);
        for ((at, upper), lower) in which.clone().zip(upper).zip(lower) {
            let following = (at + 1 < which.end).then(|| [left, right(at + 1)]);
            let (to, beside) = (([upper, lower], &mut *folded, &*shifts), (tiles, following, &mut *next));
            match all.contains(&at) {
                true => self.work::<WHAT, true>(own, at, to, beside),
                false => self.work::<WHAT, false>(own, at, to, beside),
            }
            std::mem::swap(&mut own, &mut next);
        }
    }

    /// Works the products with block `at`, of keys that each query sees, which may be known to be `ALL`: powers become tiles of a left
    /// side. The products of the two sides that follow are made meanwhile.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn work<const WHAT: u8, const ALL: bool>(
        &self,
        products: &Sums,
        at: usize,
        (to, folded, shifts): ([&mut [u32; TILE]; 2], &mut [Folded; SIDE], &[f32; SIDE]),
        (tiles, following, next): (&Pairs, Option<Sides<'_>>, &mut Sums),
    ) {
        let scale = _mm512_set1_ps(self.scale);
        let [upper, lower] = to.map(|tile| tile.as_chunks_mut::<LANES>().0.as_chunks_mut::<ROWS>().0);
        let (products, shifts) = (products.0.as_chunks::<ROWS>().0, shifts.as_chunks::<ROWS>().0);
        let rows = folded.as_chunks_mut::<ROWS>().0.iter_mut().zip(upper.iter_mut().chain(lower));
        // Rows beyond the queries are worked as well: nothing reads what they become.
        for (part, ((products, shifts), (folded, lines))) in products.iter().zip(shifts).zip(rows).enumerate() {
            match following {
                Some(sides) if part < SIDE / ROWS - 1 => some_steps(tiles, sides, part),
                Some(_) => store(tiles, next),
                None => {}
            }
            for r in 0..ROWS {
                let (low, high) = products[r].split_at(LANES);
                let (mut low, mut high) = (sixteen(low), sixteen(high));
                let sees = if ALL { u32::MAX } else { self.sees(part * ROWS + r, at) };
                let masks = [sees as u16, (sees >> LANES) as u16];
                let mut fold = sixteen(&folded[r].0);
                if WHAT == LARGEST {
                    fold = _mm512_mask_max_ps(fold, masks[0], fold, low);
                    fold = _mm512_mask_max_ps(fold, masks[1], fold, high);
                } else {
                    let by = (scale, _mm512_set1_ps(shifts[r]));
                    (low, high) = (power::<WHAT>(low, by), power::<WHAT>(high, by));
                    if !ALL {
                        (low, high) = (_mm512_maskz_mov_ps(masks[0], low), _mm512_maskz_mov_ps(masks[1], high));
                    }
                    fold = _mm512_add_ps(_mm512_add_ps(fold, low), high);
                    // SAFETY: 64 bytes are there, and the store needs no alignment.
                    unsafe {
                        let line = as_bits(_mm512_cvtne2ps_pbh(high, low));
                        _mm512_storeu_si512(lines[r].as_mut_ptr().cast(), line);
                    }
                }
                // SAFETY: 64 bytes are there, and the store needs no alignment.
                unsafe { _mm512_storeu_ps(folded[r].0.as_mut_ptr(), fold) };
            }
        }
    }
}

/// Two panels of either side.
type Sides<'a> = [[&'a [[u32; TILE]]; 2]; 2];

/// Rows of powers that are found between steps of the products that follow.
const ROWS: usize = 4;

/// A part of the steps of a product, of as many as rows of powers leave time for.
#[inline(always)]
fn some_steps(tiles: &Pairs, [[a, c], [b, d]]: Sides<'_>, part: usize) {
    const PARTS: usize = SIDE / ROWS - 2;
    let deep = a.len();
    assert!(c.len() == deep && b.len() == deep && d.len() == deep, "panels of one depth");
    if part == 0 {
        zero(tiles);
    }
    for i in deep * part.min(PARTS) / PARTS..deep * (part + 1).min(PARTS) / PARTS {
        step(tiles, [[&a[i], &c[i]], [&b[i], &d[i]]]);
    }
}

/// Blocks of keys that are rounded together.
const EACH: usize = KEYS / SIDE;

/// `2^(scale · v)`, or `2^(scale · v − shift)` where that is `SHIFTED`, of what is at least the least that is told apart.
#[inline]
#[target_feature(enable = "avx512f")]
fn power<const WHAT: u8>(v: __m512, (scale, shift): (__m512, __m512)) -> __m512 {
    let to_integer = _mm512_set1_ps(TO_INTEGER);
    let (shifted, r);
    if WHAT == SHIFTED {
        // NaN stays what it is.
        let x = _mm512_max_ps(_mm512_set1_ps(LEAST), _mm512_fmsub_ps(scale, v, shift));
        shifted = _mm512_add_ps(x, to_integer);
        r = _mm512_sub_ps(x, _mm512_sub_ps(shifted, to_integer));
    } else {
        shifted = _mm512_fmadd_ps(scale, v, to_integer);
        r = _mm512_fmsub_ps(scale, v, _mm512_sub_ps(shifted, to_integer));
    }
    let mut series = _mm512_set1_ps(SERIES[0]);
    for factor in &SERIES[1..] {
        series = _mm512_fmadd_ps(series, r, _mm512_set1_ps(*factor));
    }
    let exponent = _mm512_slli_epi32::<23>(_mm512_castps_si512(shifted));
    _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(series), exponent))
}
