//! The instructions of a block of C: its sums in four registers, and the tiles that they are of in the other four.

use super::super::LANES;
use super::{Old, Pairs, SIDE, Sums, TILE};
use std::arch::asm;
use std::mem::MaybeUninit;

/// Begins with no sums.
#[inline]
pub(super) fn zero(_: &Pairs) {
    // SAFETY: that there are tiles proves the instructions.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            options(nomem, nostack, preserves_flags),
        );
    }
}

/// Begins with such sums.
#[inline]
pub(super) fn load(_: &Pairs, sums: &Sums) {
    // SAFETY: that there are tiles proves the instructions, and that registers are sixteen rows of 64 bytes: the four quarters
    // of the sums are, 128 bytes apart.
    unsafe {
        asm!(
            "tileloaddt1 tmm0, [{sums} + {row}]",
            "tileloaddt1 tmm1, [{sums} + {row} + 64]",
            "tileloaddt1 tmm2, [{sums} + {row} + 2048]",
            "tileloaddt1 tmm3, [{sums} + {row} + 2112]",
            sums = in(reg) sums.0.as_ptr(),
            row = in(reg) size_of::<[f32; SIDE]>(),
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            options(readonly, nostack, preserves_flags),
        );
    }
}

/// Leaves the sums there.
#[inline]
pub(super) fn store(_: &Pairs, sums: &mut Sums) {
    // SAFETY: as in `load`.
    unsafe {
        asm!(
            "tilestored [{sums} + {row}], tmm0",
            "tilestored [{sums} + {row} + 64], tmm1",
            "tilestored [{sums} + {row} + 2048], tmm2",
            "tilestored [{sums} + {row} + 2112], tmm3",
            sums = in(reg) sums.0.as_mut_ptr(),
            row = in(reg) size_of::<[f32; SIDE]>(),
            options(nostack, preserves_flags),
        );
    }
}

/// Leaves the sums in a block of C.
#[inline]
pub(super) fn store_whole(_: &Pairs, (c, stride): (&mut [MaybeUninit<f32>], usize)) {
    assert!(c.len() >= (SIDE - 1) * stride + SIDE, "a whole block");
    let c = c.as_mut_ptr();
    // SAFETY: that there are tiles proves the instructions, and that registers are sixteen rows of 64 bytes, which go to rows of C
    // that are `stride` numbers apart: all lie in the block.
    unsafe {
        asm!(
            "tilestored [{upper} + {row}], tmm0",
            "tilestored [{upper} + {row} + 64], tmm1",
            "tilestored [{lower} + {row}], tmm2",
            "tilestored [{lower} + {row} + 64], tmm3",
            upper = in(reg) c,
            lower = in(reg) c.add(LANES * stride),
            row = in(reg) 4 * stride,
            options(nostack, preserves_flags),
        );
    }
}

/// What a step of the depth is: its products.
macro_rules! products {
    () => {
        concat!(
            "tileloaddt1 tmm4, [{a} + {line}]\n",
            "tileloadd tmm6, [{b} + {line}]\n",
            "tileloadd tmm7, [{d} + {line}]\n",
            "tdpbf16ps tmm0, tmm4, tmm6\n",
            "tileloaddt1 tmm5, [{c} + {line}]\n",
            "tdpbf16ps tmm1, tmm4, tmm7\n",
            "tdpbf16ps tmm2, tmm5, tmm6\n",
            "tdpbf16ps tmm3, tmm5, tmm7",
        )
    };
}

/// Four lines that are fetched beside a step.
macro_rules! fetched {
    () => {
        concat!(
            "prefetcht1 [{e}]\n",
            "prefetcht1 [{e} + 64]\n",
            "prefetcht1 [{e} + 128]\n",
            "prefetcht1 [{e} + 192]\n",
            "add {e}, 256",
        )
    };
}

/// The end of a step.
macro_rules! next {
    () => {
        concat!("add {a}, 1024\n", "add {b}, 1024\n", "add {c}, 1024\n", "add {d}, 1024\n", "dec {steps}",)
    };
}

/// Tiles that each of the panels has.
///
/// # Panics
/// Where it is not as many: a bug of this file.
#[inline(always)]
fn depth(a: [&[[u32; TILE]]; 2], b: [&[[u32; TILE]]; 2]) -> usize {
    let steps = a[0].len();
    // One after another: compared as vectors, they would be read from where they were just written in halves, which waits for
    // every store before.
    assert!(steps > 0 && a[1].len() == steps, "panels of one depth");
    assert!(b[0].len() == steps, "panels of one depth");
    assert!(b[1].len() == steps, "panels of one depth");
    steps
}

/// Adds the products of two panels with two to the sums, over all tiles that they have, and fetches [`AHEAD`].
#[inline]
pub(super) fn multiply(_: &Pairs, [a, b]: [[&[[u32; TILE]]; 2]; 2], ahead: [*const u32; 2]) {
    let steps = depth(a, b);
    // SAFETY: that there are tiles proves the instructions, and that every register is sixteen rows of 64 bytes. A load reads
    // 1 KB, rows of 64 bytes one after another: a tile of each of the four slices at every step, and all have `steps`.
    unsafe {
        asm!(
            "2:",
            products!(),
            fetched!(),
            "prefetcht1 [{f}]",
            "prefetcht1 [{f} + 64]",
            "add {f}, 128",
            next!(),
            "jnz 2b",
            a = inout(reg) a[0].as_ptr() => _,
            c = inout(reg) a[1].as_ptr() => _,
            b = inout(reg) b[0].as_ptr() => _,
            d = inout(reg) b[1].as_ptr() => _,
            e = inout(reg) ahead[0] => _,
            f = inout(reg) ahead[1] => _,
            steps = inout(reg) steps => _,
            line = in(reg) 64usize,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(readonly, nostack),
        );
    }
}

/// [`multiply`] of what is near: nothing is fetched.
#[inline]
pub(super) fn multiply_alone(_: &Pairs, [a, b]: [[&[[u32; TILE]]; 2]; 2]) {
    let steps = depth(a, b);
    // SAFETY: as in `multiply`.
    unsafe {
        asm!(
            "2:",
            products!(),
            next!(),
            "jnz 2b",
            a = inout(reg) a[0].as_ptr() => _,
            c = inout(reg) a[1].as_ptr() => _,
            b = inout(reg) b[0].as_ptr() => _,
            d = inout(reg) b[1].as_ptr() => _,
            steps = inout(reg) steps => _,
            line = in(reg) 64usize,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(readonly, nostack),
        );
    }
}

/// A step of the depth: a tile of each of four panels.
#[inline]
pub(super) fn step(_: &Pairs, [a, b]: [[&[u32; TILE]; 2]; 2]) {
    // SAFETY: as in `multiply`.
    unsafe {
        asm!(
            products!(),
            a = in(reg) a[0].as_ptr(),
            c = in(reg) a[1].as_ptr(),
            b = in(reg) b[0].as_ptr(),
            d = in(reg) b[1].as_ptr(),
            line = in(reg) 64usize,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(readonly, nostack, preserves_flags),
        );
    }
}

/// [`multiply`], while C takes `other` sums, so many rows beside each step; returns how many it has taken.
#[inline]
pub(super) fn multiply_beside(
    _: &Pairs,
    [a, b]: [[&[[u32; TILE]]; 2]; 2],
    ahead: *const u32,
    (other, old): (&Sums, Old),
    (c, stride): (&mut [MaybeUninit<f32>], usize),
) -> usize {
    let steps = depth(a, b);
    assert!(c.len() >= (SIDE - 1) * stride + SIDE, "a whole block");
    let rows = SIDE / steps.min(SIDE);
    // SAFETY: the tiles as in `multiply`. C is a whole block, what is added to holds numbers, and at most as many rows as it has
    // are read from `other` and written there, of 128 bytes each, `stride` numbers apart in C; their instructions are those of
    // AVX-512, which whoever has tiles has.
    unsafe {
        asm!(
            "2:",
            products!(),
            fetched!(),
            "mov {row:e}, {rows:e}",
            "3:",
            "vmovups zmm0, [{from}]",
            "vmovups zmm1, [{from} + 64]",
            "test {add:e}, {add:e}",
            "jz 4f",
            "vaddps zmm0, zmm0, [{to}]",
            "vaddps zmm1, zmm1, [{to} + 64]",
            "4:",
            "vmovups [{to}], zmm0",
            "vmovups [{to} + 64], zmm1",
            "add {from}, 128",
            "add {to}, {stride}",
            "dec {row:e}",
            "jnz 3b",
            next!(),
            "jnz 2b",
            a = inout(reg) a[0].as_ptr() => _,
            c = inout(reg) a[1].as_ptr() => _,
            b = inout(reg) b[0].as_ptr() => _,
            d = inout(reg) b[1].as_ptr() => _,
            e = inout(reg) ahead => _,
            steps = inout(reg) steps => _,
            line = in(reg) 64usize,
            from = inout(reg) other.0.as_ptr() => _,
            to = inout(reg) c.as_mut_ptr() => _,
            stride = in(reg) 4 * stride,
            rows = in(reg) rows,
            add = in(reg) usize::from(old == Old::Counts),
            row = out(reg) _,
            out("zmm0") _, out("zmm1") _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
    rows * steps
}
