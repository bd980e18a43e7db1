//! Panels multiplied by AMX: `tdpbf16ps` adds the product of a tile of A (sixteen rows, sixteen pairs) with one of B (sixteen
//! pairs, sixteen rows of the other matrix) to sixteen by sixteen sums in f32.
//!
//! That is 8192 multiply-adds in 16 cycles, 512 a cycle. A block of C is two panels by two: of the eight registers four hold
//! its sums, two the tiles of A and two those of B, so four loads of 1 KB feed four products, one each. A load takes 8 cycles
//! from the first cache and some 22 from the second: with one register of either side there would be two loads a product,
//! and three by two needs eleven registers. The four sums also hide the latency of a product, 52 cycles.
//!
//! So the second cache is what products wait for. The depth is cut so that a part of 256 rows of A stays there (256 KB) while all
//! of B passes, and two panels of B do in the first, which A is kept out of (`tileloaddt1`). The third cache is slower by
//! a factor of six, so what comes next is fetched from it as the one before is multiplied. Sums of a part of the depth
//! wait for the next in a region of 512 KB; those of a product of one part are left in C while the next block is
//! multiplied: units that add, load and store have nothing to do meanwhile.
//!
//! A panel as it lies is a tile of B; one of A is its transpose, which takes 64 cycles and serves as many products of 16 cycles as
//! B has panels, in a region or, where these are many, in all of them, unless A was laid out for the left side when it was rounded.
//!
//! Sums stay in f32 from the first column to the last, and C takes them then. A tile's are those of its even columns and its odd
//! ones, each in order, and denormals count as zero, whatever MXCSR says; results differ from those of AVX-512 by rounding alone.

pub(in crate::ops) mod gated;
pub(in crate::ops) mod mix;
mod steps;

use super::super::matrix::Output;
use super::super::tiles::Tiles;
use super::avx512::{add, put, put_past, turn};
use super::{Brained, LANES, Old, SPARE, from_line, of_length, row_pairs};
use crate::level::Amx;
use std::arch::x86_64::*;
use std::cell::RefCell;
use std::ops::Range;
use steps::{load, multiply, multiply_beside, store, store_whole, zero};

/// Tiles of a depth beside whose products there is no time for C to take what was before.
const SHALLOW: usize = 4;
/// Entries of a C that stays in the first cache.
const NEAR: usize = 1 << 13;
/// Entries of a C that is far larger than the caches of a core (8 MB): what is put there goes past them.
const FAR: usize = 1 << 21;
/// Tiles of the depth that are multiplied before the next rows are, at most.
const DEPTH: usize = 16;
/// Panels of A that all of B meets, at most.
const ROWS: usize = 16;
/// Blocks of a region of C, at most: 512 KB of sums.
const REGION: usize = 128;
/// Lines of B, and of A, that are fetched beside every step: 128 steps, those of eight blocks, go through two panels of B, and 2048
/// through those of A.
const AHEAD: [usize; 2] = [4, 2];
/// Panels of A that are few, and tiles of its depth, all parts together, that they stay in the caches with.
const CHAINED: [usize; 2] = [4, 64];
/// Panels of B beyond which A is turned once for all regions of its rows. Turned for each it is an eighth of the region's time,
/// but stays in the second cache, where what waits for other regions does not.
const WIDE: usize = 128;
/// Pairs of a tile.
const TILE: usize = LANES * LANES;
/// Rows and columns of a block of C.
const SIDE: usize = 2 * LANES;

/// Registers for tiles of sixteen pairs.
type Pairs = Tiles<LANES>;

/// The tiles of a panel of a matrix; one that is not there is the last.
#[inline(always)]
fn panel<'a>(matrix: &Brained<'a>, panel: usize) -> &'a [[u32; TILE]] {
    let (per_row, deep) = (row_pairs(matrix.depth), matrix.depth.div_ceil(SIDE));
    let last = matrix.rows.div_ceil(LANES) - 1;
    &matrix.pairs.as_chunks().0[panel.min(last) * (per_row / LANES)..][..deep]
}

/// Two panels.
#[inline(always)]
fn panels<'a>(matrix: &Brained<'a>, first: usize) -> [&'a [[u32; TILE]]; 2] {
    [panel(matrix, first), panel(matrix, first + 1)]
}

/// Sums of a block of C, row by row.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Sums([[f32; SIDE]; SIDE]);

thread_local! {
    /// Memory for the tiles of a left side, and for sums.
    static MEMORY: RefCell<(Vec<u32>, Vec<Sums>)> = const { RefCell::new((Vec::new(), Vec::new())) };
}

/// [`super::multiply`].
pub(super) fn gemm(amx: Amx, sides: &[(Brained<'_>, Brained<'_>)], (old, diagonal): (Old, usize), c: &mut Output<'_>) {
    let tiles = Pairs::configure(amx);
    // Nothing in between begins another product.
    MEMORY.with_borrow_mut(|(words, sums)| {
        // SAFETY: the token proves AVX-512.
        unsafe { blocks(&tiles, sides, (old, diagonal), (words, sums), c) }
    });
}

/// A part of the depth of two sides: their tiles, how many those of a panel are, and which of these it is.
struct Part<'a> {
    a: &'a [[u32; TILE]],
    /// Whether tiles of A are as they are read.
    turned: bool,
    b: &'a [[u32; TILE]],
    stride: usize,
    which: Range<usize>,
    /// Whether no other of the same sides follows.
    last: bool,
}

impl<'a> Part<'a> {
    /// Some of the tiles that panels have in all.
    #[inline]
    fn of((a, b): &(Brained<'a>, Brained<'a>), which: Range<usize>, tiles: usize) -> Self {
        let (a_tiles, b_tiles) = (a.pairs.as_chunks().0, b.pairs.as_chunks().0);
        let (stride, last) = (row_pairs(a.depth) / LANES, which.end == tiles);
        Part { a: a_tiles, turned: a.turned, b: b_tiles, stride, which, last }
    }

    /// All of them, where they are no more than a part has.
    #[inline]
    fn only(side: &(Brained<'a>, Brained<'a>)) -> Option<Self> {
        let tiles = side.0.depth.div_ceil(2 * LANES);
        (1..=DEPTH).contains(&tiles).then(|| Part::of(side, 0..tiles, tiles))
    }

    /// What a region meets of it, A turned in `words` where it is not.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn sides<'s>(&self, region: &'s Region, words: &'s mut Vec<u32>) -> Sides<'s>
    where
        'a: 's,
    {
        if self.turned {
            return self.turned_sides(region);
        }
        turn_parts(std::slice::from_ref(self), region.rows(), words);
        self.sides_in(region, from_line(words).as_chunks().0)
    }

    /// The same of one whose panels of the region's rows lie there, turned, before those of the parts that follow.
    #[inline]
    fn sides_in<'s>(&self, region: &'s Region, a: &'s [[u32; TILE]]) -> Sides<'s>
    where
        'a: 's,
    {
        let (from, deep) = (self.which.start, self.which.len());
        let next = a.get(self.turned_tiles(region)..).filter(|next| !next.is_empty());
        Sides {
            of: region,
            deep,
            a,
            a_stride: deep,
            b: &self.b[from..],
            b_stride: self.stride,
            next: next.map_or(std::ptr::null(), <[_]>::as_ptr),
        }
    }

    /// How many tiles those panels have.
    #[inline]
    fn turned_tiles(&self, region: &Region) -> usize {
        self.which.len() * region.rows().len()
    }

    /// The same of one that is.
    fn turned_sides<'s>(&self, region: &'s Region) -> Sides<'s>
    where
        'a: 's,
    {
        let (from, deep, stride) = (self.which.start, self.which.len(), self.stride);
        let a = &self.a[region.row * stride + from..];
        let next = if self.last { std::ptr::null() } else { a.as_ptr().wrapping_add(deep) };
        Sides { of: region, deep, a, a_stride: stride, b: &self.b[from..], b_stride: stride, next }
    }
}

/// Parts of so many tiles at most, alike in length, of all sides.
fn parts<'a>(sides: &'a [(Brained<'a>, Brained<'a>)]) -> impl Iterator<Item = Part<'a>> {
    let of = |side: &'a (Brained<'a>, Brained<'a>)| {
        let steps = side.0.depth.div_ceil(2 * LANES);
        let deep = steps.div_ceil(steps.div_ceil(DEPTH).max(1)).max(1);
        (0..steps).step_by(deep).map(move |from| Part::of(side, from..steps.min(from + deep), steps))
    };
    sides.iter().flat_map(of)
}

/// Blocks of C that are worked together: its first panels, and rows and columns of blocks.
#[derive(Clone, Copy)]
struct Region {
    row: usize,
    col: usize,
    tall: usize,
    wide: usize,
    /// Panels of A and of B in all, and entries `(i, j)` with `j ≤ diagonal + i` are asked for.
    panels: [usize; 2],
    diagonal: usize,
}

impl Region {
    /// Panels of its rows.
    fn rows(&self) -> Range<usize> {
        self.row..self.panels[0].min(self.row + 2 * self.tall)
    }

    fn cols(&self) -> Range<usize> {
        self.col..self.panels[1].min(self.col + 2 * self.wide)
    }

    /// Whether anything of the block that begins with these panels is asked for.
    fn asks(&self, row: usize, col: usize) -> bool {
        col * LANES < self.diagonal.saturating_add(row * LANES + SIDE)
    }

    /// Whether anything of a panel of B is asked of by its rows, the last of which reaches farthest.
    fn reaches(&self, col: usize) -> bool {
        self.asks(self.rows().end.saturating_sub(2).max(self.row), col)
    }

    /// Which of its blocks that is.
    fn block(&self, row: usize, col: usize) -> usize {
        (col - self.col) / 2 * self.tall + (row - self.row) / 2
    }
}

/// The tiles that a region meets in a part of the depth.
struct Sides<'a> {
    of: &'a Region,
    deep: usize,
    /// From the first that the region meets on, and how far apart those of its panels are.
    a: &'a [[u32; TILE]],
    a_stride: usize,
    /// From the first of all panels on.
    b: &'a [[u32; TILE]],
    b_stride: usize,
    /// Where the next part of A is; null where it is not to be fetched.
    next: *const [u32; TILE],
}

impl<'a> Sides<'a> {
    /// Two panels of A. One that is not there is another, whose sums no entry of C takes.
    #[inline(always)]
    fn left(&self, row: usize) -> [&'a [[u32; TILE]]; 2] {
        let last = self.of.rows().end - 1;
        let panel = |i: usize| &self.a[(i.min(last) - self.of.row) * self.a_stride..][..self.deep];
        [panel(row), panel(row + 1)]
    }

    /// Two panels of B, likewise.
    #[inline(always)]
    fn right(&self, col: usize) -> [&'a [[u32; TILE]]; 2] {
        let last = self.of.panels[1] - 1;
        let panel = |i: usize| &self.b[i.min(last) * self.b_stride..][..self.deep];
        [panel(col), panel(col + 1)]
    }

    /// What is fetched beside a block: its share of the panels of B that come next, and of those of A.
    #[inline(always)]
    fn ahead(&self, row: usize, col: usize) -> [*const u32; 2] {
        // Where nothing comes, what is there is fetched again: other memory may be far away.
        let b = match col + 2 < self.of.panels[1] {
            true => self.b.as_ptr().wrapping_add((col + 2) * self.b_stride),
            false => self.b.as_ptr(),
        };
        let a = match self.next.is_null() {
            true => self.a.as_ptr().cast(),
            false => share::<{ AHEAD[1] }>(self.next, self.a_stride, self.deep, self.of.block(row, col)),
        };
        [share::<{ AHEAD[0] }>(b, self.b_stride, self.deep, (row - self.of.row) / 2), a]
    }
}

/// Where a block that comes after so many others finds its share, `EACH` lines for each of its steps, of some panels that begin at
/// `first`, `stride` tiles apart and `deep` of each. Nothing is read there: it may be anywhere.
#[inline(always)]
fn share<const EACH: usize>(first: *const [u32; TILE], stride: usize, deep: usize, blocks: usize) -> *const u32 {
    // In sixteenths of a panel: as many lines as it has steps.
    let (panel, part) = (blocks * EACH / LANES, blocks * EACH % LANES);
    first.wrapping_add(panel * stride).cast::<u32>().wrapping_add(part * deep * LANES)
}

#[target_feature(enable = "avx512f")]
fn blocks(
    tiles: &Pairs,
    sides: &[(Brained<'_>, Brained<'_>)],
    (old, diagonal): (Old, usize),
    (words, sums): (&mut Vec<u32>, &mut Vec<Sums>),
    c: &mut Output<'_>,
) {
    let panels = c.shape().map(|rows| rows.div_ceil(LANES));
    let tall = panels[0].min(ROWS).div_ceil(2).max(1);
    let wide = (REGION / tall).min(panels[1].div_ceil(2)).max(1);
    let regions = (0..panels[0]).step_by(2 * tall).flat_map(|row| {
        let region = move |col| Region { row, col, tall, wide, panels, diagonal };
        (0..panels[1]).step_by(2 * wide).map(region)
    });
    let regions = regions.filter(|r| r.reaches(r.col));
    let few = |sums: &mut Vec<Sums>, count: usize| sums.resize(count.max(sums.len()), Sums([[0.0; SIDE]; SIDE]));
    if sides.iter().all(|(a, _)| a.depth == 0) {
        return;
    }
    let mut leaving = None;
    if let [side] = sides
        && let Some(part) = Part::only(side)
    {
        few(sums, 2);
        for region in regions {
            leaving = put_only(tiles, &[part.sides(&region, words)], (sums, leaving), old, c);
        }
    } else {
        let parts: Vec<Part<'_>> = parts(sides).collect();
        let depth: usize = parts.iter().map(|part| part.which.len()).sum();
        // All of A is near then, and sums need not wait for other parts.
        let chained = panels[0] <= CHAINED[0] && depth <= CHAINED[1] && parts.iter().all(|part| part.turned);
        few(sums, if chained { 2 } else { tall * wide });
        let (turned, mut turned_rows) = (parts.iter().any(|part| part.turned), None);
        for region in regions {
            if chained {
                let sides: Vec<Sides<'_>> = parts.iter().map(|part| part.turned_sides(&region)).collect();
                leaving = put_only(tiles, &sides, (sums, leaving), old, c);
                continue;
            }
            let once = !turned && panels[1] > WIDE && region.reaches(WIDE);
            if once && turned_rows != Some(region.rows()) {
                turn_parts(&parts, region.rows(), words);
                turned_rows = Some(region.rows());
            }
            let mut from = 0;
            for (number, part) in parts.iter().enumerate() {
                let sides = match once {
                    true => part.sides_in(&region, &from_line(words).as_chunks().0[from..]),
                    false => part.sides(&region, words),
                };
                add_part(tiles, &sides, number == 0, sums);
                from += part.turned_tiles(&region);
            }
            leave_all(sums, &region, old, c);
        }
    }
    if let Some((last, at)) = leaving {
        sums[last].leave(0, c, at, old);
    }
}

/// Adds the products of a part to the sums of a region, or makes them these.
#[target_feature(enable = "avx512f")]
fn add_part(tiles: &Pairs, sides: &Sides<'_>, first: bool, sums: &mut [Sums]) {
    let region = sides.of;
    for col in region.cols().step_by(2) {
        for row in region.rows().step_by(2).filter(|&row| region.asks(row, col)) {
            let sums = &mut sums[region.block(row, col)];
            match first {
                true => zero(tiles),
                false => load(tiles, sums),
            }
            multiply(tiles, [sides.left(row), sides.right(col)], sides.ahead(row, col));
            store(tiles, sums);
        }
    }
}

/// Sums that C takes when the next block is multiplied, and where they begin there.
type Leaving = Option<(usize, (usize, usize))>;

/// Multiplies all parts of a region, block by block. What is complete is still in the first cache when C takes it.
#[target_feature(enable = "avx512f")]
fn put_only(
    tiles: &Pairs,
    parts: &[Sides<'_>],
    (sums, mut leaving): (&mut [Sums], Leaving),
    old: Old,
    c: &mut Output<'_>,
) -> Leaving {
    let Some((sides, before)) = parts.split_last() else { return leaving };
    let region = sides.of;
    let near = c.shape().iter().product::<usize>() <= NEAR;
    for col in region.cols().step_by(2) {
        let right = sides.right(col);
        for row in region.rows().step_by(2).filter(|&row| region.asks(row, col)) {
            let (panels, ahead) = ([sides.left(row), right], sides.ahead(row, col));
            zero(tiles);
            for sides in before {
                multiply(tiles, [sides.left(row), sides.right(col)], ahead);
            }
            if old == Old::Goes
                && (sides.deep <= SHALLOW || near)
                && let Some(c) = c.whole((row * LANES, col * LANES), (SIDE, SIDE))
            {
                multiply(tiles, panels, ahead);
                store_whole(tiles, c);
                continue;
            }
            let mut own = 0;
            if let Some((other, at)) = leaving {
                let done = match c.whole(at, (SIDE, SIDE)) {
                    Some(c) => multiply_beside(tiles, panels, ahead[0], (&sums[other], old), c),
                    None => {
                        multiply(tiles, panels, ahead);
                        0
                    }
                };
                sums[other].leave(done, c, at, old);
                own = 1 - other;
            } else {
                multiply(tiles, panels, ahead);
            }
            store(tiles, &mut sums[own]);
            leaving = Some((own, (row * LANES, col * LANES)));
        }
    }
    leaving
}

/// Lets C have the sums of a region, a row of it after the other.
#[target_feature(enable = "avx512f")]
fn leave_all(sums: &[Sums], region: &Region, old: Old, c: &mut Output<'_>) {
    let (rows, cols) = (region.rows(), region.cols());
    let far = c.shape().iter().product::<usize>() >= FAR;
    for i in rows.start * LANES..(rows.end * LANES).min(c.shape()[0]) {
        let row = i / SIDE * 2;
        for col in cols.clone().step_by(2).take_while(|&col| region.asks(row, col)) {
            let sums = &sums[region.block(row, col)].0[i % SIDE];
            for (half, sums) in sums.as_chunks::<LANES>().0.iter().enumerate() {
                if let Some(c) = c.part(i, (col + half) * LANES, LANES) {
                    // SAFETY: 64 bytes are there, and the load needs no alignment.
                    let sums = unsafe { _mm512_loadu_ps(sums.as_ptr()) };
                    match old {
                        Old::Counts => add(c, sums),
                        Old::Goes if far => put_past(c, sums),
                        Old::Goes => put(c, sums),
                    }
                }
            }
        }
    }
    if far && old == Old::Goes {
        // Whoever is told of C finds it there.
        _mm_sfence();
    }
}

impl Sums {
    /// Puts the part of the block that C has there, from a row on, or adds it.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn leave(&self, from: usize, c: &mut Output<'_>, at: (usize, usize), old: Old) {
        if let Some((c, stride)) = c.whole(at, (SIDE, SIDE)) {
            let c: *mut f32 = c.as_mut_ptr().cast();
            for (r, sums) in self.0.iter().enumerate().skip(from) {
                for (half, sums) in sums.as_chunks::<LANES>().0.iter().enumerate() {
                    // SAFETY: a whole block lies from here on, `sums` are as many, and nothing needs alignment.
                    unsafe {
                        let (c, sums) = (c.add(r * stride + half * LANES), _mm512_loadu_ps(sums.as_ptr()));
                        let sums = match old {
                            Old::Counts => _mm512_add_ps(_mm512_loadu_ps(c), sums),
                            Old::Goes => sums,
                        };
                        _mm512_storeu_ps(c, sums);
                    }
                }
            }
            return;
        }
        for (r, sums) in self.0.iter().enumerate().skip(from) {
            for (half, sums) in sums.as_chunks::<LANES>().0.iter().enumerate() {
                if let Some(c) = c.part(at.0 + r, at.1 + half * LANES, LANES) {
                    // SAFETY: 64 bytes are there, and the load needs no alignment.
                    let sums = unsafe { _mm512_loadu_ps(sums.as_ptr()) };
                    match old {
                        Old::Counts => add(c, sums),
                        Old::Goes => put(c, sums),
                    }
                }
            }
        }
    }
}

/// Some panels of A as a left side is read, part after part and panel after panel: rows of every tile in one piece.
#[target_feature(enable = "avx512f")]
fn turn_parts(parts: &[Part<'_>], panels: Range<usize>, words: &mut Vec<u32>) {
    let deep: usize = parts.iter().map(|part| part.which.len()).sum();
    of_length(words, panels.len() * deep * TILE + SPARE);
    let mut rest = from_line(words).as_chunks_mut::<TILE>().0;
    for part in parts {
        let deep = part.which.len();
        let (own, others) = rest.split_at_mut(panels.len() * deep);
        for (panel, out) in panels.clone().zip(own.chunks_exact_mut(deep)) {
            turn_panel(&part.a[panel * part.stride + part.which.start..][..deep], out);
        }
        rest = others;
    }
}

/// Tiles of a panel, turned.
#[target_feature(enable = "avx512f")]
fn turn_panel(tiles: &[[u32; TILE]], out: &mut [[u32; TILE]]) {
    for (pairs, out) in tiles.iter().zip(out) {
        let mut rows = [_mm512_setzero_si512(); LANES];
        for (row, pairs) in rows.iter_mut().zip(pairs.as_chunks::<LANES>().0) {
            // SAFETY: 64 bytes are there, and the load needs no alignment.
            *row = unsafe { _mm512_loadu_si512(pairs.as_ptr().cast()) };
        }
        for (out, row) in out.as_chunks_mut::<LANES>().0.iter_mut().zip(turn(rows)) {
            // SAFETY: 64 bytes are there, and the store needs no alignment.
            unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), row) };
        }
    }
}
