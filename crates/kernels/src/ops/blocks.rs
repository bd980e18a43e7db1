//! Blocks of GGUF's scalar types, fitted and rounded by the widest instructions the machine has.
//!
//! The arithmetic is [`BlockForm::fit_lanes`], compiled once per instruction set. It uses no fused multiply-add, so every set
//! gives the same bits.

use bitmill_scheme::{BlockForm, BlockParams, LANES};
use rayon::prelude::*;

/// Weights of a task.
const TASK: usize = 1 << 14;
/// Weights of the largest tile.
const TILE: usize = 32 * LANES;

/// Fits and rounds the blocks of the matrix `w`, `[rows, n]`, where an error in column c costs `h[c]`, if that is known. `params`
/// gets one entry for each block, `codes` one for each weight.
///
/// # Panics
/// Unless the type [has lanes](BlockForm::has_lanes) and lengths agree.
pub fn fit_blocks(form: &BlockForm, w: &[f32], h: Option<&[f32]>, params: &mut [BlockParams], codes: &mut [u8]) {
    let n = h.map_or(form.len, <[f32]>::len);
    assert!(form.has_lanes() && n.is_multiple_of(form.len) && w.len().is_multiple_of(n.max(1)), "whole rows of blocks");
    assert!(params.len() * form.len == w.len() && codes.len() == w.len(), "an entry for each block and weight");
    let tile = LANES * form.sub;
    let task = TASK / tile * tile;
    (params.par_chunks_mut(task / form.len).zip(codes.par_chunks_mut(task)).zip(w.par_chunks(task)))
        .enumerate()
        .for_each(|(i, ((params, codes), w))| run(&Task { form, w, h, first: i * task }, params, codes));
}

/// Blocks of consecutive weights, the first of them number `first` of the matrix.
struct Task<'a> {
    form: &'a BlockForm,
    w: &'a [f32],
    h: Option<&'a [f32]>,
    first: usize,
}

#[inline(always)]
fn tiles(task: &Task<'_>, params: &mut [BlockParams], codes: &mut [u8]) {
    let Task { form, w, h, first } = *task;
    let tile = LANES * form.sub;
    let mut costs = [1.0f32; TILE];
    let all = w.chunks(tile).zip(params.chunks_mut(tile / form.len)).zip(codes.chunks_mut(tile));
    for (i, ((w, params), codes)) in all.enumerate() {
        if let Some(h) = h {
            for (block, costs) in costs[..w.len()].chunks_mut(form.len).enumerate() {
                let column = (first + i * tile + block * form.len) % h.len();
                costs.copy_from_slice(&h[column..column + form.len]);
            }
        }
        form.fit_lanes(w, h.map(|_| &costs[..w.len()]), params, codes);
    }
}

#[cfg(target_arch = "x86_64")]
fn run(task: &Task<'_>, params: &mut [BlockParams], codes: &mut [u8]) {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
    fn avx512(task: &Task<'_>, params: &mut [BlockParams], codes: &mut [u8]) {
        tiles(task, params, codes);
    }
    #[target_feature(enable = "avx2,f16c")]
    fn avx2(task: &Task<'_>, params: &mut [BlockParams], codes: &mut [u8]) {
        tiles(task, params, codes);
    }
    let narrow = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c");
    let wide = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl");
    if wide && narrow {
        // SAFETY: the machine has these instructions.
        unsafe { avx512(task, params, codes) }
    } else if narrow {
        // SAFETY: the machine has these instructions.
        unsafe { avx2(task, params, codes) }
    } else {
        tiles(task, params, codes);
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn run(task: &Task<'_>, params: &mut [BlockParams], codes: &mut [u8]) {
    tiles(task, params, codes);
}

/// Blocks as [`bitmill_scheme::Quantized`] holds them.
#[derive(Debug, Clone, Copy)]
pub struct StoredBlocks<'a> {
    /// A code for each weight.
    pub codes: &'a [u8],
    /// The reals of each block.
    pub reals: &'a [f32],
    /// The integers of each block.
    pub integers: &'a [u8],
}

/// What rounding the matrix `w`, `[rows, n]`, to blocks lost: Σ h(w − ŵ)², and Σ h·w² beside it, where an error in column c
/// costs `h[c]`, or 1 without `h`. Runs on the calling thread, since callers hold a part of a matrix each.
///
/// # Panics
/// Unless lengths agree.
#[must_use]
pub fn rounding_error(form: &BlockForm, stored: StoredBlocks<'_>, w: &[f32], h: Option<&[f32]>) -> [f64; 2] {
    let blocks = w.len() / form.len;
    assert!(stored.codes.len() == w.len() && w.len().is_multiple_of(form.len), "whole blocks");
    assert!(stored.reals.len() == blocks * form.reals(), "the reals of each block");
    assert!(stored.integers.len() == blocks * form.integers(), "the integers of each block");
    assert!(h.is_none_or(|h| !h.is_empty() && h.len().is_multiple_of(form.len)), "rows of whole blocks");
    run_errors(form, stored, w, h)
}

/// Running sums of one block.
const SUMS: usize = 8;
/// Weights of the longest block.
const LONGEST: usize = 256;

#[inline(always)]
fn errors(form: &BlockForm, stored: StoredBlocks<'_>, w: &[f32], h: Option<&[f32]>) -> [f64; 2] {
    let (reals, integers) = (form.reals(), form.integers());
    let (mut total, mut back, ones) = ([0.0f64; 2], [0.0f32; LONGEST], [1.0f32; LONGEST]);
    for (b, (w, codes)) in w.chunks_exact(form.len).zip(stored.codes.chunks_exact(form.len)).enumerate() {
        let mut p = BlockParams::zero();
        p.reals[..reals].copy_from_slice(&stored.reals[b * reals..][..reals]);
        p.integers[..integers].copy_from_slice(&stored.integers[b * integers..][..integers]);
        for (sub, (back, codes)) in back.chunks_exact_mut(form.sub).zip(codes.chunks_exact(form.sub)).enumerate() {
            form.values(codes, form.affine(&p, sub), back);
        }
        let h = h.map_or(&ones[..form.len], |h| &h[b * form.len % h.len()..][..form.len]);
        let mut sums = [[0.0f32; SUMS]; 2];
        let lanes = w.as_chunks::<SUMS>().0.iter().zip(back.as_chunks::<SUMS>().0).zip(h.as_chunks::<SUMS>().0);
        for ((w, back), h) in lanes {
            for i in 0..SUMS {
                let e = w[i] - back[i];
                sums[0][i] += h[i] * e * e;
                sums[1][i] += h[i] * w[i] * w[i];
            }
        }
        for (total, sums) in total.iter_mut().zip(sums) {
            *total += f64::from(sums.iter().sum::<f32>());
        }
    }
    total
}

#[cfg(target_arch = "x86_64")]
fn run_errors(form: &BlockForm, stored: StoredBlocks<'_>, w: &[f32], h: Option<&[f32]>) -> [f64; 2] {
    #[target_feature(enable = "avx2")]
    fn avx2(form: &BlockForm, stored: StoredBlocks<'_>, w: &[f32], h: Option<&[f32]>) -> [f64; 2] {
        errors(form, stored, w, h)
    }
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the machine has these instructions.
        unsafe { avx2(form, stored, w, h) }
    } else {
        errors(form, stored, w, h)
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn run_errors(form: &BlockForm, stored: StoredBlocks<'_>, w: &[f32], h: Option<&[f32]>) -> [f64; 2] {
    errors(form, stored, w, h)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bitmill_scheme::BLOCKS;

    #[test]
    fn errors_are_those_of_the_values() {
        let (n, rows) = (512, 3);
        let w: Vec<f32> = (0..n * rows).map(|i| 0.02 * ((i as f32 * 0.731).sin() * 1.7).powi(3)).collect();
        let h: Vec<f32> = (0..n).map(|i| 0.1 + (i as f32 * 1.3).sin().abs()).collect();
        for form in BLOCKS.iter().filter(|f| f.has_lanes()) {
            let (mut params, mut codes) = (vec![BlockParams::zero(); w.len() / form.len], vec![0u8; w.len()]);
            fit_blocks(form, &w, Some(&h), &mut params, &mut codes);
            let reals: Vec<f32> = params.iter().flat_map(|p| p.reals[..form.reals()].to_vec()).collect();
            let integers: Vec<u8> = params.iter().flat_map(|p| p.integers[..form.integers()].to_vec()).collect();
            let stored = StoredBlocks { codes: &codes, reals: &reals, integers: &integers };
            for h in [None, Some(&h[..])] {
                let [error, energy] = rounding_error(form, stored, &w, h);
                let (mut own, mut own_energy) = (0.0f64, 0.0f64);
                for (i, (&x, &c)) in w.iter().zip(&codes).enumerate() {
                    let a = form.affine(&params[i / form.len], i % form.len / form.sub);
                    let cost = h.map_or(1.0, |h| f64::from(h[i % n]));
                    own += cost * f64::from(x - form.value(c, a)).powi(2);
                    own_energy += cost * f64::from(x).powi(2);
                }
                let near = |a: f64, b: f64| (a - b).abs() <= 1e-5 * b;
                assert!(near(error, own) && near(energy, own_energy), "{}: {error} {own}", form.name);
            }
        }
    }

    #[test]
    fn every_instruction_set_gives_the_bits_of_the_definition() {
        for form in BLOCKS.iter().filter(|f| f.has_lanes()) {
            let (n, rows) = (256, 37);
            let wave = |i: usize, f: f32| ((i as f32 * f).sin() * 1.7).powi(3) + 0.1 * (i as f32 * 0.37).cos();
            let w: Vec<f32> = (0..n * rows).map(|i| 0.02 * wave(i, 0.731)).collect();
            let h: Vec<f32> = (0..n).map(|i| 0.1 + wave(i, 1.3).abs()).collect();
            let blocks = w.len() / form.len;
            let (mut params, mut codes) = (vec![BlockParams::zero(); blocks], vec![0u8; w.len()]);
            fit_blocks(form, &w, Some(&h), &mut params, &mut codes);
            for (b, w) in w.chunks(form.len).enumerate() {
                let (mut own, mut own_codes) = ([BlockParams::zero()], vec![0u8; form.len]);
                let column = b * form.len % n;
                form.fit_lanes(w, Some(&h[column..column + form.len]), &mut own, &mut own_codes);
                assert_eq!(
                    (own[0], &own_codes[..]),
                    (params[b], &codes[b * form.len..][..form.len]),
                    "{} {b}",
                    form.name
                );
            }
        }
    }
}
