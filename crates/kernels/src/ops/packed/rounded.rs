//! Activations rounded to eight bits.

#[cfg(target_arch = "aarch64")]
use super::neon;
use super::{CHUNK, MANY, ROUNDING, SPAN};
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};
use crate::Level;
use crate::team::each;
use std::sync::{Mutex, PoisonError};

/// Activations rounded to eight bits, [`SPAN`] of a token sharing a scale; columns are padded to whole chunks.
#[derive(Debug, Clone, Copy)]
pub struct Rounded<'a> {
    /// `[tokens, chunks · CHUNK]`.
    pub values: &'a [i8],
    /// `[tokens, spans]`.
    pub scales: &'a [f32],
    /// The sum of the values of each chunk, `[tokens, chunks]`.
    pub sums: &'a [i32],
}

/// Where [`round_activations`] puts what it makes, as [`Rounded`] has it.
#[derive(Debug)]
pub struct RoundedMut<'a> {
    /// `[tokens, chunks · CHUNK]`.
    pub values: &'a mut [i8],
    /// `[tokens, spans]`.
    pub scales: &'a mut [f32],
    /// `[tokens, chunks]`.
    pub sums: &'a mut [i32],
}

/// Rounds `x: [tokens, cols]` for [`packed_product_int8`]: x ≈ scale · value, scale = max |x| / 127, to nearest even.
///
/// # Panics
/// When a length does not fit: a caller's bug.
pub fn round_activations(level: Level, x: &[f32], cols: usize, out: RoundedMut<'_>) {
    let (tokens, chunks, spans) = (x.len() / cols, cols.div_ceil(CHUNK), cols.div_ceil(SPAN));
    let RoundedMut { values, scales, sums } = out;
    assert!(x.len().is_multiple_of(cols) && scales.len() == tokens * spans, "activation lengths");
    assert!(sums.len() == tokens * chunks && values.len() == sums.len() * CHUNK, "activation lengths");
    let some = |x: &[f32], out: RoundedMut<'_>| match level {
        Level::Scalar => round(x, cols, out),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2(token) => avx2::round(token, x, cols, out),
        #[cfg(target_arch = "x86_64")]
        Level::Avx512(token) => avx512::round(token, x, cols, out),
        #[cfg(target_arch = "aarch64")]
        Level::Neon(token) => neon::round(token, x, cols, out),
        #[cfg(target_arch = "x86_64")]
        Level::Amx(token) => avx512::round(token.avx512(), x, cols, out),
    };
    if x.len() <= MANY * cols {
        return some(x, RoundedMut { values, scales, sums });
    }
    let values = values.chunks_mut(MANY * chunks * CHUNK);
    let parts = values.zip(scales.chunks_mut(MANY * spans)).zip(sums.chunks_mut(MANY * chunks));
    let parts: Vec<_> = x.chunks(MANY * cols).zip(parts).map(Mutex::new).collect();
    each(parts.len(), ROUNDING * x.len(), |i| {
        // Each is taken once.
        let mut part = parts[i].lock().unwrap_or_else(PoisonError::into_inner);
        let (x, ((values, scales), sums)) = &mut *part;
        some(x, RoundedMut { values, scales, sums });
    });
}

/// 1.5·2²³: adding it leaves a number below 2²² rounded to an integer in the low bits.
pub(super) const ROUNDER: f32 = 12_582_912.0;

/// Loops where iterators would do, since levels compile this for their instructions and closures are compiled for less; and
/// magnitudes as integers, whose order is that of the numbers, since the largest of floats is found one by one.
#[inline(always)]
pub(super) fn round(x: &[f32], cols: usize, out: RoundedMut<'_>) {
    let (chunks, spans) = (cols.div_ceil(CHUNK), cols.div_ceil(SPAN));
    for token in 0..x.len() / cols {
        for span in 0..spans {
            let from = span * SPAN;
            let (x, width) = (&x[token * cols..][from..cols.min(from + SPAN)], SPAN.min(chunks * CHUNK - from));
            let mut padded = [0.0f32; SPAN];
            padded[..x.len()].copy_from_slice(x);
            let mut most = 0;
            for x in &padded {
                let size = x.to_bits() & !(1 << 31);
                // What is no number counts for nothing.
                let size = if size > f32::INFINITY.to_bits() { 0 } else { size };
                most = if size > most { size } else { most };
            }
            let most = f32::from_bits(most);
            out.scales[token * spans + span] = most / 127.0;
            let inverse = if most > 0.0 { 127.0 / most } else { 0.0 };
            let mut rounded = [0i8; SPAN];
            for i in 0..SPAN {
                rounded[i] = (padded[i] * inverse + ROUNDER).to_bits() as i8;
            }
            out.values[token * chunks * CHUNK + from..][..width].copy_from_slice(&rounded[..width]);
            for chunk in 0..width / CHUNK {
                let mut sum = 0;
                for i in 0..CHUNK {
                    sum += i32::from(rounded[chunk * CHUNK + i]);
                }
                out.sums[token * chunks + from / CHUNK + chunk] = sum;
            }
        }
    }
}
