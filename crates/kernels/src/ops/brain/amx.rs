//! Panels multiplied by AMX: `tdpbf16ps` adds the product of a tile of A (sixteen rows, sixteen pairs) with one of B (sixteen
//! pairs, sixteen rows of the other matrix) to sixteen by sixteen sums in f32.
//!
//! That is 8192 multiply-adds in 16 cycles, 512 a cycle. A block of C is two panels by two: of the eight registers four hold
//! its sums, two the tiles of A and two those of B, so four loads of 1 KB feed four products, one each. A load takes 8 cycles
//! from the first cache and some 20 from the second: with one register of either side there would be two loads a product,
//! 40 cycles for 16, and three by two needs eleven registers. The four sums also hide the latency of a product, 52 cycles.
//!
//! The depth is cut so that two panels of B (16 KB), which all of A passes, and the two of A that pass (16 KB) are in the first
//! cache together; so many rows of A are taken at once that they stay in the second (128 KB). A panel as it lies is a tile of
//! B; one of A is its transpose, which takes 64 cycles and serves the whole width of B: n/16 products of 16 cycles, so it costs
//! 64/n of them, unless A was laid out for the left side when it was rounded. Sums of 256 columns are added to C at a time, in
//! the order of the columns, as AVX-512 does it.
//!
//! A tile's sums are those of its even columns and its odd ones, each in order, and denormals count as zero, whatever MXCSR
//! says; results differ from those of AVX-512 by rounding alone.

use super::super::matrix::Output;
use super::super::tiles::Tiles;
use super::avx512::{add, turn};
use super::{Brained, LANES, SPARE, from_line, row_pairs};
use crate::level::Amx;
use std::arch::asm;
use std::arch::x86_64::*;

/// Tiles of the depth that are multiplied before the next rows are.
const DEPTH: usize = 8;
/// Panels of A that are turned together.
const PANELS: usize = 16;
/// Pairs of a tile.
const TILE: usize = LANES * LANES;
/// Rows and columns of a block of C.
const SIDE: usize = 2 * LANES;

/// Registers for tiles of sixteen pairs.
type Pairs = Tiles<LANES>;

/// Sums of a block of C, row by row.
#[repr(C, align(64))]
struct Sums([[f32; LANES]; 2 * SIDE]);

/// [`super::brain_gemm`].
pub(super) fn gemm(amx: Amx, a: Brained<'_>, b: Brained<'_>, c: &mut Output<'_>) {
    let tiles = Pairs::configure(amx);
    // SAFETY: the token proves AVX-512.
    unsafe { blocks(&tiles, a, b, c) }
}

#[target_feature(enable = "avx512f")]
fn blocks(tiles: &Pairs, a: Brained<'_>, b: Brained<'_>, c: &mut Output<'_>) {
    let steps = row_pairs(a.depth) / LANES;
    let (a_panels, b_panels) = (a.rows.div_ceil(LANES), b.rows.div_ceil(LANES));
    let (a_tiles, b_tiles) = (a.pairs.as_chunks::<TILE>().0, b.pairs.as_chunks::<TILE>().0);
    // What is turned already is used as it is.
    let room = if a.turned { 0 } else { PANELS.min(a_panels) * DEPTH.min(steps) * TILE };
    let mut words = vec![0; room + SPARE];
    let left = from_line(&mut words).as_chunks_mut::<TILE>().0;
    let mut sums = Sums([[0.0; LANES]; 2 * SIDE]);
    for first in (0..a_panels).step_by(PANELS) {
        let panels = PANELS.min(a_panels - first);
        for from in (0..steps).step_by(DEPTH) {
            let deep = DEPTH.min(steps - from);
            for (i, panel) in left.chunks_exact_mut(deep).take(panels).enumerate() {
                turn_tiles(&a_tiles[(first + i) * steps + from..][..deep], panel);
            }
            let of_a = |i: usize| match i.min(panels - 1) {
                i if a.turned => &a_tiles[(first + i) * steps + from..][..deep],
                i => &left[i * deep..][..deep],
            };
            for col in (0..b_panels).step_by(2) {
                // A panel that is not there is another one, whose sums no entry of C takes.
                let of_b = |i: usize| &b_tiles[i.min(b_panels - 1) * steps + from..][..deep];
                for row in (0..panels).step_by(2) {
                    block(tiles, [of_a(row), of_a(row + 1)], [of_b(col), of_b(col + 1)], &mut sums);
                    for (r, sums) in sums.0.as_chunks::<2>().0.iter().enumerate() {
                        let row = (first + row) * LANES + r;
                        let Some(c) = c.part(row, col * LANES, SIDE) else { break };
                        for (c, sums) in c.chunks_mut(LANES).zip(sums) {
                            // SAFETY: 64 bytes are there, and the load needs no alignment.
                            add(c, unsafe { _mm512_loadu_ps(sums.as_ptr()) });
                        }
                    }
                }
            }
        }
    }
}

/// Tiles of a panel as a left side is read: its rows in one piece.
#[target_feature(enable = "avx512f")]
fn turn_tiles(panel: &[[u32; TILE]], out: &mut [[u32; TILE]]) {
    for (pairs, out) in panel.iter().zip(out) {
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

/// Products of two panels with two, over all tiles that they have.
fn block(_: &Pairs, a: [&[[u32; TILE]]; 2], b: [&[[u32; TILE]]; 2], sums: &mut Sums) {
    let steps = a[0].len();
    assert!(steps > 0 && [a[1].len(), b[0].len(), b[1].len()] == [steps; 3], "panels of one depth");
    // SAFETY: that there are tiles proves the instructions, and that every register is sixteen rows of 64 bytes. A load reads
    // 1 KB, rows of 64 bytes one after another: a tile of each of the four slices at every step, and all have `steps`. A store
    // writes sixteen rows of 64 bytes, 128 apart, and the four fill the 4 KB of `sums`.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm4, [{a} + {row}]",
            "tileloadd tmm6, [{b} + {row}]",
            "tileloadd tmm7, [{d} + {row}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{c} + {row}]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {a}, 1024",
            "add {b}, 1024",
            "add {c}, 1024",
            "add {d}, 1024",
            "dec {steps}",
            "jnz 2b",
            "add {row}, {row}",
            "tilestored [{sums} + {row}], tmm0",
            "tilestored [{sums} + {row} + 64], tmm1",
            "tilestored [{sums} + {row} + 2048], tmm2",
            "tilestored [{sums} + {row} + 2112], tmm3",
            a = inout(reg) a[0].as_ptr() => _,
            c = inout(reg) a[1].as_ptr() => _,
            b = inout(reg) b[0].as_ptr() => _,
            d = inout(reg) b[1].as_ptr() => _,
            steps = inout(reg) steps => _,
            row = inout(reg) 64usize => _,
            sums = in(reg) sums.0.as_mut_ptr(),
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}
