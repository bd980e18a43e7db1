//! Products equal the f64 sums of rounded entries, at every awkward shape and any thread count.

use super::*;
use crate::mirror;
use half::bf16;

fn sample(count: usize, seed: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 7919 + seed * 131 + 13) % 10_007) as f32 / 5003.0 - 1.0).collect()
}

/// Rows of `depth` numbers as they are when rounded.
fn rounded(short: Short, x: &[f32], depth: usize) -> Vec<f64> {
    match short {
        Short::Bf16(_) => x.iter().map(|&x| f64::from(bf16::from_f32(x).to_f32())).collect(),
        Short::Int8(_) => {
            let group = |x: &[f32]| {
                let most = x.iter().fold(0.0f32, |most, x| most.max(x.abs()));
                let inverse = if most > 0.0 { 127.0 / most } else { 0.0 };
                let step = most / 127.0;
                x.iter().map(|x| f64::from((x * inverse).round_ties_even()) * f64::from(step)).collect::<Vec<_>>()
            };
            x.chunks(depth).flat_map(|row| row.chunks(eight::GROUP)).flat_map(group).collect()
        }
    }
}

/// The transpose of `rows` rows.
fn other<T: Copy>(x: &[T], rows: usize) -> Vec<T> {
    let depth = x.len() / rows;
    (0..x.len()).map(|i| x[i % rows * depth + i / rows]).collect()
}

/// Every way of this CPU; one without the instructions has nothing to test.
fn ways() -> Vec<Short> {
    let all = Short::all();
    println!("{} ways of this CPU to multiply in fewer bits are tested", all.len());
    all
}

#[test]
fn products_are_sums_of_rounded_entries() {
    let shapes = [
        (1, 1, 1),
        (8, 48, 2),
        (5, 17, 3),
        (16, 16, 32),
        (37, 70, 65),
        (33, 100, 600),
        (40, 35, 300),
        (530, 70, 1100),
        (20, 49, 257),
        (270, 33, 30),
        (9, 20, 128),
        (24, 64, 2500),
    ];
    for (short, (m, n, depth)) in ways().into_iter().flat_map(|short| shapes.map(|shape| (short, shape))) {
        let (mut a, mut b, c0) = (sample(m * depth, 1), sample(n * depth, 2), sample(m * n, 3));
        // A row of nothing but zeros, of either sign, and one whose largest number is far from the others.
        a[..depth].fill(-0.0);
        b[(n - 1) * depth] = 100.0;
        // The second layout of each is its transpose, stored the other way round.
        let (at, bt) = (other(&a, m), other(&b, n));
        let a_views = [View::new(&a, m, depth, depth), View::new(&at, depth, m, m).t()];
        let b_views = [View::new(&b, n, depth, depth), View::new(&bt, depth, n, n).t()];
        let (a, b) = (rounded(short, &a, depth), rounded(short, &b, depth));
        for (a_view, b_view) in a_views.into_iter().zip(b_views) {
            let (left, right) = (Panels::right(short, a_view), Panels::right(short, b_view));
            assert_eq!((left.shape(), right.shape()), ([m, depth], [n, depth]));
            let run = |left: &Panels, from: usize| {
                let mut c = c0[from * n..].to_vec();
                short_gemm(left, from..m, &right, &mut ViewMut::new(&mut c, m - from, n, n));
                c
            };
            let c = run(&left, 0);
            assert_eq!(
                run(&left, (m - 1) / 16 * 16),
                c[(m - 1) / 16 * 16 * n..],
                "rows by themselves are the same bits"
            );
            let left = Panels::left(short, a_view);
            assert_eq!(run(&left, 0), c, "a left side gives the same bits");
            let (mut sums, mut again) = (vec![0.0; m * n], vec![f32::NAN; m * n]);
            short_gemm(&left, 0..m, &right, &mut ViewMut::new(&mut sums, m, n, n));
            short_product(&left, 0..m, &right, &mut ViewMut::new(&mut again, m, n, n));
            assert_eq!(again, sums, "what was there is gone");
            for (i, found) in c.iter().enumerate() {
                let terms = (0..depth).map(|k| a[i / n * depth + k] * b[i % n * depth + k]);
                let (sum, size) = terms.fold((f64::from(c0[i]), 1.0), |(sum, size), t| (sum + t, size + t.abs()));
                assert!((f64::from(*found) - sum).abs() < 1e-6 * size, "{short:?} {m} {n} {depth} {i}: {found} {sum}");
            }
        }
    }
}

#[test]
fn a_product_too_large_for_caches_has_the_bits_of_its_rows() {
    let (m, depth) = (560, 600);
    for (short, n) in ways().into_iter().flat_map(|short| [(short, 4000), (short, 4001)]) {
        let (a, b) = (sample(m * depth, 1), sample(n * depth, 2));
        let (left, right) =
            (Panels::left(short, View::new(&a, m, depth, depth)), Panels::right(short, View::new(&b, n, depth, depth)));
        let mut memory = vec![f32::NAN; m * n + 16];
        let line = memory.as_ptr().align_offset(64);
        let whole = &mut memory[line..][..m * n];
        short_product(&left, 0..m, &right, &mut ViewMut::new(whole, m, n, n));
        for from in (0..m).step_by(48) {
            let rows = from..m.min(from + 48);
            let mut part = vec![f32::NAN; rows.len() * n];
            short_product(&left, rows.clone(), &right, &mut ViewMut::new(&mut part, rows.len(), n, n));
            assert!(part == whole[from * n..][..part.len()], "{short:?} {n} {rows:?}");
        }
        let (left, mut again) = (Panels::right(short, View::new(&a, m, depth, depth)), vec![f32::NAN; m * n]);
        short_product(&left, 0..m, &right, &mut ViewMut::new(&mut again, m, n, n));
        assert!(again == *whole, "{short:?} {n}: a side that is not laid out as a left one");
    }
}

#[test]
fn a_part_of_a_product_has_its_bits() {
    let (m, n, depth) = (40, 150, 70);
    let (a, b) = (sample(m * depth, 1), sample(n * depth, 2));
    for short in ways() {
        let (left, right) =
            (Panels::left(short, View::new(&a, m, depth, depth)), Panels::right(short, View::new(&b, n, depth, depth)));
        let mut whole = vec![0.0; m * n];
        short_product(&left, 0..m, &right, &mut ViewMut::new(&mut whole, m, n, n));
        for (which, diagonal) in [(0..n, usize::MAX), (0..n, 20), (32..101, 5), (144..150, 0), (16..16, 3)] {
            let mut part = vec![f32::NAN; m * n];
            short_part(&left, &right, which.clone(), diagonal, &mut ViewMut::new(&mut part, m, which.len(), n));
            for (i, row) in part.chunks(n).enumerate() {
                let asked = which.len().min(diagonal.saturating_add(i + 1));
                assert_eq!(row[..asked], whole[i * n..][which.clone()][..asked], "{short:?} {which:?} {diagonal} {i}");
            }
        }
    }
}

#[test]
fn columns_that_are_put_apart_are_those_put_together() {
    let (rows, depth) = (70, 300);
    let (x, w) = (sample(depth * rows, 1), sample(33 * depth, 2));
    let tokens: Vec<&[f32]> = x.chunks(rows).collect();
    for short in ways() {
        let right = Panels::right(short, View::new(&w, 33, depth, depth));
        let product = |left: &Panels| short_outer(left, &right);
        let (mut whole, mut apart) = (Panels::empty(short), Panels::empty(short));
        // What is there before is not seen.
        apart.refill(&vec![&[7.0f32; 500][..]; 300], 500);
        whole.refill(&tokens, rows);
        apart.reshape([rows, depth]);
        for from in [128, 0, 256] {
            apart.put(from, &tokens[from..depth.min(from + 128)]);
        }
        assert_eq!(product(&apart), product(&whole), "{short:?}");
    }
}

#[test]
fn products_without_depth_are_zero() {
    for short in ways() {
        let (left, right) =
            (Panels::left(short, View::new(&[], 3, 0, 0)), Panels::right(short, View::new(&[], 2, 0, 0)));
        let mut c = vec![5.0; 6];
        short_gemm(&left, 0..3, &right, &mut ViewMut::new(&mut c, 3, 2, 2));
        assert_eq!(c, [5.0; 6]);
        short_product(&left, 0..3, &right, &mut ViewMut::new(&mut c, 3, 2, 2));
        assert_eq!(c, [0.0; 6]);
    }
}

#[test]
fn syrk_is_the_product_and_ignores_the_thread_count_and_the_parts() {
    for (tokens, n) in [(1500, 210), (3000, 1030), (20_000, 90)] {
        let x = sample(tokens * n, 5);
        let halves = x.split_at(tokens / 3 * n);
        for short in ways() {
            let run = |threads, parts: &[&[f32]]| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let mut h = vec![0.5; n * n];
                pool.install(|| short_syrk(short, parts, n, &mut h));
                mirror(&mut h, n);
                h
            };
            let h = run(1, &[&x]);
            assert!([2, 3].iter().all(|&t| run(t, &[halves.0, &[], halves.1]) == h));
            let by_panels = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let part = |x: &[f32]| Panels::right(short, View::new(x, x.len() / n, n, n).t());
                let parts: Vec<Panels> = x.chunks(512 * n).map(part).collect();
                let mut h = vec![0.5; n * n];
                pool.install(|| panels_syrk(&parts.iter().collect::<Vec<_>>(), &mut h));
                mirror(&mut h, n);
                h
            };
            let again = by_panels(1);
            assert!(by_panels(3) == again);
            let close = |(a, b): (&f32, &f32)| (a - b).abs() <= 2e-6 * tokens as f32;
            assert!(again.iter().zip(&h).all(close), "{short:?} {tokens} {n}: tokens that are rounded before");
            // Tokens are the depth here.
            let x = rounded(short, &other(&x, tokens), tokens);
            for i in (0..n).step_by(n.div_ceil(210)) {
                for j in (0..n).step_by(n.div_ceil(100)) {
                    let (a, b) = (&x[i * tokens..][..tokens], &x[j * tokens..][..tokens]);
                    let (sum, size) = (a.iter().zip(b).map(|(a, b)| a * b))
                        .fold((0.5, 1.0), |(sum, size), term| (sum + term, size + term.abs()));
                    let found = f64::from(h[i * n + j]);
                    assert!((found - sum).abs() < 2e-6 * size && h[i * n + j] == h[j * n + i], "{n} {i} {j}");
                }
            }
        }
    }
}

#[test]
fn a_left_side_that_is_rounded_is_that_which_would_be() {
    for (short, (m, n, depth)) in
        ways().into_iter().flat_map(|short| [(5, 17, 3), (40, 35, 300), (64, 48, 256)].map(|s| (short, s)))
    {
        let (a, b) = (sample(m * depth, 1), sample(n * depth, 2));
        let narrow: Vec<bf16> = a.iter().map(|&a| bf16::from_f32(a)).collect();
        let wide: Vec<f32> = narrow.iter().map(|a| a.to_f32()).collect();
        let b = Panels::right(short, View::new(&b, n, depth, depth));
        let left = Panels::left(short, View::new(&wide, m, depth, depth));
        let mut rounded = Panels::left(short, View::new(&sample(700, 3), 7, 100, 100));
        rounded.refill_left_rounded(View::new(&narrow, m, depth, depth));
        assert_eq!(short_outer(&left, &b), short_outer(&rounded, &b));
    }
}
