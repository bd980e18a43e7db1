//! Blocks of GGUF's scalar types, fitted and rounded by the widest instructions the machine has.
//!
//! The arithmetic is [`BlockForm::fit_turned`], compiled once per instruction set. Where it adds a product it does so in one
//! step on every set, so each gives the same bits. What it works on, thirty-two rows of weights side by side, is turned by each set's own shuffles.

#[cfg(target_arch = "aarch64")]
mod neon;
mod stored;
mod turn;

pub use stored::Stored;

use crate::Level;
#[cfg(target_arch = "x86_64")]
use crate::level::{Avx2, Avx512};
use bitmill_scheme::{BlockForm, Fitted, LANES, Sides, Turned};
use rayon::prelude::*;

/// Weights of a task.
const TASK: usize = 1 << 15;
/// Weights of a lane, at most.
const SUB: usize = 32;
/// Weights of the largest tile.
const TILE: usize = SUB * LANES;

/// Fits and rounds the blocks of the matrix `w`, `[rows, n]`, where an error in column c costs `h[c]`, if that is known. Returns
/// Σ h(w − ŵ)² and Σ h·w², where h is 1 without costs.
///
/// # Panics
/// Unless the type [has lanes](BlockForm::has_lanes) and lengths agree.
pub fn fit_blocks(level: Level, form: &BlockForm, w: Stored<'_>, h: Option<&[f32]>, mut to: Fitted<'_>) -> [f64; 2] {
    let n = h.map_or(form.len, <[f32]>::len);
    assert!(form.has_lanes() && n.is_multiple_of(form.len) && w.len().is_multiple_of(n.max(1)), "whole rows of blocks");
    assert!(to.holds(form, w.len() / form.len), "room for each block and weight");
    if w.len() <= TASK {
        return run(level, &Task { form, w, h, first: 0 }, to);
    }
    let parts = (0..w.len()).step_by(TASK).map(|from| w.part(from, TASK));
    let tasks: Vec<_> = parts.map(|w| (w, to.take(form, w.len() / form.len))).collect();
    let task = |(i, (w, to))| run(level, &Task { form, w, h, first: i * TASK }, to);
    let sums: Vec<[f64; 2]> = tasks.into_par_iter().enumerate().map(task).collect();
    sums.iter().fold([0.0; 2], |[error, energy], [e, w]| [error + e, energy + w])
}

/// Blocks of consecutive weights, the first of them weight `first` of the matrix.
struct Task<'a> {
    form: &'a BlockForm,
    w: Stored<'a>,
    h: Option<&'a [f32]>,
    first: usize,
}

/// Fits the blocks of `task` after `turn` has turned each tile. Weights after the last whole tile are turned plainly.
#[inline(always)]
fn tiles(task: &Task<'_>, mut to: Fitted<'_>, turn: impl Fn(usize, &[f32], &mut Turned)) -> [f64; 2] {
    let Task { form, w, h, first } = *task;
    let tile = LANES * form.lane();
    let (mut wide, mut costs, mut sums) = ([0.0f32; TILE], [0.0f32; TILE], [0.0; 2]);
    let mut turned = [[[0.0f32; LANES]; SUB]; 2];
    for from in (0..w.len()).step_by(tile) {
        w.part(w.len().min(from + tile), tile).fetch();
        let w = w.part(from, tile).wide(&mut wide);
        let costs = &mut costs[..w.len()];
        if let Some(h) = h {
            for (block, costs) in costs.chunks_mut(form.len).enumerate() {
                let column = (first + from + block * form.len) % h.len();
                costs.copy_from_slice(&h[column..column + form.len]);
            }
        }
        let [own, by] = &mut turned;
        for (rows, turned) in [(w, &mut *own)].into_iter().chain(h.map(|_| (&*costs, &mut *by))) {
            if rows.len() == tile {
                turn(form.lane(), rows, turned)
            } else {
                bitmill_scheme::turn(form.lane(), rows, turned)
            }
        }
        let h = h.map(|_| Sides { rows: costs, turned: by });
        let [error, energy] = form.fit_turned(Sides { rows: w, turned: own }, h, to.take(form, w.len() / form.len));
        sums = [sums[0] + error, sums[1] + energy];
    }
    sums
}

fn run(level: Level, task: &Task<'_>, to: Fitted<'_>) -> [f64; 2] {
    match level {
        Level::Scalar => tiles(task, to, bitmill_scheme::turn),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2(token) => avx2(token, task, to),
        #[cfg(target_arch = "x86_64")]
        Level::Avx512(token) => avx512(token, task, to),
        // NEON is what the target is compiled for, so only the turning has instructions of its own.
        #[cfg(target_arch = "aarch64")]
        Level::Neon(token) => tiles(task, to, |sub, rows, turned| neon::turn(token, sub, rows, turned)),
        #[cfg(target_arch = "x86_64")]
        Level::Amx(token) => avx512(token.avx512(), task, to),
    }
}

#[cfg(target_arch = "x86_64")]
fn avx512(token: Avx512, task: &Task<'_>, to: Fitted<'_>) -> [f64; 2] {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn compiled(token: Avx512, task: &Task<'_>, to: Fitted<'_>) -> [f64; 2] {
        tiles(task, to, |sub, rows, turned| turn::avx512(token, sub, rows, turned))
    }
    // SAFETY: the token proves these features.
    unsafe { compiled(token, task, to) }
}

#[cfg(target_arch = "x86_64")]
fn avx2(token: Avx2, task: &Task<'_>, to: Fitted<'_>) -> [f64; 2] {
    #[target_feature(enable = "avx2,fma")]
    fn compiled(token: Avx2, task: &Task<'_>, to: Fitted<'_>) -> [f64; 2] {
        tiles(task, to, |sub, rows, turned| turn::avx2(token, sub, rows, turned))
    }
    // SAFETY: the token proves AVX2 and FMA.
    unsafe { compiled(token, task, to) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bitmill_scheme::{BLOCKS, Quantized, Scheme};

    fn blank(form: &BlockForm, shape: [usize; 2]) -> Quantized {
        let blocks = shape[0] * shape[1] / form.len;
        Quantized {
            scheme: Scheme::block(form.kind),
            shape,
            codes: vec![0; blocks * form.len],
            scales: vec![0.0; blocks * form.reals()],
            zeros: vec![0; blocks * form.integers()],
            group_of: Vec::new(),
            input: None,
        }
    }

    fn parts(q: &mut Quantized) -> Fitted<'_> {
        Fitted { reals: &mut q.scales, integers: &mut q.zeros, codes: &mut q.codes }
    }

    fn wave(i: usize, f: f32) -> f32 {
        ((i as f32 * f).sin() * 1.7).powi(3) + 0.1 * (i as f32 * 0.37).cos()
    }

    #[test]
    fn errors_are_those_of_the_values() {
        let (n, rows) = (512, 3);
        let w: Vec<f32> = (0..n * rows).map(|i| 0.02 * wave(i, 0.731)).collect();
        let h: Vec<f32> = (0..n).map(|i| 0.1 + wave(i, 1.3).abs()).collect();
        for (form, h) in BLOCKS.iter().filter(|f| f.has_lanes()).flat_map(|f| [(f, None), (f, Some(&h[..]))]) {
            let mut q = blank(form, [rows, n]);
            let [error, energy] = fit_blocks(Level::best(), form, Stored::F32(&w), h, parts(&mut q));
            q.validate().unwrap();
            let (mut own, mut own_energy) = (0.0f64, 0.0f64);
            for (i, (&x, value)) in w.iter().zip(q.dequantize()).enumerate() {
                let cost = h.map_or(1.0, |h| f64::from(h[i % n]));
                own += cost * f64::from(x - value).powi(2);
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
        // What bfloat16 holds, as that.
        let brain: Vec<[u8; 2]> = w.iter().map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect();
        let brained: Vec<f32> = brain.iter().map(|&b| half::bf16::from_le_bytes(b).to_f32()).collect();
        for (form, level) in
            BLOCKS.iter().filter(|f| f.has_lanes()).flat_map(|f| Level::all().into_iter().map(move |l| (f, l)))
        {
            for h in [None, Some(&h[..])] {
                let mut q = blank(form, [rows, n]);
                fit_blocks(level, form, Stored::F32(&w), h, parts(&mut q));
                for (b, w) in w.chunks(form.len).enumerate() {
                    let (mut own, column) = (blank(form, [1, form.len]), b * form.len % n);
                    form.fit_lanes(w, h.map(|h| &h[column..column + form.len]), parts(&mut own));
                    let codes = &q.codes[b * form.len..][..form.len];
                    let is = (q.block(form, b * form.len / n, column / form.len), codes);
                    assert_eq!((own.block(form, 0, 0), &own.codes[..]), is, "{} {b} {level:?}", form.name);
                }
                let mut own = blank(form, [rows, n]);
                let sums = fit_blocks(level, form, Stored::F32(&brained), h, parts(&mut own));
                assert_eq!(fit_blocks(level, form, Stored::Bf16(&brain), h, parts(&mut q)), sums);
                assert_eq!(q, own, "{} {level:?}", form.name);
            }
        }
    }
}
