//! Times faer's products and factors of dense matrices, as `cargo xtask bench dense --faer` asks for them.
//!
//! Lines say what to do, and each is done once and answered by a name and seconds, as by `tools/reference/torch_products.py`:
//! `gemm M K N [TIMES]` multiplies matrices [M, K] and [N, K] of f32, `a·bᵀ`; `syrk TOKENS N` computes half of the product of a
//! matrix [TOKENS, N] by itself, `xᵀ·x`; `factor N` takes a positive definite matrix of f64 into its Cholesky factor, and
//! `solve N ROWS` solves with such a factor for so many right-hand sides.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{cholesky_in_place, cholesky_in_place_scratch};
use faer::linalg::matmul::{self, triangular};
use faer::linalg::triangular_solve::{solve_lower_triangular_in_place, solve_upper_triangular_in_place};
use faer::{Accum, Mat, MatMut, MatRef, Par};
use std::error::Error;
use std::io::{BufRead, Write};
use std::time::Instant;

fn main() -> Result<(), Box<dyn Error>> {
    let threads = std::env::args().skip_while(|word| word != "--threads").nth(1).map_or(Ok(2), |count| count.parse())?;
    let (mut last, mut work): (String, Option<Box<dyn FnMut()>>) = (String::new(), None);
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        if line != last {
            drop(work.take());
            work = Some(prepared(&line, Par::rayon(threads))?);
            last = line;
        }
        let Some(work) = &mut work else { continue };
        let times: usize = last.split_whitespace().nth(4).map_or(Ok(1), str::parse)?;
        let start = Instant::now();
        (0..times).for_each(|_| work());
        let seconds = start.elapsed().as_secs_f64() / times as f64;
        println!("faer {seconds}");
        std::io::stdout().flush()?;
    }
    Ok(())
}

/// Numbers between -1 and 1.
fn sample(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / 8_388_608.0 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// The work of a line, with its matrices in place.
fn prepared(line: &str, par: Par) -> Result<Box<dyn FnMut()>, Box<dyn Error>> {
    let (what, numbers) = line.split_once(' ').ok_or("a line of what to do and of what size")?;
    let numbers = numbers.split_whitespace().map(str::parse).collect::<Result<Vec<usize>, _>>()?;
    Ok(match (what, &numbers[..]) {
        ("gemm", &[m, k, n] | &[m, k, n, _]) => {
            let (a, b, mut c) = (sample(m * k, 1), sample(n * k, 2), vec![0.0; m * n]);
            Box::new(move || {
                let c = MatMut::from_row_major_slice_mut(&mut c, m, n);
                let (a, b) = (MatRef::from_row_major_slice(&a, m, k), MatRef::from_row_major_slice(&b, n, k));
                matmul::matmul(c, Accum::Replace, a, b.transpose(), 1.0f32, par);
            })
        }
        ("syrk", &[tokens, n]) => {
            let (x, mut h) = (sample(tokens * n, 1), vec![0.0; n * n]);
            Box::new(move || {
                let h = MatMut::from_row_major_slice_mut(&mut h, n, n);
                let x = MatRef::from_row_major_slice(&x, tokens, n);
                let all = triangular::BlockStructure::Rectangular;
                let half = triangular::BlockStructure::TriangularLower;
                triangular::matmul(h, half, Accum::Add, x.transpose(), all, x, all, 1.0f32, par);
            })
        }
        ("factor", &[n]) => {
            // A diagonal that outweighs its row makes it positive definite.
            let entries = sample(n * n, 1);
            let entry = |i: usize, j: usize| {
                let (i, j) = (i.max(j), i.min(j));
                if i == j { n as f64 } else { f64::from(entries[i * n + j]) }
            };
            let original = Mat::from_fn(n, n, entry);
            let mut l = original.clone();
            let mut memory = MemBuffer::new(cholesky_in_place_scratch::<f64>(n, par, Default::default()));
            Box::new(move || {
                l.copy_from(&original);
                let stack = MemStack::new(&mut memory);
                let done = cholesky_in_place(l.as_mut(), Default::default(), par, stack, Default::default());
                assert!(done.is_ok(), "a positive definite matrix");
            })
        }
        ("solve", &[n, rows]) => {
            let entries = sample(n * n, 1);
            let l = Mat::from_fn(n, n, |i, j| if i == j { n as f64 } else { f64::from(entries[i * n + j]) });
            let original = Mat::from_fn(n, rows, |i, j| f64::from(entries[(i * rows + j) % entries.len()]));
            let mut x = original.clone();
            Box::new(move || {
                x.copy_from(&original);
                solve_lower_triangular_in_place(l.as_ref(), x.as_mut(), par);
                solve_upper_triangular_in_place(l.transpose(), x.as_mut(), par);
            })
        }
        _ => {
            let known = "gemm M K N [TIMES], syrk TOKENS N, factor N, or solve N ROWS";
            return Err(format!("no such work as `{line}`: {known}").into());
        }
    })
}
