//! Blocks with one scale, whose bytes hold whole codes, neighbours or those of two halves: packed many at once by loops of fixed size,
//! which compilers turn into vectors. The bits lie as the fields say.

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
