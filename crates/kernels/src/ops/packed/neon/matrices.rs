//! Rounded activations of many tokens by products of matrices (Armv8.6, i8mm): one instruction multiplies two rows of eight codes
//! with as many inputs of two tokens, twice what a dot product does.
//!
//! Codes are centred and laid out two rows at a time, once for all tokens, so that sums start from nothing.

use super::super::{CHUNK, LANES, Packed, Rounded, by_token};
use super::{Rows, add_piece, code_bytes, params, put};
use crate::level::Matrices;
use crate::ops::strips::Strip;
use std::arch::{aarch64::*, asm};

/// Tokens that meet a block side by side: sixteen sums of two rows and two tokens, fed by four loads of codes and eight of inputs.
pub(super) const TOKENS: usize = 8;
/// The same two by two.
const TWOS: usize = TOKENS / 2;

/// A chunk of eight rows: eight columns of two rows, and of the next two, and the next eight columns.
type Codes = [[int8x16_t; LANES / 2]; CHUNK / 8];

/// All tokens of a strip but those that remain when they are taken eight at a time.
pub(super) fn strip_int8<const LOW: u32, const HIGH: u32>(
    matrices: Matrices,
    w: &Packed<'_>,
    x: &Rounded<'_>,
    starts: &[i32],
    strip: &mut Strip<'_>,
) {
    let whole = strip.tokens() / TOKENS * TOKENS;
    // SAFETY: every CPU of the target has NEON.
    unsafe {
        let mut codes = vec![[[vdupq_n_s8(0); LANES / 2]; CHUNK / 8]; w.form.chunks()];
        for block in strip.rows.start / LANES..strip.rows.end.div_ceil(LANES) {
            unpack::<LOW, HIGH>(w, block, &mut codes);
            for token in (0..whole).step_by(TOKENS) {
                let at = [token, block];
                put([tile(matrices, w, x, starts, at, &codes)], at, strip);
            }
        }
    }
}

/// Centred codes of a block.
#[inline]
#[target_feature(enable = "neon")]
fn unpack<const LOW: u32, const HIGH: u32>(w: &Packed<'_>, block: usize, out: &mut [Codes]) {
    let (codes, bytes) = (w.block(block), 32 * (LOW + HIGH) as usize);
    let middle = vdupq_n_s8((1u8 << (LOW + HIGH - 1)).cast_signed());
    for (chunk, out) in out.iter_mut().enumerate() {
        let mut vectors = [[vdupq_n_s8(0); 2]; CHUNK / 4];
        each_vector!(centre::<LOW, HIGH>(codes.chunk(chunk * codes.step, bytes), middle, &mut vectors));
        // A vector is four columns of four rows; of two such, columns of a row come beside each other.
        for (out, [first, next]) in out.iter_mut().zip(vectors.as_chunks::<2>().0) {
            for half in 0..2 {
                let (a, b) = (vreinterpretq_s32_s8(first[half]), vreinterpretq_s32_s8(next[half]));
                out[2 * half] = vreinterpretq_s8_s32(vzip1q_s32(a, b));
                out[2 * half + 1] = vreinterpretq_s8_s32(vzip2q_s32(a, b));
            }
        }
    }
}

/// Vector `J` of a chunk, whose codes are that far from the middle.
#[inline]
#[target_feature(enable = "neon")]
fn centre<const LOW: u32, const HIGH: u32, const J: usize>(
    codes: &[u8],
    middle: int8x16_t,
    out: &mut [[int8x16_t; 2]; CHUNK / 4],
) {
    let codes = code_bytes::<LOW, HIGH, J>(codes);
    for half in 0..2 {
        out[J][half] = vsubq_s8(vreinterpretq_s8_u8(codes[half]), middle);
    }
}

/// Eight rows, whose codes are unpacked, for eight tokens.
#[inline]
#[target_feature(enable = "neon")]
fn tile(
    matrices: Matrices,
    w: &Packed<'_>,
    x: &Rounded<'_>,
    starts: &[i32],
    [token, block]: [usize; 2],
    all: &[Codes],
) -> [Rows; TOKENS] {
    let (form, mut walk) = (&w.form, w.form.walk());
    let codes = w.block(block);
    let values = x.values.as_chunks::<CHUNK>().0;
    let values: [&[[i8; CHUNK]]; TOKENS] = by_token(values, token, form.chunks());
    let scales: [&[f32]; TOKENS] = by_token(x.scales, token, form.spans());
    let starts: [&[i32]; TOKENS] = by_token(starts, token, form.pieces());
    let mut y = [[vdupq_n_f32(0.0); 2]; TOKENS];
    let (mut chunk, mut piece, mut span) = (0, 0, 0);
    while span < form.spans() {
        let mut sum = [[vdupq_n_f32(0.0); 2]; TOKENS];
        let end_of_span = form.end_of_span(span);
        while chunk < end_of_span {
            let (group, end) = walk.next(end_of_span);
            let mut dots = [[vdupq_n_s32(0); TWOS]; LANES / 2];
            while chunk < end {
                for (eight, rows) in all[chunk].iter().enumerate() {
                    let mut inputs = [vdupq_n_s8(0); TWOS];
                    for (two, inputs) in inputs.iter_mut().enumerate() {
                        let first = &values[2 * two][chunk][8 * eight..][..8];
                        let second = &values[2 * two + 1][chunk][8 * eight..][..8];
                        // SAFETY: eight numbers are there of each.
                        *inputs = unsafe { vcombine_s8(vld1_s8(first.as_ptr()), vld1_s8(second.as_ptr())) };
                    }
                    for (dots, rows) in dots.iter_mut().zip(rows) {
                        for (dots, inputs) in dots.iter_mut().zip(inputs) {
                            *dots = smmla(matrices, *dots, *rows, inputs);
                        }
                    }
                }
                chunk += 1;
            }
            let params = params(w, codes.param(group));
            for two in 0..TWOS {
                // A sum is of two tokens for a row, and for the next.
                let [a, b, c, d] = [dots[0][two], dots[1][two], dots[2][two], dots[3][two]];
                let first = [vuzp1q_s32(a, b), vuzp1q_s32(c, d)];
                let second = [vuzp2q_s32(a, b), vuzp2q_s32(c, d)];
                for (t, dots) in [(2 * two, first), (2 * two + 1, second)] {
                    sum[t] = add_piece(w, sum[t], dots, starts[t][piece], params);
                }
            }
            piece += 1;
        }
        for t in 0..TOKENS {
            for half in 0..2 {
                y[t][half] = vfmaq_n_f32(y[t][half], sum[t][half], scales[t][span]);
            }
        }
        span += 1;
    }
    y
}

/// Adds to each lane the product of a row of `rows` and a row of `inputs`, eight columns each.
#[inline(always)]
fn smmla(_: Matrices, mut sum: int32x4_t, rows: int8x16_t, inputs: int8x16_t) -> int32x4_t {
    // SAFETY: the token proves the instruction, which touches nothing but its operands.
    unsafe {
        asm!(
            ".arch_extension i8mm",
            "smmla {sum:v}.4s, {rows:v}.16b, {inputs:v}.16b",
            sum = inout(vreg) sum,
            rows = in(vreg) rows,
            inputs = in(vreg) inputs,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}
