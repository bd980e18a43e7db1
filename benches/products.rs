//! What a product with packed codes costs, beside what this machine can do at best.
//!
//! `cargo bench --bench products` prints, for every shape and width, the median of several runs: for one token the bytes of
//! the weights that pass per second, beside the machine's own reading speed, and for 512 tokens multiply-adds per second,
//! beside those of an f32 product. A matrix that fits into the cache may be read faster than memory is. Each answer is
//! checked against the scalar definition before it is timed. Recorded tables lie in `benches/record/`.

use bitmill::kernels::{
    CHUNK, Level, Packed, PackedForm, Rounded, Scales, View, ViewMut, gemm, packed_product, packed_product_int8,
    round_activations,
};
use rayon::prelude::*;
use std::hint::black_box;
use std::time::Instant;

const RUNS: usize = 15;

/// Median seconds of `RUNS` runs, after one that warms caches.
fn time(mut f: impl FnMut()) -> f64 {
    f();
    let mut seconds: Vec<f64> = (0..RUNS)
        .map(|_| {
            let start = Instant::now();
            f();
            start.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    seconds[RUNS / 2]
}

fn number(i: usize) -> f32 {
    ((i * 7919 + 13) % 1009) as f32 / 505.0 - 1.0
}

/// A matrix of `bits` bits in groups of 128, in as many bytes as a folder stores.
struct Matrix {
    form: PackedForm,
    codes: Vec<u8>,
    scales: Vec<u16>,
}

impl Matrix {
    fn new(bits: u32, shape: [usize; 2]) -> Self {
        let form = PackedForm::new(bits, shape, 128).expect("a layout");
        // Any bytes are codes.
        let codes = (0..form.code_bytes()).map(|i| ((i * 2_654_435_761) >> 9) as u8).collect();
        let scales = (0..form.params()).map(|i| (number(i).abs().to_bits() >> 16) as u16).collect();
        Matrix { form, codes, scales }
    }

    fn packed(&self) -> Packed<'_> {
        Packed { form: self.form, codes: &self.codes, scales: Scales::Bf16(&self.scales), zeros: &[] }
    }

    fn bytes(&self) -> f64 {
        (self.codes.len() + 2 * self.scales.len()) as f64
    }
}

/// Seconds of a product for `tokens` tokens, with rounded activations and with full ones.
fn products(matrix: &Matrix, tokens: usize, check: bool) -> [f64; 2] {
    let (w, [rows, cols]) = (matrix.packed(), matrix.form.shape());
    let x: Vec<f32> = (0..tokens * cols).map(number).collect();
    let chunks = matrix.form.chunks();
    let (mut values, mut scales) = (vec![0; tokens * chunks * CHUNK], vec![0.0; tokens * chunks]);
    let (mut int8, mut full) = (vec![0.0; tokens * rows], vec![0.0; tokens * rows]);
    let rounded = time(|| {
        round_activations(&x, cols, &mut values, &mut scales);
        packed_product_int8(Level::best(), &w, &Rounded { values: &values, scales: &scales }, &mut int8);
    });
    let exact = time(|| packed_product(Level::best(), &w, &x, &mut full));
    if check {
        let (mut int8_too, mut full_too) = (vec![0.0; tokens * rows], vec![0.0; tokens * rows]);
        packed_product_int8(Level::Scalar, &w, &Rounded { values: &values, scales: &scales }, &mut int8_too);
        packed_product(Level::Scalar, &w, &x, &mut full_too);
        assert!(int8 == int8_too && full == full_too, "another answer than the definition's");
    }
    [rounded, exact]
}

fn main() {
    let threads = rayon::current_num_threads();
    let (a, mut c) = (vec![0.5f32; 1024 * 1024], vec![0.0f32; 1024 * 1024]);
    let view = View::new(&a, 1024, 1024, 1024);
    let peak = time(|| gemm(1.0, view, view, 0.0, &mut ViewMut::new(&mut c, 1024, 1024, 1024)));
    let macs = 1024f64.powi(3) / peak / 1e9 * threads as f64;
    let memory = vec![1u64; (512 << 20) / 8];
    let sum = |part: &[u64]| part.iter().fold(0u64, |s, v| s ^ v);
    let read = (512 << 20) as f64 / time(|| _ = black_box(memory.par_chunks(1 << 16).map(sum).max())) / 1e9;
    drop(memory);
    println!("{:?}, {threads} threads; limits: reading {read:.1} GB/s, f32 product {macs:.0} GMAC/s", Level::best());

    products(&Matrix::new(4, [512, 512]), 5, true);
    println!("\none token              bits    MB   int8 activations           f32 activations");
    for shape in [[2048, 2048], [8192, 2048], [2048, 8192], [4096, 4096], [14336, 4096], [4096, 14336]] {
        for bits in [2, 3, 4, 8] {
            let matrix = Matrix::new(bits, shape);
            let [int8, full] = products(&matrix, 1, false);
            let cell = |s: f64| {
                let rate = matrix.bytes() / s / 1e9;
                format!("{:>8.1} us {rate:>5.1} GB/s {:>4.0}%", s * 1e6, 100.0 * rate / read)
            };
            let name = format!("[{}, {}]", shape[0], shape[1]);
            println!("{name:<22} {bits:>4} {:>5.1}  {}   {}", matrix.bytes() / 1e6, cell(int8), cell(full));
        }
    }
    println!("\n512 tokens             bits   int8 activations            f32 activations");
    for shape in [[2048, 2048], [4096, 4096], [4096, 14336]] {
        for bits in [2, 3, 4, 8] {
            let matrix = Matrix::new(bits, shape);
            let cell = |s: f64| {
                let rate = (512 * shape[0] * shape[1]) as f64 / s / 1e9;
                format!("{:>8.2} ms {rate:>5.0} GMAC/s {:>4.0}%", s * 1e3, 100.0 * rate / macs)
            };
            let [int8, full] = products(&matrix, 512, false);
            let name = format!("[{}, {}]", shape[0], shape[1]);
            println!("{name:<22} {bits:>4}  {}   {}", cell(int8), cell(full));
        }
    }
}
