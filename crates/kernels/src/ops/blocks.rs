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

/// Fits and rounds the blocks of the matrix `w`, `[rows, n]`, where an error in column c costs `h[c]`. `params` gets one entry
/// for each block, `codes` one for each weight.
///
/// # Panics
/// Unless the type [has lanes](BlockForm::has_lanes) and lengths agree.
pub fn fit_blocks(form: &BlockForm, w: &[f32], h: &[f32], params: &mut [BlockParams], codes: &mut [u8]) {
    let n = h.len();
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
    h: &'a [f32],
    first: usize,
}

#[inline(always)]
fn tiles(task: &Task<'_>, params: &mut [BlockParams], codes: &mut [u8]) {
    let Task { form, w, h, first } = *task;
    let tile = LANES * form.sub;
    let mut costs = [1.0f32; TILE];
    let all = w.chunks(tile).zip(params.chunks_mut(tile / form.len)).zip(codes.chunks_mut(tile));
    for (i, ((w, params), codes)) in all.enumerate() {
        for (block, costs) in costs[..w.len()].chunks_mut(form.len).enumerate() {
            let column = (first + i * tile + block * form.len) % h.len();
            costs.copy_from_slice(&h[column..column + form.len]);
        }
        form.fit_lanes(w, &costs[..w.len()], params, codes);
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

#[cfg(test)]
mod tests {
    use super::*;
    use bitmill_scheme::BLOCKS;

    #[test]
    fn every_instruction_set_gives_the_bits_of_the_definition() {
        for form in BLOCKS.iter().filter(|f| f.has_lanes()) {
            let (n, rows) = (256, 37);
            let wave = |i: usize, f: f32| ((i as f32 * f).sin() * 1.7).powi(3) + 0.1 * (i as f32 * 0.37).cos();
            let w: Vec<f32> = (0..n * rows).map(|i| 0.02 * wave(i, 0.731)).collect();
            let h: Vec<f32> = (0..n).map(|i| 0.1 + wave(i, 1.3).abs()).collect();
            let blocks = w.len() / form.len;
            let (mut params, mut codes) = (vec![BlockParams::zero(); blocks], vec![0u8; w.len()]);
            fit_blocks(form, &w, &h, &mut params, &mut codes);
            for (b, w) in w.chunks(form.len).enumerate() {
                let (mut own, mut own_codes) = ([BlockParams::zero()], vec![0u8; form.len]);
                let column = b * form.len % n;
                form.fit_lanes(w, &h[column..column + form.len], &mut own, &mut own_codes);
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
