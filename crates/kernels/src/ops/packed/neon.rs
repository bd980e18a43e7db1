//! Packed products with NEON: eight rows are two registers.
//!
//! With dot products (Armv8.2), one instruction adds four products of signed bytes to a 32-bit lane and takes its input from a
//! lane of another register, so nothing is broadcast. A code of eight bits is multiplied as code − 128, so its sums start from 0.
//!
//! Without them, products are widened to sixteen bits: eight of a code of at most four bits and an input of eight stay below
//! 2¹⁵ (8 · 15 · 128 = 15,360), so a chunk is folded in 16-bit lanes and widened once. Codes wider than four bits are two
//! such sums.
//!
//! With products of matrices (Armv8.6), many tokens are multiplied by those.

mod matrices;

use super::super::strips::Strip;
use super::rounded::ROUNDER;
use super::{Block, CHUNK, LANES, Packed, Rounded, RoundedMut, SPAN, Scales, by_token};
use crate::level::{Dot, Neon};
use matrices::strip_int8 as many_int8;
use std::arch::{aarch64::*, asm};

/// Tokens that one pass over the codes serves where activations are rounded.
const TOKENS: usize = 4;
/// The same where they are not: as many sums are under way as two units with a latency of four take, twice.
const MANY: usize = 8;
/// Blocks that one token meets side by side where activations are not rounded.
const BLOCKS: usize = 4;

/// Numbers of eight rows.
type Rows = [float32x4_t; 2];
/// Integers of eight rows.
type Sums = [int32x4_t; 2];

/// [`super::rounded::round`]: the compiler would fold the largest magnitude number by number.
pub(super) fn round(_: Neon, x: &[f32], cols: usize, out: RoundedMut<'_>) {
    let (chunks, spans) = (cols.div_ceil(CHUNK), cols.div_ceil(SPAN));
    let values = out.values.chunks_exact_mut(chunks * CHUNK);
    let others = out.scales.chunks_exact_mut(spans).zip(out.sums.chunks_exact_mut(chunks));
    for (x, (values, (scales, sums))) in x.chunks_exact(cols).zip(values.zip(others)) {
        let parts = values.chunks_mut(SPAN).zip(sums.chunks_mut(SPAN / CHUNK));
        for ((x, scale), (values, sums)) in x.chunks(SPAN).zip(scales).zip(parts) {
            let mut padded = [0.0; SPAN];
            padded[..x.len()].copy_from_slice(x);
            // SAFETY: every CPU of the target has NEON.
            unsafe { *scale = round_span(&padded, values, sums) };
        }
    }
}

/// Rounds one span, of which as many chunks are there as have a sum, and returns its scale.
#[inline]
#[target_feature(enable = "neon")]
fn round_span(x: &[f32; SPAN], values: &mut [i8], sums: &mut [i32]) -> f32 {
    let mut most = vdupq_n_f32(0.0);
    for x in x.as_chunks::<4>().0 {
        // SAFETY: four numbers are there.
        most = vmaxnmq_f32(most, vabsq_f32(unsafe { vld1q_f32(x.as_ptr()) }));
    }
    let most = vmaxnmvq_f32(most);
    let inverse = if most > 0.0 { 127.0 / most } else { 0.0 };
    // The low bits of each, as [`ROUNDER`] has them.
    let low = |x: &[f32]| {
        // SAFETY: four numbers are there.
        let x = unsafe { vld1q_f32(x[..4].as_ptr()) };
        vreinterpretq_s32_f32(vaddq_f32(vmulq_n_f32(x, inverse), vdupq_n_f32(ROUNDER)))
    };
    let chunks = values.as_chunks_mut::<CHUNK>().0.iter_mut().zip(sums);
    for ((values, sum), x) in chunks.zip(x.as_chunks::<CHUNK>().0) {
        *sum = 0;
        for (values, x) in values.as_chunks_mut::<16>().0.iter_mut().zip(x.as_chunks::<16>().0) {
            let first = vmovn_high_s32(vmovn_s32(low(x)), low(&x[4..]));
            let second = vmovn_high_s32(vmovn_s32(low(&x[8..])), low(&x[12..]));
            let all = vmovn_high_s16(vmovn_s16(first), second);
            *sum += i32::from(vaddlvq_s8(all));
            // SAFETY: sixteen numbers are there.
            unsafe { vst1q_s8(values.as_mut_ptr(), all) };
        }
    }
    most / 127.0
}

/// [`super::scalar::int8`].
pub(super) fn int8(token: Neon, w: &Packed<'_>, x: &Rounded<'_>, starts: &[i32], strip: &mut Strip<'_>) {
    let mut done = 0;
    if let Some(token) = token.matrices.filter(|_| strip.tokens() >= matrices::TOKENS) {
        by_parts!(w.form.bits, many_int8)(token, w, x, starts, strip);
        done = strip.tokens() / matrices::TOKENS * matrices::TOKENS;
    }
    match token.dot {
        Some(dot) => by_parts!(w.form.bits, strip_int8)(dot, w, x, starts, done, strip),
        None => by_parts!(w.form.bits, strip_int8)(Widened, w, x, starts, done, strip),
    }
}

/// [`super::scalar::full`].
pub(super) fn full(_: Neon, w: &Packed<'_>, x: &[f32], sums: &[f32], strip: &mut Strip<'_>) {
    by_parts!(w.form.bits, strip_full)(w, x, sums, strip);
}

/// How products of bytes are folded.
trait Fold: Copy {
    /// Whether codes of eight bits are centred already.
    const CENTRED: bool;

    /// Adds the products of one chunk to sums, a row each.
    fn chunk<const LOW: u32, const HIGH: u32, const T: usize>(
        self,
        codes: &[u8],
        x: [&[i8; CHUNK]; T],
        sum: &mut [Sums; T],
    );
}

impl Fold for Dot {
    const CENTRED: bool = true;

    #[inline(always)]
    fn chunk<const LOW: u32, const HIGH: u32, const T: usize>(
        self,
        codes: &[u8],
        x: [&[i8; CHUNK]; T],
        sum: &mut [Sums; T],
    ) {
        // SAFETY: every CPU of the target has NEON.
        unsafe { chunk_dot::<LOW, HIGH, T>(self, codes, x, sum) }
    }
}

/// Without dot products.
#[derive(Clone, Copy)]
struct Widened;

impl Fold for Widened {
    const CENTRED: bool = false;

    #[inline(always)]
    fn chunk<const LOW: u32, const HIGH: u32, const T: usize>(
        self,
        codes: &[u8],
        x: [&[i8; CHUNK]; T],
        sum: &mut [Sums; T],
    ) {
        // SAFETY: every CPU of the target has NEON.
        unsafe { chunk_widened::<LOW, HIGH, T>(codes, x, sum) }
    }
}

/// Goes over the blocks of a strip, a few tokens from one on at a time: their inputs stay in the first cache and the strip's codes
/// in the second.
fn strip_int8<const LOW: u32, const HIGH: u32>(
    fold: impl Fold,
    w: &Packed<'_>,
    x: &Rounded<'_>,
    starts: &[i32],
    mut token: usize,
    strip: &mut Strip<'_>,
) {
    while token < strip.tokens() {
        let many = strip.tokens() - token >= TOKENS;
        for block in strip.rows.start / LANES..strip.rows.end.div_ceil(LANES) {
            let at = [token, block];
            // SAFETY: every CPU of the target has NEON.
            unsafe {
                if many {
                    put([block_int8::<LOW, HIGH, TOKENS>(fold, w, x, starts, at)], at, strip);
                } else {
                    put([block_int8::<LOW, HIGH, 1>(fold, w, x, starts, at)], at, strip);
                }
            }
        }
        token += if many { TOKENS } else { 1 };
    }
}

/// A multiply-add takes four cycles and waits for the one before it, so that many sums are under way: of as many tokens, or
/// of as many blocks.
fn strip_full<const LOW: u32, const HIGH: u32>(w: &Packed<'_>, x: &[f32], sums: &[f32], strip: &mut Strip<'_>) {
    let end = strip.rows.end.div_ceil(LANES);
    let mut token = 0;
    while token < strip.tokens() {
        let count = match strip.tokens() - token {
            MANY.. => MANY,
            TOKENS.. => TOKENS,
            _ => 1,
        };
        let mut block = strip.rows.start / LANES;
        while block < end {
            let at = [token, block];
            let blocks = if count == 1 && end - block >= BLOCKS { BLOCKS } else { 1 };
            // SAFETY: every CPU of the target has NEON.
            unsafe {
                match (count, blocks) {
                    (MANY, _) => put(blocks_full::<LOW, HIGH, MANY, 1>(w, x, sums, at), at, strip),
                    (TOKENS, _) => put(blocks_full::<LOW, HIGH, TOKENS, 1>(w, x, sums, at), at, strip),
                    (_, BLOCKS) => put(blocks_full::<LOW, HIGH, 1, BLOCKS>(w, x, sums, at), at, strip),
                    _ => put(blocks_full::<LOW, HIGH, 1, 1>(w, x, sums, at), at, strip),
                }
            }
            block += blocks;
        }
        token += count;
    }
}

/// Writes what `N` blocks from `block` on are for `T` tokens from `token` on.
#[inline]
#[target_feature(enable = "neon")]
fn put<const T: usize, const N: usize>(y: [[Rows; T]; N], [token, block]: [usize; 2], strip: &mut Strip<'_>) {
    for (n, y) in y.iter().enumerate() {
        for (t, [low, high]) in y.iter().enumerate() {
            let mut lanes = [0.0f32; LANES];
            // SAFETY: four numbers are there, and four after them.
            unsafe {
                vst1q_f32(lanes.as_mut_ptr(), *low);
                vst1q_f32(lanes[4..].as_mut_ptr(), *high);
            }
            strip.put(token + t, (block + n) * LANES, &lanes);
        }
    }
}

/// Eight rows for `T` tokens.
#[inline]
#[target_feature(enable = "neon")]
fn block_int8<const LOW: u32, const HIGH: u32, const T: usize>(
    fold: impl Fold,
    w: &Packed<'_>,
    x: &Rounded<'_>,
    starts: &[i32],
    [token, block]: [usize; 2],
) -> [Rows; T] {
    let bytes = 32 * (LOW + HIGH) as usize;
    let (form, mut walk) = (&w.form, w.form.walk());
    let codes = w.block(block);
    let values = x.values.as_chunks::<CHUNK>().0;
    let values: [&[[i8; CHUNK]]; T] = by_token(values, token, form.chunks());
    let scales: [&[f32]; T] = by_token(x.scales, token, form.spans());
    let starts: [&[i32]; T] = by_token(starts, token, form.pieces());
    let mut y = [[vdupq_n_f32(0.0); 2]; T];
    let (mut chunk, mut piece) = (0, 0);
    let mut span = 0;
    while span < form.spans() {
        let mut sum = [[vdupq_n_f32(0.0); 2]; T];
        let end_of_span = form.end_of_span(span);
        while chunk < end_of_span {
            let (group, end) = walk.next(end_of_span);
            let mut dots = [[vdupq_n_s32(0); 2]; T];
            if LOW + HIGH < 8 || !centred(fold) {
                for t in 0..T {
                    dots[t] = [vdupq_n_s32(starts[t][piece]); 2];
                }
            }
            while chunk < end {
                let inputs = std::array::from_fn(|t| &values[t][chunk]);
                fold.chunk::<LOW, HIGH, T>(codes.chunk(chunk * codes.step, bytes), inputs, &mut dots);
                chunk += 1;
            }
            let params = params(w, codes.param(group));
            for t in 0..T {
                sum[t] = add_piece(w, sum[t], dots[t], starts[t][piece], params);
            }
            piece += 1;
        }
        for t in 0..T {
            for half in 0..2 {
                y[t][half] = vfmaq_n_f32(y[t][half], sum[t][half], scales[t][span]);
            }
        }
        span += 1;
    }
    y
}

/// Adds a piece of a span to its sums.
#[inline]
#[target_feature(enable = "neon")]
fn add_piece(w: &Packed<'_>, mut sum: Rows, dots: Sums, start: i32, [scale, zero]: [Rows; 2]) -> Rows {
    for half in 0..2 {
        let mut dot = vcvtq_f32_s32(dots[half]);
        if !w.zeros.is_empty() {
            // How far zero points lie from the middle, in middles, is what starts are multiplied by, to be taken off by them.
            let per_middle = 1.0 / w.form.middle() as f32;
            let from_middle = vfmaq_n_f32(vdupq_n_f32(-1.0), zero[half], per_middle);
            dot = vfmaq_n_f32(dot, from_middle, start as f32);
        }
        sum[half] = vfmaq_f32(sum[half], dot, scale[half]);
    }
    sum
}

/// Whether `fold` centres codes of eight bits.
const fn centred<F: Fold>(_: F) -> bool {
    F::CENTRED
}

/// Adds scale · (sum − zero · total) of one group.
#[inline]
#[target_feature(enable = "neon")]
fn add_group(mut y: Rows, sum: Rows, total: f32, [scale, zero]: [Rows; 2]) -> Rows {
    for half in 0..2 {
        let centred = vfmsq_n_f32(sum[half], zero[half], total);
        y[half] = vfmaq_f32(y[half], centred, scale[half]);
    }
    y
}

/// Adds the products of one chunk by dot products.
#[inline]
#[target_feature(enable = "neon")]
fn chunk_dot<const LOW: u32, const HIGH: u32, const T: usize>(
    dot: Dot,
    codes: &[u8],
    x: [&[i8; CHUNK]; T],
    sum: &mut [Sums; T],
) {
    let mut inputs = [[vdupq_n_s8(0); 2]; T];
    for t in 0..T {
        // SAFETY: sixteen numbers are there, and sixteen after them.
        inputs[t] = unsafe { [vld1q_s8(x[t].as_ptr()), vld1q_s8(x[t][16..].as_ptr())] };
    }
    each_vector!(add_quads::<LOW, HIGH, T>(dot, codes, &inputs, sum));
}

/// Adds the four columns of vector `J`.
#[inline]
#[target_feature(enable = "neon")]
fn add_quads<const LOW: u32, const HIGH: u32, const T: usize, const J: usize>(
    dot: Dot,
    codes: &[u8],
    x: &[[int8x16_t; 2]; T],
    sum: &mut [Sums; T],
) {
    let codes = code_bytes::<LOW, HIGH, J>(codes);
    for half in 0..2 {
        let codes = if LOW + HIGH == 8 { veorq_u8(codes[half], vdupq_n_u8(0x80)) } else { codes[half] };
        for t in 0..T {
            sum[t][half] = sdot::<J>(dot, sum[t][half], vreinterpretq_s8_u8(codes), x[t][J / 4]);
        }
    }
}

/// Adds to each lane its four products of `codes` with the four bytes of lane `J % 4` of `x`. What the standard library calls
/// `vdotq_laneq_s32` became stable later than the oldest compiler supported here.
#[inline(always)]
fn sdot<const J: usize>(_: Dot, mut sum: int32x4_t, codes: int8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: the token proves the instruction, which touches nothing but its operands.
    unsafe {
        asm!(
            ".arch_extension dotprod",
            "sdot {sum:v}.4s, {codes:v}.16b, {x:v}.4b[{lane}]",
            sum = inout(vreg) sum,
            codes = in(vreg) codes,
            x = in(vreg) x,
            lane = const J % 4,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

/// Adds the products of one chunk by products of sixteen bits.
#[inline]
#[target_feature(enable = "neon")]
fn chunk_widened<const LOW: u32, const HIGH: u32, const T: usize>(
    codes: &[u8],
    x: [&[i8; CHUNK]; T],
    sum: &mut [Sums; T],
) {
    let (low, high) = codes.split_at(32 * LOW as usize);
    let low = widened::<LOW, T>(low, x);
    for t in 0..T {
        for half in 0..2 {
            sum[t][half] = vaddq_s32(sum[t][half], low[t][half]);
        }
    }
    if HIGH > 0 {
        let high = widened::<HIGH, T>(high, x);
        for t in 0..T {
            for half in 0..2 {
                sum[t][half] = vaddq_s32(sum[t][half], vshlq_n_s32::<4>(high[t][half]));
            }
        }
    }
}

/// Sums of one chunk over codes of `B` bits.
#[inline]
#[target_feature(enable = "neon")]
fn widened<const B: u32, const T: usize>(codes: &[u8], x: [&[i8; CHUNK]; T]) -> [Sums; T] {
    let mut columns = [[vdupq_n_s16(0); 4]; T];
    each_vector!(add_widened::<B, T>(codes, &x, &mut columns));
    let mut sum = [[vdupq_n_s32(0); 2]; T];
    for t in 0..T {
        let [a, b, c, d] = columns[t].map(|two_rows| vpaddlq_s16(two_rows));
        sum[t] = [vpaddq_s32(a, b), vpaddq_s32(c, d)];
    }
    sum
}

/// Adds the four columns of vector `J`, each by itself, of two rows in a register.
#[inline]
#[target_feature(enable = "neon")]
fn add_widened<const B: u32, const T: usize, const J: usize>(
    codes: &[u8],
    x: &[&[i8; CHUNK]; T],
    columns: &mut [[int16x8_t; 4]; T],
) {
    let codes = vector::<B, J>(codes);
    for t in 0..T {
        let quad =
            i32::from_le_bytes([x[t][4 * J], x[t][4 * J + 1], x[t][4 * J + 2], x[t][4 * J + 3]].map(|v| v as u8));
        let x = vreinterpretq_s8_s32(vdupq_n_s32(quad));
        for half in 0..2 {
            let codes = vreinterpretq_s8_u8(codes[half]);
            let [first, second] = [columns[t][2 * half], columns[t][2 * half + 1]];
            columns[t][2 * half] = vmlal_s8(first, vget_low_s8(codes), vget_low_s8(x));
            columns[t][2 * half + 1] = vmlal_high_s8(second, codes, x);
        }
    }
}

/// `N` blocks of eight rows for `T` tokens.
#[inline]
#[target_feature(enable = "neon")]
fn blocks_full<const LOW: u32, const HIGH: u32, const T: usize, const N: usize>(
    w: &Packed<'_>,
    x: &[f32],
    sums: &[f32],
    [token, block]: [usize; 2],
) -> [[Rows; T]; N] {
    let bytes = 32 * (LOW + HIGH) as usize;
    let (chunks, groups) = (w.form.chunks(), w.form.groups());
    let codes: [Block<'_>; N] = std::array::from_fn(|n| w.block(block + n));
    let values = x.as_chunks::<CHUNK>().0;
    let values: [&[[f32; CHUNK]]; T] = by_token(values, token, chunks);
    let mut y = [[[vdupq_n_f32(0.0); 2]; T]; N];
    for group in 0..groups {
        let mut sum = [[[vdupq_n_f32(0.0); 2]; T]; N];
        for chunk in w.form.chunks_of(group) {
            let inputs: [&[f32; CHUNK]; T] = std::array::from_fn(|t| &values[t][chunk]);
            let these: [&[u8]; N] = std::array::from_fn(|n| codes[n].chunk(chunk * codes[n].step, bytes));
            each_vector!(add_columns::<LOW, HIGH, T, N>(&these, &inputs, &mut sum));
        }
        for n in 0..N {
            let params = params(w, codes[n].param(group));
            for t in 0..T {
                y[n][t] = add_group(y[n][t], sum[n][t], sums[(token + t) * groups + group], params);
            }
        }
    }
    y
}

/// Adds the four columns of vector `J`, one after another.
#[inline]
#[target_feature(enable = "neon")]
fn add_columns<const LOW: u32, const HIGH: u32, const T: usize, const N: usize, const J: usize>(
    codes: &[&[u8]; N],
    x: &[&[f32; CHUNK]; T],
    sum: &mut [[Rows; T]; N],
) {
    let mut quads = [vdupq_n_f32(0.0); T];
    for t in 0..T {
        let quad = &x[t][4 * J..][..4];
        // SAFETY: four numbers are there.
        quads[t] = unsafe { vld1q_f32(quad.as_ptr()) };
    }
    for n in 0..N {
        for (half, codes) in code_bytes::<LOW, HIGH, J>(codes[n]).into_iter().enumerate() {
            let columns = numbers(vreinterpretq_u32_u8(codes));
            for t in 0..T {
                let mut s = sum[n][t][half];
                s = vfmaq_laneq_f32::<0>(s, columns[0], quads[t]);
                s = vfmaq_laneq_f32::<1>(s, columns[1], quads[t]);
                s = vfmaq_laneq_f32::<2>(s, columns[2], quads[t]);
                sum[n][t][half] = vfmaq_laneq_f32::<3>(s, columns[3], quads[t]);
            }
        }
    }
}

/// The four bytes of every lane as numbers: each stays where it is, and its conversion is told how many bits lie below.
#[inline]
#[target_feature(enable = "neon")]
fn numbers(v: uint32x4_t) -> [float32x4_t; 4] {
    let byte = |mask| vandq_u32(v, vdupq_n_u32(mask));
    [
        vcvtq_f32_u32(byte(0xff)),
        vcvtq_n_f32_u32::<8>(byte(0xff00)),
        vcvtq_n_f32_u32::<16>(byte(0xff_0000)),
        vcvtq_n_f32_u32::<24>(byte(0xff00_0000)),
    ]
}

/// Vector `J` of a chunk, a code in each byte.
#[inline]
#[target_feature(enable = "neon")]
fn code_bytes<const LOW: u32, const HIGH: u32, const J: usize>(codes: &[u8]) -> [uint8x16_t; 2] {
    let (low, high) = codes.split_at(32 * LOW as usize);
    let mut v = vector::<LOW, J>(low);
    if HIGH > 0 {
        let high = vector::<HIGH, J>(high);
        for half in 0..2 {
            v[half] = vsliq_n_u8::<4>(v[half], high[half]);
        }
    }
    v
}

/// Vector `J` of a part of a chunk, `B` bits in each byte.
#[inline]
#[target_feature(enable = "neon")]
fn vector<const B: u32, const J: usize>(bytes: &[u8]) -> [uint8x16_t; 2] {
    match B {
        4 => low_bits::<4>(bytes, J % 4, J / 4 * 4),
        2 => low_bits::<2>(bytes, J % 2, J / 2 * 2),
        3 => {
            let (mut v, top) = (low_bits::<2>(bytes, J % 2, J / 2 * 2), low_bits::<1>(bytes, 2, J));
            for half in 0..2 {
                v[half] = vsliq_n_u8::<2>(v[half], top[half]);
            }
            v
        }
        _ => low_bits::<1>(bytes, 0, J),
    }
}

/// `B` bits of every byte of the `i`th vector, from bit `from` on.
#[inline]
#[target_feature(enable = "neon")]
fn low_bits<const B: u32>(bytes: &[u8], i: usize, from: usize) -> [uint8x16_t; 2] {
    let bytes = &bytes[32 * i..][..32];
    // SAFETY: sixteen bytes are there, and sixteen after them.
    let v = unsafe { [vld1q_u8(bytes.as_ptr()), vld1q_u8(bytes[16..].as_ptr())] };
    v.map(|v| {
        let v = match from {
            0 => v,
            1 => vshrq_n_u8::<1>(v),
            2 => vshrq_n_u8::<2>(v),
            3 => vshrq_n_u8::<3>(v),
            4 => vshrq_n_u8::<4>(v),
            5 => vshrq_n_u8::<5>(v),
            6 => vshrq_n_u8::<6>(v),
            _ => vshrq_n_u8::<7>(v),
        };
        // A shift leaves nothing above the topmost bits.
        if from + B as usize == 8 { v } else { vandq_u8(v, vdupq_n_u8(((1u32 << B) - 1) as u8)) }
    })
}

/// Scales and zero points of eight rows.
#[inline]
#[target_feature(enable = "neon")]
fn params(w: &Packed<'_>, at: usize) -> [Rows; 2] {
    let halves = |s: &[u16]| {
        let s = &s[at..][..LANES];
        // SAFETY: eight numbers are there.
        unsafe { vld1q_u16(s.as_ptr()) }
    };
    let scale = match w.scales {
        Scales::F32(s) => {
            let s = &s[at..][..LANES];
            // SAFETY: four numbers are there, and four after them.
            unsafe { [vld1q_f32(s.as_ptr()), vld1q_f32(s[4..].as_ptr())] }
        }
        Scales::F16(s) => {
            let bits = vreinterpretq_f16_u16(halves(s));
            [vcvt_f32_f16(vget_low_f16(bits)), vcvt_high_f32_f16(bits)]
        }
        Scales::Bf16(s) => {
            let bits = halves(s);
            [vshll_n_u16::<16>(vget_low_u16(bits)), vshll_high_n_u16::<16>(bits)].map(|v| vreinterpretq_f32_u32(v))
        }
    };
    let zero = if w.zeros.is_empty() {
        [vdupq_n_f32((1u32 << (w.form.bits - 1)) as f32); 2]
    } else {
        let z = &w.zeros[at..][..LANES];
        // SAFETY: eight bytes are there.
        let z = vmovl_u8(unsafe { vld1_u8(z.as_ptr()) });
        [vmovl_u16(vget_low_u16(z)), vmovl_high_u16(z)].map(|v| vcvtq_f32_u32(v))
    };
    [scale, zero]
}
