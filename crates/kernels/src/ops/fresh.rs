//! New memory for results, filled while a cache holds it.

use rayon::prelude::*;
use std::mem::MaybeUninit;

/// So many new entries, which `fill` makes what they are to be, `size` at a time, given their number and zeros: these are made just
/// before, where all of them at once would be gone from the caches again when they are needed. By all threads, each of which takes
/// `least` entries at a time, about.
///
/// # Panics
/// When `size` is 0: a caller's bug.
#[must_use]
pub fn filled(count: usize, (size, least): (usize, usize), fill: impl Fn(usize, &mut [f32]) + Sync) -> Vec<f32> {
    let mut out = Vec::with_capacity(count);
    let parts = out.spare_capacity_mut()[..count].par_chunks_mut(size).enumerate();
    parts.with_min_len(least.div_ceil(size).max(1)).for_each(|(i, part): (usize, &mut [MaybeUninit<f32>])| {
        part.fill(MaybeUninit::new(0.0));
        // SAFETY: they are numbers now.
        fill(i, unsafe { &mut *(&raw mut *part as *mut [f32]) });
    });
    // SAFETY: all of them are.
    unsafe { out.set_len(count) };
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_is_filled_once_and_begins_as_zeros() {
        for (count, size) in [(0, 3), (7, 3), (9, 3), (300_000, 1000), (5, 100)] {
            let out = filled(count, (size, 2000), |i, part| {
                part.iter_mut().enumerate().for_each(|(j, v)| *v += (i * size + j) as f32);
            });
            assert!(out.iter().enumerate().all(|(i, &v)| v == i as f32) && out.len() == count);
        }
    }
}
