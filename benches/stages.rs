//! What each stage of quantizing one linear costs, beside what this machine can do at best.
//!
//! `cargo bench` prints, for every stage, the median of several runs as a rate, and the rate of the two limits it is held
//! against, measured in the same process: multiply-adds of a large f32 product, and bytes of a plain copy. Each stage's
//! answer is checked before it is timed. Recorded tables lie in `benches/record/`.
//!
//! With `-- --beside COMMAND`, products, H += XᵀX and factors take turns with those of another library, which the command times
//! (`cargo xtask bench dense`), and nothing else is measured.

mod clock;

use bitmill::kernels::{
    Panels, Short, View, ViewMut, cholesky, gemm, mirror, pack_bits, packed_words, short_product, short_syrk, solve,
    syrk, unpack_bits,
};
use bitmill::quantize::{
    Factor, Linear, Order, ScaleSearch, SolverOptions, Sweep, descend, loss, method, refit_scales, sweep,
};
use bitmill::scheme::{Bits, Granularity, Scheme};
use clock::{Peer, in_turns, time};
use rayon::prelude::*;
use std::cell::RefCell;
use std::hint::black_box;

fn row(name: &str, seconds: f64, amount: f64, unit: &str, limit: f64) {
    let rate = amount / seconds / 1e9;
    println!("{name:<34} {:>9.2} ms {rate:>8.2} {unit:<7} {:>5.0}% of the limit", seconds * 1e3, 100.0 * rate / limit);
}

fn sample(count: usize, seed: u64) -> Vec<f32> {
    let mut s = seed;
    (0..count)
        .map(|_| {
            s = s.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (s >> 40) as f32 / 8_388_608.0 - 1.0
        })
        .collect()
}

/// Products of one thread, both sides rounded within the time, and what is left when they are.
fn short_products(short: Short, limit: f64) {
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a thread");
    one.install(|| {
        for [m, k, n] in [[4096, 1024, 384], [1024, 1024, 1024], [512, 2048, 2048]] {
            let (a, b) = (sample(m * k, 3), sample(n * k, 4));
            let (a, b) = (View::new(&a, m, k, k), View::new(&b, n, k, k));
            let mut c = vec![0.0; m * n];
            let mut multiply = |a: &Panels, b: &Panels| short_product(a, 0..m, b, &mut ViewMut::new(&mut c, m, n, n));
            let whole = time(|| multiply(&Panels::left(short, a), &Panels::right(short, b)));
            let (a, b) = (Panels::left(short, a), Panels::right(short, b));
            let product = time(|| multiply(&a, &b));
            for (what, seconds) in [("rounded and multiplied", whole), ("multiplied", product)] {
                row(&format!("{m}x{k}x{n} {what}"), seconds, (m * k * n) as f64, "GMAC/s", limit);
            }
        }
    });
}

/// Rows of A that a task of a product takes at most.
const BAND: usize = 512;
/// Shapes of products that take turns with a peer: rows, depth, columns.
const PRODUCTS: [[usize; 3]; 7] = [
    [4096, 1024, 384],
    [1024, 1024, 1024],
    [512, 2048, 2048],
    [512, 320, 864],
    [512, 2048, 8192],
    [512, 8192, 2048],
    [8192, 4096, 4096],
];
/// Tokens and width of X, likewise.
const SQUARES: [[usize; 2]; 5] = [[65536, 320], [8192, 768], [65536, 864], [8192, 2048], [2048, 8192]];
/// Widths of matrices to factor, likewise.
const FACTORS: [usize; 4] = [320, 864, 2048, 8192];
/// Widths of factors and numbers of right-hand sides, likewise.
const SYSTEMS: [[usize; 2]; 4] = [[320, 320], [864, 320], [2048, 2048], [8192, 2048]];
/// Multiply-adds of a turn, at least: what it takes to wake threads shall not count.
const TURN: usize = 8 << 30;

/// Rows of a task among so many: of all threads, at least one each.
fn band(rows: usize) -> usize {
    rows.div_ceil(rayon::current_num_threads()).next_multiple_of(16).min(BAND)
}

/// `c ← a·bᵀ` of rounded sides, by all threads.
fn multiplied(a: &Panels, b: &Panels, c: &mut [f32]) {
    let ([m, _], [n, _]) = (a.shape(), b.shape());
    let band = band(m);
    c.par_chunks_mut(band * n).enumerate().for_each(|(i, c)| {
        let (from, rows) = (i * band, c.len() / n);
        short_product(a, from..from + rows, b, &mut ViewMut::new(c, rows, n, n));
    });
}

/// `c ← a·b` in f32, by all threads.
fn multiplied_in_full(a: View<'_, f32>, b: View<'_, f32>, c: &mut [f32]) {
    let n = b.cols();
    let band = band(a.rows());
    c.par_chunks_mut(band * n).enumerate().for_each(|(i, c)| {
        let (from, rows) = (i * band, c.len() / n);
        gemm(1.0, a.some_rows(from..from + rows), b, 0.0, &mut ViewMut::new(c, rows, n, n));
    });
}

/// Ways to multiply in bfloat16, and their names.
fn brains() -> Vec<(String, Short)> {
    let brains = Short::all().into_iter().filter(|short| matches!(short, Short::Bf16(_)));
    let tiles = |short: &Short| format!("{short:?}").contains("amx: Some");
    brains.map(|short| (format!("bf16 {}", if tiles(&short) { "AMX" } else { "AVX-512" }), short)).collect()
}

/// Panics where a product of bfloat16 is not what it is in f32 but for the rounding of its sides.
fn check(short: Short) {
    let [m, k, n] = [1100, 96, 80];
    let (a, b) = (sample(m * k, 3), sample(n * k, 4));
    let (a, b) = (View::new(&a, m, k, k), View::new(&b, n, k, k));
    let (mut c, mut full) = (vec![f32::NAN; m * n], vec![0.0; m * n]);
    gemm(1.0, a, b.t(), 0.0, &mut ViewMut::new(&mut full, m, n, n));
    multiplied(&Panels::left(short, a), &Panels::right(short, b), &mut c);
    let far =
        c.iter().zip(&full).fold(0.0f32, |far, (c, full)| if (c - full).abs() <= far { far } else { (c - full).abs() });
    assert!(far < 0.25, "a product that is off by {far}");
}

/// A line of rates of what was done `times` times in each turn of ours, beside the peer's, which tells the seconds of once.
fn rates(what: &str, amount: f64, ours: &[(String, f64)], peer: &mut Peer) {
    let theirs = peer.medians();
    let fastest = theirs.iter().map(|(_, seconds)| *seconds).fold(f64::MAX, f64::min);
    let rate = |seconds: f64| amount / seconds / 1e9;
    let ours = ours.iter().map(|(name, s)| format!("{name} {:>5.0} ({:>5.2}x)", rate(*s), fastest / s));
    let theirs = theirs.iter().map(|(name, s)| format!("{name} {:>5.0}", rate(*s)));
    println!("{what:<22} {}", ours.chain(theirs).collect::<Vec<_>>().join("   "));
}

/// Products, H += XᵀX from f32, and factors, in turns with the peer.
fn beside(mut peer: Peer) {
    let brains = brains();
    brains.iter().for_each(|&(_, short)| check(short));
    println!(
        "{} threads; medians in GMAC/s, and how many times as fast as the peer\n\nproducts",
        rayon::current_num_threads()
    );
    if brains.is_empty() {
        println!("none in bfloat16: this CPU has no AVX-512 BF16");
    }
    for [m, k, n] in PRODUCTS {
        let times = TURN.div_ceil(m * k * n);
        let (a, b) = (sample(m * k, 3), sample(n * k, 4));
        let (a, b) = (View::new(&a, m, k, k), View::new(&b, n, k, k));
        let c = RefCell::new(vec![0.0; m * n]);
        let sides = brains.iter().map(|&(_, short)| (Panels::left(short, a), Panels::right(short, b)));
        let ours = sides.map(|(a, b)| -> Box<dyn FnMut()> {
            let c = &c;
            Box::new(move || (0..times).for_each(|_| multiplied(&a, &b, &mut c.borrow_mut())))
        });
        let full: [Box<dyn FnMut() + '_>; 1] =
            [Box::new(|| (0..times).for_each(|_| multiplied_in_full(a, b.t(), &mut c.borrow_mut())))];
        let work = format!("gemm {m} {k} {n} {times}");
        let seconds = turns(ours.chain(full).collect(), &mut || peer.run(&work));
        let names = brains.iter().map(|(name, _)| name.clone()).chain(["f32".to_owned()]);
        let ours: Vec<_> = names.zip(seconds.iter().map(|seconds| seconds / times as f64)).collect();
        rates(&format!("{m} x {k} x {n}"), (m * k * n) as f64, &ours, &mut peer);
    }

    println!("\nH += XᵀX of tokens in f32, rounding counted; rates of half of H, of the f32 product of all of it");
    for [tokens, n] in SQUARES {
        let x = sample(tokens * n, 2);
        let h = RefCell::new(vec![0.0; n * n]);
        let (x, h) = (&x, &h);
        let ours = brains.iter().map(|&(_, short)| -> Box<dyn FnMut() + '_> {
            Box::new(move || short_syrk(short, &[x], n, &mut h.borrow_mut()))
        });
        let full: [Box<dyn FnMut() + '_>; 2] = [
            Box::new(|| syrk(&[x], n, &mut h.borrow_mut())),
            Box::new(|| {
                let x = View::new(x, tokens, n, n);
                multiplied_in_full(x.t(), x, &mut h.borrow_mut());
            }),
        ];
        let work = format!("syrk {tokens} {n}");
        let seconds = turns(ours.chain(full).collect(), &mut || peer.run(&work));
        let (half, limit) = ((tokens * n * n) as f64 / 2.0, seconds[brains.len() + 1]);
        let names = brains.iter().map(|(name, _)| name.clone()).chain(["f32".to_owned()]);
        let ours: Vec<_> = names.zip(seconds.iter().copied()).collect();
        rates(&format!("{tokens} tokens of {n}"), half, &ours, &mut peer);
        let share = 100.0 * limit / 2.0 / seconds[brains.len()];
        println!("{:<22} f32 product {:.0}: f32 is at {share:.0}% of it", "", 2.0 * half / limit / 1e9);
    }

    println!("\nCholesky factors of H in f64");
    for n in FACTORS {
        let mut original = sample(n * n, 5).into_iter().map(f64::from).collect::<Vec<_>>();
        (0..n).for_each(|i| original[i * n + i] = n as f64);
        let mut l = vec![0.0; n * n];
        let mut factor = || {
            l.copy_from_slice(&original);
            assert!(cholesky(&mut l, n), "a diagonal that outweighs its row");
        };
        let seconds = in_turns(&mut [&mut factor, &mut || peer.run(&format!("factor {n}"))]);
        rates(&format!("{n} x {n}"), (n * n * n) as f64 / 6.0, &[("f64".to_owned(), seconds[0])], &mut peer);
    }

    println!("\nsystems with such factors, in f64");
    for [n, rows] in SYSTEMS {
        let mut l: Vec<f64> = sample(n * n, 5).into_iter().map(f64::from).collect();
        (0..n).for_each(|i| l[i * n + i] = n as f64);
        let original: Vec<f64> = sample(n * rows, 6).into_iter().map(f64::from).collect();
        let mut x = vec![0.0; n * rows];
        let mut solved = || {
            x.copy_from_slice(&original);
            solve(&l, n, &mut x);
        };
        let seconds = in_turns(&mut [&mut solved, &mut || peer.run(&format!("solve {n} {rows}"))]);
        rates(&format!("{rows} rows of {n}"), (rows * n * n) as f64, &[("f64".to_owned(), seconds[0])], &mut peer);
    }
}

/// Seconds of ours in turns with another.
fn turns(mut ours: Vec<Box<dyn FnMut() + '_>>, theirs: &mut dyn FnMut()) -> Vec<f64> {
    let mut all: Vec<&mut dyn FnMut()> = ours.iter_mut().map(|f| &mut **f as &mut dyn FnMut()).collect();
    all.push(theirs);
    in_turns(&mut all)
}

fn main() {
    if let Some(peer) = Peer::of_arguments() {
        return beside(peer);
    }
    let (out, n, tokens) = (768usize, 768usize, 8192usize);
    let threads = rayon::current_num_threads();
    println!("{threads} threads; one linear of [{out}, {n}], {tokens} tokens");

    // The limits: a product of 1024³ on one thread times the threads, and a copy of 256 MB.
    let (a, mut c) = (sample(1024 * 1024, 1), vec![0.0f32; 1024 * 1024]);
    let view = View::new(&a, 1024, 1024, 1024);
    let peak = time(|| gemm(1.0, view, view, 0.0, &mut ViewMut::new(&mut c, 1024, 1024, 1024)));
    let macs = 1024f64.powi(3) / peak / 1e9 * threads as f64;
    let (from, mut to) = (vec![1u8; 256 << 20], vec![0u8; 256 << 20]);
    let copy = (256 << 20) as f64 / time(|| black_box(&mut to).copy_from_slice(black_box(&from))) / 1e9;
    println!("limits: {macs:.0} G multiply-adds/s ({threads} x one thread's f32 product), copy {copy:.1} GB/s\n");

    let x = sample(tokens * n, 2);
    let mut h = vec![0.0f32; n * n];
    syrk(&[&x], n, &mut h);
    mirror(&mut h, n);
    assert!((h[n + 1] - x.iter().skip(1).step_by(n).map(|v| v * v).sum::<f32>()).abs() < 0.05 * tokens as f32);
    let mut g = vec![0.0f32; n * n];
    row(
        "H += XᵀX (half of it computed)",
        time(|| syrk(&[&x], n, &mut g)),
        (tokens * n * n) as f64 / 2.0,
        "GMAC/s",
        macs,
    );

    for short in Short::all() {
        let what = match short {
            Short::Bf16(_) => "bfloat16",
            Short::Int8(_) => "eight bits",
        };
        let seconds = time(|| short_syrk(short, &[&x], n, &mut g));
        row(&format!("H += XᵀX in {what}"), seconds, (tokens * n * n) as f64 / 2.0, "GMAC/s", macs);
        short_products(short, macs / threads as f64);
    }

    h.iter_mut().for_each(|v| *v /= tokens as f32);
    let importance: Vec<f32> = (0..n).map(|i| h[i * n + i]).collect();
    let order = Order::by_importance(&importance, 128);
    let factor = Factor::new(&h, &order.columns, 0.01).expect("a positive definite H");
    let seconds = time(|| drop(black_box(Factor::new(&h, &order.columns, 0.01))));
    row("factor of H (f64: half the limit)", seconds, (n * n * n) as f64 / 6.0, "GMAC/s", macs / 2.0);

    let w = sample(out * n, 3);
    let scheme = Scheme::int(Bits::ALL[3], true, Granularity::Group(128));
    let what = Sweep {
        factor: &factor,
        order: &order,
        grid: scheme.grid(),
        group_len: 128,
        search: ScaleSearch::Hessian,
        fixed: None,
    };
    let seconds = time(|| drop(black_box(sweep(&w, &what))));
    row("sweep with scale search", seconds, (out * n * n) as f64 / 2.0, "GMAC/s", macs);
    let mut plain = what;
    plain.search = ScaleSearch::MinMax;
    let seconds = time(|| drop(black_box(sweep(&w, &plain))));
    row("sweep without", seconds, (out * n * n) as f64 / 2.0, "GMAC/s", macs);

    let linear = Linear { name: "x", weight: &w, shape: [out, n], scheme, amax: None, input: 0.0 };
    let options = SolverOptions { descent_sweeps: 0, scale_refits: 0, ..SolverOptions::default() };
    let solve = |o: &SolverOptions| method("gptq").and_then(|m| m.solve(&[linear], Some(&h), o)).expect("solvable");
    let start = solve(&options).remove(0).quantized;
    let before: f64 = loss(&w, &start.dequantize(), &h).iter().sum();
    let mut q = start.clone();
    descend(&w, &mut q, &h, 4);
    assert!(loss(&w, &q.dequantize(), &h).iter().sum::<f64>() < before);
    row(
        "coordinate descent, 4 sweeps",
        time(|| _ = black_box(descend(&w, &mut start.clone(), &h, 4))),
        (out * n * n) as f64,
        "GMAC/s",
        macs,
    );
    row(
        "scales refitted",
        time(|| _ = black_box(refit_scales(&w, &mut start.clone(), &h))),
        (out * n * n) as f64,
        "GMAC/s",
        macs,
    );

    let bytes = (out * n * 4) as f64;
    row("dequantize (f32 written)", time(|| drop(black_box(start.dequantize()))), bytes, "GB/s", copy);
    for bits in [2u32, 3, 4, 8] {
        let codes: Vec<u8> = start.codes.iter().map(|c| c & ((1u16 << bits) - 1) as u8).collect();
        let mut words = vec![0u32; packed_words(codes.len(), bits)];
        let mut back = vec![0u8; codes.len()];
        row(
            &format!("pack {bits} bits (codes read)"),
            time(|| pack_bits(&codes, bits, &mut words)),
            codes.len() as f64,
            "GB/s",
            copy,
        );
        row(
            &format!("unpack {bits} bits (codes written)"),
            time(|| unpack_bits(&words, bits, &mut back)),
            codes.len() as f64,
            "GB/s",
            copy,
        );
        assert_eq!(back, codes);
    }
}
