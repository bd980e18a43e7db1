//! Oracles of learned rounding: it is never worse than its start, and on problems small enough to enumerate it is good.

use super::*;
use crate::sweep::tests::{Random, random_h, random_w};
use crate::{Linear, SolverOptions, method};
use bitmill_scheme::{Bits, Grid, GroupParams, ScaleType, Scheme};

const KINDS: [SoftKind; 3] = [SoftKind::Ada, SoftKind::Sign, SoftKind::LowRank];

/// Weights of a few units on a grid of steps of 1, each row rounded to nearest.
fn nearest(w: &[f32], n: usize) -> Quantized {
    let scheme = Scheme::int(Bits::new(4).unwrap(), true, Granularity::Channel).with_scale(ScaleType::F32);
    let params = GroupParams { scale: 1.0, zero: 8 };
    let codes = w.iter().map(|&x| scheme.grid().nearest(x, params)).collect();
    Quantized {
        scheme,
        shape: [w.len() / n, n],
        codes,
        scales: vec![1.0; w.len() / n],
        zeros: vec![],
        group_of: vec![],
        input: None,
    }
}

/// The least loss over both neighbours of every weight.
fn optimum(w: &[f32], h: &[f32]) -> f64 {
    let n = w.len();
    let mut best = f64::INFINITY;
    for choice in 0..1u32 << n {
        let rounded: Vec<f32> = (0..n).map(|i| w[i].floor() + f32::from(u8::from(choice >> i & 1 == 1))).collect();
        best = best.min(loss(w, &rounded, h)[0]);
    }
    best
}

#[test]
fn small_problems_are_solved_well_and_never_worse_than_rounding() {
    // Oracle 9: ten weights, all 2^10 roundings enumerated.
    let n = 10;
    let (mut hits, mut better, mut nearest_hits) = ([0; 3], [0; 3], 0);
    let runs = 60;
    for seed in 0..runs {
        let h = random_h(n, 500 + seed);
        let mut r = Random::new(seed);
        let w: Vec<f32> = (0..n).map(|_| (r.unit() * 10.0 - 5.0) as f32).collect();
        let best = optimum(&w, &h);
        let start = nearest(&w, n);
        let before = loss(&w, &start.dequantize(), &h)[0];
        nearest_hits += u32::from(before < best * 1.0001);
        for (k, kind) in KINDS.into_iter().enumerate() {
            let mut q = start.clone();
            soften(&w, &mut q, &h, SoftRounding { kind, steps: 300 });
            let after = loss(&w, &q.dequantize(), &h)[0];
            assert!(after <= before, "{kind:?}: {after} {before}");
            // SignRound may go beyond the two neighbours, and so below the best of them.
            assert!(kind == SoftKind::Sign || after >= best * (1.0 - 1e-5), "{kind:?}: {after} {best}");
            hits[k] += u32::from(after < best * 1.0001);
            better[k] += u32::from(after < before * 0.9999);
        }
    }
    println!("optimal {hits:?}, better {better:?}, nearest optimal {nearest_hits} of {runs}");
    assert!(hits.iter().all(|&h| h * 3 >= runs as u32), "{hits:?}");
    assert!(better.iter().all(|&b| b * 2 > runs as u32), "{better:?}");
}

#[test]
fn no_steps_change_nothing_and_more_never_hurt() {
    // Oracle 11: the best codes met are kept, row by row.
    let n = 64;
    let (h, w) = (random_h(n, 5), random_w(40 * n, 6));
    for symmetric in [true, false] {
        let scheme = Scheme::int(Bits::new(2).unwrap(), symmetric, Granularity::Group(16));
        let linear = Linear::new("x", &w, [40, n], scheme);
        for name in ["rtn", "gptq"] {
            let start = method(name)
                .unwrap()
                .solve(&[linear], Some(&h), &SolverOptions::default())
                .unwrap()
                .remove(0)
                .quantized;
            let before = loss(&w, &start.dequantize(), &h);
            for kind in KINDS {
                let mut same = start.clone();
                assert_eq!(soften(&w, &mut same, &h, SoftRounding { kind, steps: 0 }), 0);
                assert_eq!(same, start);
                let mut q = start.clone();
                let improved = soften(&w, &mut q, &h, SoftRounding { kind, steps: 100 });
                q.validate().unwrap();
                let after = loss(&w, &q.dequantize(), &h);
                assert!(after.iter().zip(&before).all(|(a, b)| a <= b), "{kind:?} from {name}");
                assert_eq!(improved, after.iter().zip(&before).filter(|(a, b)| a < b).count());
                let total = |l: &[f64]| l.iter().sum::<f64>();
                println!("{name} {kind:?} sym {symmetric}: {:.4}", total(&after) / total(&before));
                // What coordinate descent has settled leaves little to be learned.
                assert!(improved > 0 || name == "gptq", "{kind:?} from {name}");
            }
        }
    }
}

#[test]
fn gradients_are_those_of_finite_differences() {
    // Oracle 9: ∂ℓ/∂V = 2s∘(ΔH)∘h′(V), and h(V₀) is the share it was made for.
    let n = 8;
    let (h, w) = (random_h(n, 9), random_w(n, 10).iter().map(|v| v * 3.0).collect::<Vec<_>>());
    let q = nearest(&w, n);
    let problem = Problem::new(&q, (n, false), 0, &w, &q.codes, &h);
    let v: Vec<f32> = (0..n).map(|i| latent(0.1 + 0.1 * i as f32)).collect();
    for (i, &v) in v.iter().enumerate() {
        assert!((rectified(v) - (0.1 + 0.1 * i as f32)).abs() < 1e-5);
    }
    let value = |v: &[f32]| {
        let p: Vec<f32> = (0..n).map(|i| problem.low(i) + rectified(v[i])).collect();
        problem.gradient(&p)
    };
    let (g, _) = value(&v);
    for i in 0..n {
        let moved = |by: f32| {
            let mut v = v.clone();
            v[i] += by;
            value(&v).1[0]
        };
        let numeric = (moved(0.01) - moved(-0.01)) / 0.02;
        let exact = f64::from(2.0 * problem.scale[i] * g[i] * rectified_slope(v[i]));
        assert!((numeric - exact).abs() < 1e-2 * exact.abs().max(1.0), "{numeric} {exact}");
    }
}
