//! Blocks with one scale, whose bytes hold whole codes, neighbours or those of parts, or digits of a number in base three: packed many at
//! once by loops of fixed size, which compilers turn into vectors. The bits lie as the fields say.

use super::half_bits;
use bitmill_scheme::BlockType;

/// Weights of most of the blocks.
const LEN: usize = 32;

/// Packs whole blocks of the types made so; `false` for others.
pub(super) fn pack(kind: BlockType, codes: &[u8], (reals, integers): (&[f32], &[u8]), out: &mut [u8]) -> bool {
    match kind {
        BlockType::Q8_0 => {
            let bytes = |codes: &[u8; LEN], out: &mut [u8]| out.iter_mut().zip(codes).for_each(|(o, c)| *o = c ^ 0x80);
            blocks::<LEN, 34, 1>(codes, reals, out, bytes);
        }
        BlockType::Q4_0 | BlockType::Iq4Nl => blocks::<LEN, 18, 1>(codes, reals, out, nibbles),
        BlockType::Q4_1 => blocks::<LEN, 20, 2>(codes, reals, out, nibbles),
        BlockType::Q5_0 => blocks::<LEN, 22, 1>(codes, reals, out, fives),
        BlockType::Q5_1 => blocks::<LEN, 24, 2>(codes, reals, out, fives),
        BlockType::Q2_0 => blocks::<64, 18, 1>(codes, reals, out, pairs),
        BlockType::Q1_0 => blocks::<128, 18, 1>(codes, reals, out, bits),
        BlockType::Tq1_0 => scaled_last::<54>(codes, reals, out, ternary),
        BlockType::Tq2_0 => scaled_last::<66>(codes, reals, out, quarters),
        BlockType::Mxfp4 => {
            let each = out.as_chunks_mut::<17>().0.iter_mut().zip(codes.as_chunks::<LEN>().0);
            for (([exponent, rest @ ..], codes), integer) in each.zip(integers) {
                *exponent = *integer;
                nibbles(codes, rest);
            }
        }
        _ => return false,
    }
    true
}

/// Blocks of so many weights and bytes, of which the `REALS` half-precision numbers come first and `rest` fills the others.
#[inline(always)]
fn blocks<const LEN: usize, const BYTES: usize, const REALS: usize>(
    codes: &[u8],
    reals: &[f32],
    out: &mut [u8],
    rest: impl Fn(&[u8; LEN], &mut [u8]),
) {
    let each = out.as_chunks_mut::<BYTES>().0.iter_mut().zip(codes.as_chunks::<LEN>().0);
    for ((out, codes), reals) in each.zip(reals.as_chunks::<REALS>().0) {
        let (head, tail) = out.split_at_mut(2 * REALS);
        head.as_chunks_mut::<2>().0.iter_mut().zip(reals).for_each(|(o, &r)| *o = half_bits(r).to_le_bytes());
        rest(codes, tail);
    }
}

/// As [`blocks`] of 256 weights, with their one real number last.
#[inline(always)]
fn scaled_last<const BYTES: usize>(codes: &[u8], reals: &[f32], out: &mut [u8], rest: impl Fn(&[u8; 256], &mut [u8])) {
    let each = out.as_chunks_mut::<BYTES>().0.iter_mut().zip(codes.as_chunks::<256>().0);
    for ((out, codes), &real) in each.zip(reals) {
        let (head, tail) = out.split_at_mut(BYTES - 2);
        tail.copy_from_slice(&half_bits(real).to_le_bytes());
        rest(codes, head);
    }
}

/// Of each half, code j, j + 32, j + 64 and j + 96 in byte j.
#[inline(always)]
fn quarters(codes: &[u8; 256], out: &mut [u8]) {
    for (out, codes) in out.as_chunks_mut::<LEN>().0.iter_mut().zip(codes.as_chunks::<128>().0) {
        let codes = codes.as_chunks::<LEN>().0;
        for (i, o) in out.iter_mut().enumerate() {
            *o = codes[0][i] | codes[1][i] << 2 | codes[2][i] << 4 | codes[3][i] << 6;
        }
    }
}

/// Five digits in a byte: of 160 codes in 32, of 80 in 16, and the last 16 four and four.
#[inline(always)]
fn ternary(codes: &[u8; 256], out: &mut [u8]) {
    digits::<32, 5>(&codes[..160], &mut out[..32]);
    digits::<16, 5>(&codes[160..240], &mut out[32..48]);
    digits::<4, 4>(&codes[240..], &mut out[48..]);
}

/// Digits fill a byte as the fraction 0.d₁d₂d₃d₄d₅ in base 3, rounded up to 8 bits, so that multiplying by 3 brings out
/// one digit after another. The n-th of each byte lie side by side; a fifth that is missing is zero.
#[inline(always)]
fn digits<const BYTES: usize, const DIGITS: usize>(codes: &[u8], out: &mut [u8]) {
    let mut numbers = [0u16; BYTES];
    for codes in &codes.as_chunks::<BYTES>().0[..DIGITS] {
        numbers.iter_mut().zip(codes).for_each(|(number, &code)| *number = *number * 3 + u16::from(code));
    }
    let place = if DIGITS < 5 { 3 } else { 1 };
    out.iter_mut().zip(numbers).for_each(|(o, number)| *o = (number * place * 256).div_ceil(243) as u8);
}

/// Four neighbours in a byte.
#[inline(always)]
fn pairs(codes: &[u8; 64], out: &mut [u8]) {
    for (o, [a, b, c, d]) in out.iter_mut().zip(codes.as_chunks::<4>().0) {
        *o = a | b << 2 | c << 4 | d << 6;
    }
}

/// Eight neighbours in a byte, each multiplied to its place in the highest byte.
#[inline(always)]
fn bits(codes: &[u8; 128], out: &mut [u8]) {
    for (o, codes) in out.iter_mut().zip(codes.as_chunks::<8>().0) {
        *o = (u64::from_le_bytes(*codes).wrapping_mul(0x0102_0408_1020_4080) >> 56) as u8;
    }
}

/// Code j in the lower half of byte j, code j + 16 in the upper.
#[inline(always)]
fn nibbles(codes: &[u8; LEN], out: &mut [u8]) {
    let (low, high) = codes.split_at(LEN / 2);
    let mut bytes = [0; LEN / 2];
    for (o, (a, b)) in bytes.iter_mut().zip(low.iter().zip(high)) {
        *o = a & 15 | b << 4;
    }
    out.copy_from_slice(&bytes);
}

/// The fifth bits, then [`nibbles`] of the others.
#[inline(always)]
fn fives(codes: &[u8; LEN], out: &mut [u8]) {
    let (fifths, rest) = out.split_at_mut(LEN / 8);
    fifths.copy_from_slice(&bitmill_kernels::fifths(codes).to_le_bytes());
    nibbles(codes, rest);
}
