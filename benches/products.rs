//! What a product with packed codes costs, beside what this machine can do at best.
//!
//! `cargo bench --bench products` prints, for every shape and width, the median of several runs: for one token the bytes of
//! the weights that pass per second, beside what plain reading of the same bytes makes, in turns, and for 512 tokens
//! multiply-adds per second, beside those of an f32 product. One token meets copies of the matrix one after another, more of them
//! than any cache holds. Every width is held
//! to the scalar definition, on a small matrix, before any is timed. Recorded tables lie in `benches/record/`.

mod clock;

use bitmill::kernels::{
    CHUNK, Level, Packed, PackedForm, Rounded, Scales, View, ViewMut, gemm, packed_product, packed_product_int8,
    round_activations,
};
use clock::{in_turns, time};
use rayon::prelude::*;
use std::hint::black_box;

/// Widths that are measured.
const WIDTHS: [u32; 4] = [2, 3, 4, 8];

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

/// Inputs of `tokens` tokens, in f32 and rounded.
struct Inputs {
    full: Vec<f32>,
    values: Vec<i8>,
    scales: Vec<f32>,
}

impl Inputs {
    fn new(matrix: &Matrix, tokens: usize) -> Self {
        let full: Vec<f32> = (0..tokens * matrix.form.shape()[1]).map(number).collect();
        let chunks = tokens * matrix.form.chunks();
        let mut inputs = Inputs { full, values: vec![0; chunks * CHUNK], scales: vec![0.0; chunks] };
        inputs.round(matrix);
        inputs
    }

    fn round(&mut self, matrix: &Matrix) {
        let cols = matrix.form.shape()[1];
        round_activations(Level::best(), &self.full, cols, &mut self.values, &mut self.scales);
    }

    fn rounded(&self) -> Rounded<'_> {
        Rounded { values: &self.values, scales: &self.scales }
    }
}

/// Panics where products of this CPU's level have other bits than their definition.
fn check(matrix: &Matrix, tokens: usize) {
    let (w, x) = (matrix.packed(), Inputs::new(matrix, tokens));
    let run = |level| {
        let (mut int8, mut full) =
            (vec![0.0; tokens * matrix.form.shape()[0]], vec![0.0; tokens * matrix.form.shape()[0]]);
        packed_product_int8(level, &w, &x.rounded(), &mut int8);
        packed_product(level, &w, &x.full, &mut full);
        (int8, full)
    };
    assert!(run(Level::best()) == run(Level::Scalar), "another answer than the definition's");
}

/// Seconds of a product for `tokens` tokens, with rounded activations (rounding them included) and with full ones.
fn products(matrix: &Matrix, tokens: usize) -> [f64; 2] {
    let (w, mut x) = (matrix.packed(), Inputs::new(matrix, tokens));
    let mut out = vec![0.0; tokens * matrix.form.shape()[0]];
    let rounded = time(|| {
        x.round(matrix);
        packed_product_int8(Level::best(), &w, &x.rounded(), &mut out);
    });
    [rounded, time(|| packed_product(Level::best(), &w, &x.full, &mut out))]
}

/// Bytes that no cache holds.
const UNCACHED: f64 = 256e6;

/// Seconds that one token takes to meet a matrix that is in memory, with rounded activations and with full ones, and to read
/// as many bytes.
fn one_token(bits: u32, shape: [usize; 2]) -> [f64; 3] {
    let first = Matrix::new(bits, shape);
    let copies = (UNCACHED / first.bytes()).ceil() as usize;
    let matrices: Vec<Matrix> = (0..copies).map(|_| Matrix::new(bits, shape)).collect();
    let (mut x, mut out) = (Inputs::new(&first, 1), vec![0.0; shape[0]]);
    let full = Inputs::new(&first, 1);
    let mut again = out.clone();
    let words = |bytes: &[u8]| bytes.as_chunks().0.iter().fold(0u64, |sum, &word| sum ^ u64::from_le_bytes(word));
    // Each thread reads one stretch, as it does of a matrix.
    let part = |matrix: &Matrix| matrix.codes.len().div_ceil(rayon::current_num_threads()).next_multiple_of(8);
    let seconds = in_turns(&mut [
        &mut || {
            for matrix in &matrices {
                x.round(matrix);
                packed_product_int8(Level::best(), &matrix.packed(), &x.rounded(), &mut out);
            }
        },
        &mut || {
            for matrix in &matrices {
                packed_product(Level::best(), &matrix.packed(), &full.full, &mut again);
            }
        },
        &mut || {
            for matrix in &matrices {
                black_box(matrix.codes.par_chunks(part(matrix)).map(words).max());
            }
        },
    ]);
    let share = first.bytes() / first.codes.len() as f64;
    [seconds[0], seconds[1], seconds[2] * share].map(|s| s / copies as f64)
}

fn main() {
    let threads = rayon::current_num_threads();
    let (a, mut c) = (vec![0.5f32; 1024 * 1024], vec![0.0f32; 1024 * 1024]);
    let view = View::new(&a, 1024, 1024, 1024);
    let peak = time(|| gemm(1.0, view, view, 0.0, &mut ViewMut::new(&mut c, 1024, 1024, 1024)));
    let macs = 1024f64.powi(3) / peak / 1e9 * threads as f64;
    println!("{:?}, {threads} threads; limit: f32 product {macs:.0} GMAC/s", Level::best());

    WIDTHS.iter().for_each(|&bits| check(&Matrix::new(bits, [512, 512]), 5));
    println!("\none token              bits    MB   reading     int8 activations           f32 activations");
    for shape in [[2048, 2048], [8192, 2048], [2048, 8192], [4096, 4096], [14336, 4096], [4096, 14336]] {
        for bits in WIDTHS {
            let [int8, full, read] = one_token(bits, shape);
            let bytes = Matrix::new(bits, shape).bytes();
            let cell = |s: f64| {
                let rate = bytes / s / 1e9;
                format!("{:>8.1} us {rate:>5.1} GB/s {:>4.0}%", s * 1e6, 100.0 * read / s)
            };
            let (name, limit) = (format!("[{}, {}]", shape[0], shape[1]), bytes / read / 1e9);
            println!("{name:<22} {bits:>4} {:>5.1}  {limit:>4.1} GB/s  {}   {}", bytes / 1e6, cell(int8), cell(full));
        }
    }
    println!("\n512 tokens             bits   int8 activations            f32 activations");
    for shape in [[2048, 2048], [4096, 4096], [4096, 14336]] {
        for bits in WIDTHS {
            let matrix = Matrix::new(bits, shape);
            let cell = |s: f64| {
                let rate = (512 * shape[0] * shape[1]) as f64 / s / 1e9;
                format!("{:>8.2} ms {rate:>5.0} GMAC/s {:>4.0}%", s * 1e3, 100.0 * rate / macs)
            };
            let [int8, full] = products(&matrix, 512);
            let name = format!("[{}, {}]", shape[0], shape[1]);
            println!("{name:<22} {bits:>4}  {}   {}", cell(int8), cell(full));
        }
    }
}
