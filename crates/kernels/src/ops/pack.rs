//! Dense bitstreams of codes: element `j` of a row occupies bits `[j·b, (j+1)·b)` of little-endian 32-bit words.
//!
//! This is the layout of compressed-tensors' `pack-quantized` (rows) and of GPTQ (columns), for every width.

use crate::Level;
use crate::level::at_level;

/// Words that hold `codes` codes of `bits` bits.
#[must_use]
pub const fn packed_words(codes: usize, bits: u32) -> usize {
    (codes * bits as usize).div_ceil(32)
}

/// Packs `codes`, each below `2^bits`, into `out`; unused high bits of the last word are zero.
///
/// # Panics
/// When `bits` is outside 1 to 8 or `out` is not [`packed_words`] long: a caller's bug.
pub fn pack_bits(codes: &[u8], bits: u32, out: &mut [u32]) {
    assert!((1..=8).contains(&bits), "bits {bits}");
    assert_eq!(out.len(), packed_words(codes.len(), bits), "packed length");
    let level = Level::best();
    match bits {
        1 => at_level!(level, pack::<1>, (codes: &[u8], out: &mut [u32])),
        2 => at_level!(level, pack::<2>, (codes: &[u8], out: &mut [u32])),
        3 => at_level!(level, pack::<3>, (codes: &[u8], out: &mut [u32])),
        4 => at_level!(level, pack::<4>, (codes: &[u8], out: &mut [u32])),
        5 => at_level!(level, pack::<5>, (codes: &[u8], out: &mut [u32])),
        6 => at_level!(level, pack::<6>, (codes: &[u8], out: &mut [u32])),
        7 => at_level!(level, pack::<7>, (codes: &[u8], out: &mut [u32])),
        _ => at_level!(level, pack::<8>, (codes: &[u8], out: &mut [u32])),
    }
}

/// Codes that fill words whatever their width.
const WHOLE: usize = 32;

#[inline(always)]
fn pack<const BITS: usize>(codes: &[u8], out: &mut [u32]) {
    let (whole, rest) = codes.as_chunks::<WHOLE>();
    let (words, last) = out.split_at_mut(whole.len() * BITS);
    for (words, codes) in words.as_chunks_mut::<BITS>().0.iter_mut().zip(whole) {
        let mut bytes = [[0u8; BITS]; 4];
        for (bytes, codes) in bytes.iter_mut().zip(codes.as_chunks::<8>().0) {
            bytes.copy_from_slice(&together::<BITS>(*codes).to_le_bytes()[..BITS]);
        }
        for (word, bytes) in words.iter_mut().zip(bytes.as_flattened().as_chunks::<4>().0) {
            *word = u32::from_le_bytes(*bytes);
        }
    }
    let (mut buffer, mut filled) = (0u64, 0usize);
    let mut words = last.iter_mut();
    for &code in rest {
        buffer |= u64::from(code) << filled;
        filled += BITS;
        if filled >= 32 {
            if let Some(word) = words.next() {
                *word = buffer as u32;
            }
            buffer >>= 32;
            filled -= 32;
        }
    }
    if let Some(word) = words.next() {
        *word = buffer as u32;
    }
}

/// Eight codes without the bits between them: neighbours, then neighbouring pairs, then both fours move together.
#[inline(always)]
fn together<const BITS: usize>(codes: [u8; 8]) -> u64 {
    let x = u64::from_le_bytes(codes);
    let x = x & 0x00ff_00ff_00ff_00ff | (x >> (8 - BITS)) & (0x00ff_00ff_00ff_00ff << BITS);
    let x = x & 0x0000_ffff_0000_ffff | (x >> (16 - 2 * BITS)) & (0x0000_ffff_0000_ffff << (2 * BITS));
    x & 0xffff_ffff | (x >> (32 - 4 * BITS)) & (0xffff_ffff << (4 * BITS))
}

/// Unpacks `out.len()` codes of `bits` bits from `words`.
///
/// # Panics
/// When `bits` is outside 1 to 8 or `words` is shorter than [`packed_words`]: a caller's bug.
pub fn unpack_bits(words: &[u32], bits: u32, out: &mut [u8]) {
    assert!((1..=8).contains(&bits), "bits {bits}");
    assert!(words.len() >= packed_words(out.len(), bits), "packed length");
    let mask = (1u32 << bits) - 1;
    if 32 % bits == 0 {
        let per_word = (32 / bits) as usize;
        for (&word, chunk) in words.iter().zip(out.chunks_mut(per_word)) {
            let mut rest = word;
            for code in chunk {
                *code = (rest & mask) as u8;
                rest >>= bits;
            }
        }
        return;
    }
    let (mut buffer, mut filled) = (0u64, 0u32);
    let mut words = words.iter();
    for code in out {
        if filled < bits {
            buffer |= u64::from(words.next().copied().unwrap_or(0)) << filled;
            filled += 32;
        }
        *code = (buffer as u32 & mask) as u8;
        buffer >>= bits;
        filled -= bits;
    }
}

/// Bit 4 of every byte of `codes`, the first in the lowest place.
#[must_use]
#[inline]
pub fn fifths(codes: &[u8; 32]) -> u32 {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::*;
        let [low, high] = [0, 16].map(|from| {
            // SAFETY: SSE2 is part of the architecture, and sixteen bytes lie from there on. Bit 4 moves to the top of its byte.
            unsafe { _mm_movemask_epi8(_mm_slli_epi16::<3>(_mm_loadu_si128(codes.as_ptr().add(from).cast()))) as u32 }
        });
        low | high << 16
    }
    #[cfg(target_arch = "aarch64")]
    {
        use std::arch::aarch64::*;
        const PLACES: [u8; 16] = [1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128];
        // SAFETY: NEON is part of the architecture, and sixteen bytes lie from wherever they are loaded.
        unsafe {
            let places = vld1q_u8(PLACES.as_ptr());
            // Each byte whose bit 4 is set becomes its place among eight, and eight neighbours are added up.
            let placed = |from| vandq_u8(vtstq_u8(vld1q_u8(codes.as_ptr().add(from)), vdupq_n_u8(16)), places);
            let pairs = vpaddq_u8(placed(0), placed(16));
            let fours = vpaddq_u8(pairs, pairs);
            vgetq_lane_u32::<0>(vreinterpretq_u32_u8(vpaddq_u8(fours, fours)))
        }
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    fifths_plainly(codes)
}

/// The definition of [`fifths`].
#[cfg(any(test, not(any(target_arch = "x86_64", target_arch = "aarch64"))))]
fn fifths_plainly(codes: &[u8; 32]) -> u32 {
    codes.iter().enumerate().fold(0, |bits, (i, code)| bits | u32::from(code >> 4 & 1) << i)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fifth_bits_are_those_of_the_definition() {
        for seed in 0..40u32 {
            let codes = std::array::from_fn(|i| (((i as u32 + seed * 31).wrapping_mul(2_654_435_761)) >> 17) as u8);
            assert_eq!(fifths(&codes), fifths_plainly(&codes));
        }
    }
    use proptest::prelude::*;

    /// The definition: one bit at a time.
    fn by_bits(codes: &[u8], bits: u32) -> Vec<u32> {
        let mut out = vec![0u32; packed_words(codes.len(), bits)];
        for (j, &code) in codes.iter().enumerate() {
            for k in 0..bits as usize {
                let at = j * bits as usize + k;
                out[at / 32] |= u32::from(code >> k & 1) << (at % 32);
            }
        }
        out
    }

    #[test]
    fn golden_words() {
        let ramp: Vec<u8> = (0..32).map(|j| j % 8).collect();
        let mut out = [0; 3];
        pack_bits(&ramp, 3, &mut out);
        assert_eq!(out, [0x88fa_c688, 0xc688_fac6, 0xfac6_88fa]);
        let mut out = [0; 1];
        pack_bits(&[15, 0, 8, 7, 1, 14, 3, 12], 4, &mut out);
        assert_eq!(out, [0xc3e1_780f]);
    }

    proptest! {
        #[test]
        fn packing_equals_the_definition_and_inverts(bits in 1u32..=8, raw in prop::collection::vec(any::<u8>(), 0..300)) {
            let codes: Vec<u8> = raw.iter().map(|c| c & ((1u16 << bits) - 1) as u8).collect();
            let mut words = vec![0xffff_ffff; packed_words(codes.len(), bits)];
            pack_bits(&codes, bits, &mut words);
            prop_assert_eq!(&words, &by_bits(&codes, bits));
            let mut back = vec![0xff; codes.len()];
            unpack_bits(&words, bits, &mut back);
            prop_assert_eq!(back, codes);
        }
    }
}
