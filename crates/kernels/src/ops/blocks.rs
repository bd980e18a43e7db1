//! Blocks of GGUF's scalar types, fitted and rounded by the widest instructions the machine has.
//!
//! The arithmetic is [`BlockForm::fit_turned`], compiled once per instruction set. It uses no fused multiply-add, so every set
//! gives the same bits. What it works on, sixteen sub-blocks side by side, is turned by each set's own shuffles.

mod turn;

use crate::Level;
#[cfg(target_arch = "x86_64")]
use crate::level::{Avx2, Avx512};
use bitmill_scheme::{BlockForm, BlockParams, LANES, Sides, Turned};
use rayon::prelude::*;

/// Weights of a task.
const TASK: usize = 1 << 15;
/// Weights of the longest sub-block.
const SUB: usize = 32;
/// Weights of the largest tile.
const TILE: usize = SUB * LANES;

/// Fits and rounds the blocks of the matrix `w`, `[rows, n]`, where an error in column c costs `h[c]`, if that is known. `params`
/// gets one entry for each block, `codes` one for each weight. Returns Σ h(w − ŵ)² and Σ h·w², where h is 1 without costs.
///
/// # Panics
/// Unless the type [has lanes](BlockForm::has_lanes) and lengths agree.
pub fn fit_blocks(
    level: Level,
    form: &BlockForm,
    w: &[f32],
    h: Option<&[f32]>,
    params: &mut [BlockParams],
    codes: &mut [u8],
) -> [f64; 2] {
    let n = h.map_or(form.len, <[f32]>::len);
    assert!(form.has_lanes() && n.is_multiple_of(form.len) && w.len().is_multiple_of(n.max(1)), "whole rows of blocks");
    assert!(params.len() * form.len == w.len() && codes.len() == w.len(), "an entry for each block and weight");
    if w.len() <= TASK {
        return run(level, &Task { form, w, h, first: 0 }, params, codes);
    }
    let sums: Vec<[f64; 2]> = (params.par_chunks_mut(TASK / form.len).zip(codes.par_chunks_mut(TASK)))
        .zip(w.par_chunks(TASK))
        .enumerate()
        .map(|(i, ((params, codes), w))| run(level, &Task { form, w, h, first: i * TASK }, params, codes))
        .collect();
    sums.iter().fold([0.0; 2], |[error, energy], [e, w]| [error + e, energy + w])
}

/// Blocks of consecutive weights, the first of them weight `first` of the matrix.
struct Task<'a> {
    form: &'a BlockForm,
    w: &'a [f32],
    h: Option<&'a [f32]>,
    first: usize,
}

/// Fits the blocks of `task` after `turn` has turned each tile. Weights after the last whole tile are turned plainly.
#[inline(always)]
fn tiles(
    task: &Task<'_>,
    params: &mut [BlockParams],
    codes: &mut [u8],
    turn: impl Fn(usize, &[f32], &mut Turned),
) -> [f64; 2] {
    let Task { form, w, h, first } = *task;
    let tile = LANES * form.sub;
    let (mut costs, mut sums) = ([0.0f32; TILE], [0.0; 2]);
    let mut turned = [[[0.0f32; LANES]; SUB]; 2];
    let all = w.chunks(tile).zip(params.chunks_mut(tile / form.len)).zip(codes.chunks_mut(tile));
    for (i, ((w, params), codes)) in all.enumerate() {
        let costs = &mut costs[..w.len()];
        if let Some(h) = h {
            for (block, costs) in costs.chunks_mut(form.len).enumerate() {
                let column = (first + i * tile + block * form.len) % h.len();
                costs.copy_from_slice(&h[column..column + form.len]);
            }
        }
        let [own, by] = &mut turned;
        for (rows, to) in [(w, &mut *own)].into_iter().chain(h.map(|_| (&*costs, &mut *by))) {
            if rows.len() == tile { turn(form.sub, rows, to) } else { bitmill_scheme::turn(form.sub, rows, to) }
        }
        let h = h.map(|_| Sides { rows: costs, turned: by });
        let [error, energy] = form.fit_turned(Sides { rows: w, turned: own }, h, params, codes);
        sums = [sums[0] + error, sums[1] + energy];
    }
    sums
}

fn run(level: Level, task: &Task<'_>, params: &mut [BlockParams], codes: &mut [u8]) -> [f64; 2] {
    match level {
        Level::Scalar => tiles(task, params, codes, bitmill_scheme::turn),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2(token) => avx2(token, task, params, codes),
        #[cfg(target_arch = "x86_64")]
        Level::Avx512(token) => avx512(token, task, params, codes),
    }
}

#[cfg(target_arch = "x86_64")]
fn avx512(token: Avx512, task: &Task<'_>, params: &mut [BlockParams], codes: &mut [u8]) -> [f64; 2] {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn compiled(token: Avx512, task: &Task<'_>, params: &mut [BlockParams], codes: &mut [u8]) -> [f64; 2] {
        tiles(task, params, codes, |sub, rows, to| turn::avx512(token, sub, rows, to))
    }
    // SAFETY: the token proves these features.
    unsafe { compiled(token, task, params, codes) }
}

#[cfg(target_arch = "x86_64")]
fn avx2(token: Avx2, task: &Task<'_>, params: &mut [BlockParams], codes: &mut [u8]) -> [f64; 2] {
    #[target_feature(enable = "avx2")]
    fn compiled(token: Avx2, task: &Task<'_>, params: &mut [BlockParams], codes: &mut [u8]) -> [f64; 2] {
        tiles(task, params, codes, |sub, rows, to| turn::avx2(token, sub, rows, to))
    }
    // SAFETY: the token proves AVX2.
    unsafe { compiled(token, task, params, codes) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bitmill_scheme::BLOCKS;

    fn wave(i: usize, f: f32) -> f32 {
        ((i as f32 * f).sin() * 1.7).powi(3) + 0.1 * (i as f32 * 0.37).cos()
    }

    #[test]
    fn errors_are_those_of_the_values() {
        let (n, rows) = (512, 3);
        let w: Vec<f32> = (0..n * rows).map(|i| 0.02 * wave(i, 0.731)).collect();
        let h: Vec<f32> = (0..n).map(|i| 0.1 + wave(i, 1.3).abs()).collect();
        for (form, h) in BLOCKS.iter().filter(|f| f.has_lanes()).flat_map(|f| [(f, None), (f, Some(&h[..]))]) {
            let (mut params, mut codes) = (vec![BlockParams::zero(); w.len() / form.len], vec![0u8; w.len()]);
            let [error, energy] = fit_blocks(Level::best(), form, &w, h, &mut params, &mut codes);
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

    #[test]
    fn every_level_gives_the_bits_of_the_definition() {
        // Several tasks, and a last tile that is not whole.
        let (n, rows) = (256, 131);
        let w: Vec<f32> = (0..n * rows).map(|i| 0.02 * wave(i, 0.731)).collect();
        let h: Vec<f32> = (0..n).map(|i| 0.1 + wave(i, 1.3).abs()).collect();
        for (form, level) in
            BLOCKS.iter().filter(|f| f.has_lanes()).flat_map(|f| Level::all().into_iter().map(move |l| (f, l)))
        {
            for h in [None, Some(&h[..])] {
                let (mut params, mut codes) = (vec![BlockParams::zero(); w.len() / form.len], vec![0u8; w.len()]);
                fit_blocks(level, form, &w, h, &mut params, &mut codes);
                for (b, w) in w.chunks(form.len).enumerate() {
                    let (mut own, mut own_codes) = ([BlockParams::zero()], vec![0u8; form.len]);
                    let column = b * form.len % n;
                    form.fit_lanes(w, h.map(|h| &h[column..column + form.len]), &mut own, &mut own_codes);
                    assert_eq!(
                        (own[0], &own_codes[..]),
                        (params[b], &codes[b * form.len..][..form.len]),
                        "{} {b} {level:?}",
                        form.name
                    );
                }
            }
        }
    }
}
