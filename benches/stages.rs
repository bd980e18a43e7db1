//! What each stage of quantizing one linear costs, beside what this machine can do at best.
//!
//! `cargo bench` prints, for every stage, the median of several runs as a rate, and the rate of the two limits it is held
//! against, measured in the same process: multiply-adds of a large f32 product, and bytes of a plain copy. Each stage's
//! answer is checked before it is timed. Recorded tables lie in `benches/record/`.

mod clock;

use bitmill::kernels::{
    Panels, Short, View, ViewMut, gemm, mirror, pack_bits, packed_words, short_product, short_syrk, syrk, unpack_bits,
};
use bitmill::quantize::{
    Factor, Linear, Order, ScaleSearch, SolverOptions, Sweep, descend, loss, method, refit_scales, sweep,
};
use bitmill::scheme::{Bits, Granularity, Scheme};
use clock::time;
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

fn main() {
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
    syrk(&x, n, &mut h);
    mirror(&mut h, n);
    assert!((h[n + 1] - x.iter().skip(1).step_by(n).map(|v| v * v).sum::<f32>()).abs() < 0.05 * tokens as f32);
    let mut g = vec![0.0f32; n * n];
    row("H += XᵀX (half of it computed)", time(|| syrk(&x, n, &mut g)), (tokens * n * n) as f64 / 2.0, "GMAC/s", macs);

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
