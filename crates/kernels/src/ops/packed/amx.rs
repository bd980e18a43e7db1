//! Packed products with rounded activations of many tokens by AMX: `tdpbsud` multiplies sixteen tokens' signed inputs with
//! sixteen rows' unsigned codes and adds four products to a 32-bit sum at a time.
//!
//! A vector of codes as AVX-512 unpacks it, four columns of sixteen rows, is a row of a tile of B, so a chunk of them is eight
//! rows. The definition scales every chunk of 32 columns by itself, so a product is as deep as a chunk and fills half of the
//! depth a tile has. That should cost nothing: its 8192 multiply-adds take 16 cycles, and what comes after takes longer. 16 lines
//! of A, 8 of B, 16 of sums and 16 scales are 56 loads, 28 cycles at two of them each; 16 conversions and 16 multiply-adds are 16
//! on two units. So some 290 multiply-adds a cycle are what this counts; 60 are what was measured, a Xeon's 190 GMAC/s a core.
//!
//! A strip's codes are unpacked once for all tokens, into the second cache: 32 bytes of a row's chunk, 256 KB for 64 rows of 4096
//! columns. Tokens come sixteen at a time, laid out once for all strips so that neither their rows nor their scales lie a power of
//! two apart.

use super::super::strips::Strip;
use super::super::tiles::{SIDE, Tiles};
use super::avx512::{PAIR, code_bytes, end_of_pairs, params};
use super::{CHUNK, LANES, Packed, ROUNDING, Rounded, avx2, avx512};
use crate::level::Amx;
use crate::team::fill_chunks;
use std::arch::asm;
use std::arch::x86_64::*;

/// Registers for tiles of a chunk: eight words of four bytes.
type Chunks = Tiles<{ CHUNK / 4 }>;

/// A chunk of sixteen tokens.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Inputs {
    values: [[i8; CHUNK]; SIDE],
    scales: [f32; SIDE],
}

/// A chunk of sixteen rows: four columns of all of them, and the next four.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Codes([[u8; 4 * SIDE]; CHUNK / 4]);

/// A sum for each token and row.
#[repr(C, align(64))]
struct Dots([[i32; SIDE]; SIDE]);

/// Activations of many tokens as tiles of A, sixteen tokens after sixteen, chunk by chunk.
#[derive(Default)]
pub(super) struct Tokens(Vec<Inputs>);

impl Tokens {
    /// Those of `x`, whose tokens have so many chunks; none of fewer than sixteen, which are not multiplied by tiles.
    pub(super) fn new(x: &Rounded<'_>, chunks: usize) -> Self {
        let tokens = x.scales.len() / chunks;
        if tokens < SIDE {
            return Tokens(Vec::new());
        }
        // Of the last tokens some may be there no more: what is left in their place is multiplied for nothing.
        let nothing = Inputs { values: [[0; CHUNK]; SIDE], scales: [0.0; SIDE] };
        let mut all = vec![nothing; tokens.div_ceil(SIDE) * chunks];
        fill_chunks(&mut all, chunks, ROUNDING * x.values.len(), |i, inputs| {
            let values = x.values[i * SIDE * chunks * CHUNK..].chunks_exact(chunks * CHUNK);
            let scales = x.scales[i * SIDE * chunks..].chunks_exact(chunks);
            for (t, (values, scales)) in values.zip(scales).enumerate().take(SIDE) {
                for (inputs, (values, scale)) in inputs.iter_mut().zip(values.as_chunks::<CHUNK>().0.iter().zip(scales))
                {
                    (inputs.values[t], inputs.scales[t]) = (*values, *scale);
                }
            }
        });
        Tokens(all)
    }
}

/// [`super::scalar::int8`], with `x` as tiles, too, where there are enough tokens.
pub(super) fn int8(
    token: Amx,
    w: &Packed<'_>,
    (x, tokens): (&Rounded<'_>, &Tokens),
    sums: &[f32],
    strip: &mut Strip<'_>,
) {
    if strip.tokens() < SIDE {
        // Few tokens wait for codes from memory, which are unpacked in registers there.
        return avx512::int8(token.avx512(), w, x, sums, strip);
    }
    let (mut pairs, mut last) = strip.split(end_of_pairs(strip));
    if !pairs.rows.is_empty() {
        let run = by_parts!(w.form.bits, strip_int8);
        let tiles = Chunks::configure(token);
        // SAFETY: the token proves AVX-512 with VNNI, and AVX2, FMA and F16C.
        unsafe { run(&tiles, w, tokens, sums, &mut pairs) };
    }
    if !last.rows.is_empty() {
        avx2::int8(token.avx512().avx2(), w, x, sums, &mut last);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn strip_int8<const LOW: u32, const HIGH: u32>(
    tiles: &Chunks,
    w: &Packed<'_>,
    x: &Tokens,
    sums: &[f32],
    strip: &mut Strip<'_>,
) {
    let (chunks, groups) = (w.form.chunks(), w.form.groups());
    let first = strip.rows.start / LANES;
    let mut codes = vec![Codes([[0; 4 * SIDE]; CHUNK / 4]); strip.rows.len().div_ceil(PAIR) * chunks];
    for (pair, codes) in codes.chunks_exact_mut(chunks).enumerate() {
        unpack::<LOW, HIGH>(w, first + 2 * pair, codes);
    }
    let mut totals = vec![[0.0; SIDE]; groups];
    for (token, inputs) in (0..strip.tokens()).step_by(SIDE).zip(x.0.chunks_exact(chunks)) {
        let count = SIDE.min(strip.tokens() - token);
        for (t, sums) in sums[token * groups..].chunks_exact(groups).enumerate().take(count) {
            totals.iter_mut().zip(sums).for_each(|(totals, sum)| totals[t] = *sum);
        }
        for (pair, codes) in codes.chunks_exact(chunks).enumerate() {
            let y = tile(tiles, w, first + 2 * pair, inputs, codes, &totals);
            for (t, y) in y.iter().enumerate().take(count) {
                strip.put(token + t, (first + 2 * pair) * LANES, y);
            }
        }
    }
}

/// Codes of two blocks from `block` on, a byte each.
#[target_feature(enable = "avx512f,avx512bw")]
fn unpack<const LOW: u32, const HIGH: u32>(w: &Packed<'_>, block: usize, out: &mut [Codes]) {
    let bytes = 32 * (LOW + HIGH) as usize;
    let codes = [w.block(block), w.block(block + 1)];
    for (chunk, out) in out.iter_mut().enumerate() {
        let at = chunk * codes[0].step;
        each_vector!(unpack_vector::<LOW, HIGH>(codes.map(|codes| codes.chunk(at, bytes)), out));
    }
}

/// The four columns of vector `J`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn unpack_vector<const LOW: u32, const HIGH: u32, const J: usize>(codes: [&[u8]; 2], out: &mut Codes) {
    // SAFETY: 64 bytes are there, and the store needs no alignment.
    unsafe { _mm512_storeu_si512(out.0[J].as_mut_ptr().cast(), code_bytes::<LOW, HIGH, J>(codes)) };
}

/// Outputs of sixteen tokens for the sixteen rows of two blocks from `block` on.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn tile(
    tiles: &Chunks,
    w: &Packed<'_>,
    block: usize,
    inputs: &[Inputs],
    codes: &[Codes],
    totals: &[[f32; SIDE]],
) -> [[f32; SIDE]; SIDE] {
    let (per_group, blocks) = (w.form.group_chunks(), [w.block(block), w.block(block + 1)]);
    let mut dots = Dots([[0; SIDE]; SIDE]);
    let mut y = [_mm512_setzero_ps(); SIDE];
    for (group, (inputs, codes)) in inputs.chunks(per_group).zip(codes.chunks(per_group)).enumerate() {
        let mut sum = [_mm512_setzero_ps(); SIDE];
        for (inputs, codes) in inputs.iter().zip(codes) {
            product(tiles, &inputs.values, codes, &mut dots);
            for (sum, (dots, scale)) in sum.iter_mut().zip(dots.0.iter().zip(&inputs.scales)) {
                // SAFETY: 64 bytes are there, and the load needs no alignment.
                let dot = unsafe { _mm512_loadu_si512(dots.as_ptr().cast()) };
                *sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_set1_ps(*scale), *sum);
            }
        }
        let (scale, zero) = params(w, blocks, group);
        for t in 0..SIDE {
            let centred = _mm512_fnmadd_ps(zero, _mm512_set1_ps(totals[group][t]), sum[t]);
            y[t] = _mm512_fmadd_ps(centred, scale, y[t]);
        }
    }
    let mut out = [[0.0; SIDE]; SIDE];
    for (out, y) in out.iter_mut().zip(y) {
        // SAFETY: 64 bytes are there, and the store needs no alignment.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), y) };
    }
    out
}

/// Integer sums of a chunk of sixteen tokens and sixteen rows.
#[inline]
fn product(_: &Chunks, inputs: &[[i8; CHUNK]; SIDE], codes: &Codes, dots: &mut Dots) {
    // SAFETY: that there are tiles proves the instructions and the shapes. What is read are sixteen rows of 32 bytes, 32 apart,
    // which `inputs` are, and eight rows of 64 bytes, 64 apart, which `codes` are; what is written are sixteen rows of 64 bytes,
    // 64 apart, which `dots` are.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tileloadd tmm4, [{inputs} + {half}]",
            "tileloadd tmm6, [{codes} + {row}]",
            "tdpbsud tmm0, tmm4, tmm6",
            "tilestored [{dots} + {row}], tmm0",
            inputs = in(reg) inputs.as_ptr(),
            codes = in(reg) codes.0.as_ptr(),
            dots = in(reg) dots.0.as_mut_ptr(),
            half = in(reg) CHUNK,
            row = in(reg) 4 * SIDE,
            out("tmm0") _, out("tmm4") _, out("tmm6") _,
            options(nostack, preserves_flags),
        );
    }
}
