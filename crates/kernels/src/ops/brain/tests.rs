//! Products equal the f64 sums of rounded entries, at every awkward shape and any thread count.

use super::*;
use crate::mirror;
use half::bf16;

fn sample(count: usize, seed: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 7919 + seed * 131 + 13) % 10_007) as f32 / 5003.0 - 1.0).collect()
}

fn rounded(x: f32) -> f64 {
    f64::from(bf16::from_f32(x).to_f32())
}

/// Every way of this CPU; one without the instructions has nothing to test.
fn ways() -> Vec<Brain> {
    let all = Brain::all();
    println!("{} ways of this CPU to multiply bfloat16 are tested", all.len());
    all
}

#[test]
fn products_are_sums_of_rounded_entries() {
    let shapes =
        [(1, 1, 1), (8, 48, 2), (5, 17, 3), (16, 16, 32), (37, 70, 65), (33, 100, 600), (20, 49, 257), (270, 33, 30)];
    for (brain, (m, n, depth)) in ways().into_iter().flat_map(|brain| shapes.map(|shape| (brain, shape))) {
        let (a, b, c0) = (sample(m * depth, 1), sample(n * depth, 2), sample(m * n, 3));
        // The second layout of each is its transpose, stored the other way round.
        let other =
            |x: &[f32], rows: usize| (0..depth * rows).map(|i| x[i % rows * depth + i / rows]).collect::<Vec<_>>();
        let (at, bt) = (other(&a, m), other(&b, n));
        let a_views = [View::new(&a, m, depth, depth), View::new(&at, depth, m, m).t()];
        let b_views = [View::new(&b, n, depth, depth), View::new(&bt, depth, n, n).t()];
        for (a_view, b_view) in a_views.into_iter().zip(b_views) {
            let (mut a_pairs, mut b_pairs) = (vec![7; Brained::pairs(m, depth)], vec![7; Brained::pairs(n, depth)]);
            let (left, right) =
                (Brained::round(brain, a_view, &mut a_pairs), Brained::round(brain, b_view, &mut b_pairs));
            let mut c = c0.clone();
            brain_gemm(brain, left, right, &mut ViewMut::new(&mut c, m, n, n));
            let (mut a_pairs, mut again) = (vec![7; Brained::pairs(m, depth)], c0.clone());
            let left = Brained::left(brain, a_view, &mut a_pairs);
            brain_gemm(brain, left, right, &mut ViewMut::new(&mut again, m, n, n));
            assert_eq!(again, c, "a left side gives the same bits");
            let (left, right, mut again) = (Panels::left(brain, a_view), Panels::round(brain, b_view), c0.clone());
            brain_gemm(brain, left.matrix(), right.matrix(), &mut ViewMut::new(&mut again, m, n, n));
            assert_eq!(again, c, "panels of one's own give the same bits");
            let mut sums = vec![0.0; m * n];
            brain_gemm(brain, left.matrix(), right.matrix(), &mut ViewMut::new(&mut sums, m, n, n));
            again.fill(f32::NAN);
            brain_product(brain, left.matrix(), right.matrix(), &mut ViewMut::new(&mut again, m, n, n));
            assert_eq!(again, sums, "what was there is gone");
            for (i, found) in c.iter().enumerate() {
                let terms = (0..depth).map(|k| rounded(a[i / n * depth + k]) * rounded(b[i % n * depth + k]));
                let (sum, size) = terms.fold((f64::from(c0[i]), 1.0), |(sum, size), t| (sum + t, size + t.abs()));
                assert!((f64::from(*found) - sum).abs() < 1e-6 * size, "{m} {n} {depth} {i}: {found} {sum}");
            }
        }
    }
}

#[test]
fn syrk_is_the_product_and_ignores_the_thread_count_and_the_parts() {
    for (tokens, n) in [(1500, 210), (3000, 1030), (20_000, 90)] {
        let x = sample(tokens * n, 5);
        let halves = x.split_at(tokens / 3 * n);
        for brain in ways() {
            let run = |threads, parts: &[&[f32]]| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let mut h = vec![0.5; n * n];
                pool.install(|| brain_syrk(brain, parts, n, &mut h));
                mirror(&mut h, n);
                h
            };
            let h = run(1, &[&x]);
            assert!([2, 3].iter().all(|&t| run(t, &[halves.0, &[], halves.1]) == h));
            let x: Vec<f64> = x.iter().copied().map(rounded).collect();
            for i in (0..n).step_by(n.div_ceil(210)) {
                for j in (0..n).step_by(n.div_ceil(100)) {
                    let (sum, size) = (x.chunks_exact(n).map(|x| x[i] * x[j]))
                        .fold((0.5, 1.0), |(sum, size), term| (sum + term, size + term.abs()));
                    let found = f64::from(h[i * n + j]);
                    assert!((found - sum).abs() < 2e-6 * size && h[i * n + j] == h[j * n + i], "{n} {i} {j}");
                }
            }
        }
    }
}
