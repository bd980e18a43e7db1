//! What a product with packed codes costs, beside what this machine can do at best.
//!
//! `cargo bench --bench products` prints, for every shape and width, the median of several runs: for one token the bytes of
//! the weights that pass per second, beside what plain reading of the same bytes makes, in turns, and for 512 tokens
//! multiply-adds per second, beside those of an f32 product. One token meets copies of the matrix one after another, more of them
//! than any cache holds, and threads stay awake in between, as they do for who generates text (those of llama.cpp do, too). Every
//! width is held to the scalar definition, on a small matrix, before any is timed. Recorded tables lie in `benches/record/`.
//!
//! With `-- --beside COMMAND`, products with codes of 4 bits take turns with those of another library, which the command
//! times (`cargo xtask bench products`).

mod clock;

use bitmill::kernels::{
    CHUNK, Level, Packed, PackedForm, Rounded, RoundedMut, Scales, View, ViewMut, awake, fill_chunks, gemm,
    packed_product, packed_product_int8, round_activations,
};
use clock::{Peer, in_turns, time};
use std::hint::black_box;

/// Widths that are measured.
const WIDTHS: [u32; 4] = [2, 3, 4, 8];

fn number(i: usize) -> f32 {
    ((i * 7919 + 13) % 1009) as f32 / 505.0 - 1.0
}

/// Shapes of matrices.
const SHAPES: [[usize; 2]; 6] = [[2048, 2048], [8192, 2048], [2048, 8192], [4096, 4096], [14336, 4096], [4096, 14336]];

/// A matrix of some bits in groups, in as many bytes as a folder stores.
struct Matrix {
    form: PackedForm,
    codes: Vec<u8>,
    scales: Vec<u16>,
}

impl Matrix {
    fn new(bits: u32, group: usize, shape: [usize; 2]) -> Self {
        let form = PackedForm::new(bits, shape, group).expect("a layout");
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
    sums: Vec<i32>,
}

impl Inputs {
    fn new(matrix: &Matrix, tokens: usize) -> Self {
        let full: Vec<f32> = (0..tokens * matrix.form.shape()[1]).map(number).collect();
        let (chunks, spans) = (tokens * matrix.form.chunks(), tokens * matrix.form.spans());
        let mut inputs =
            Inputs { full, values: vec![0; chunks * CHUNK], scales: vec![0.0; spans], sums: vec![0; chunks] };
        inputs.round(matrix);
        inputs
    }

    fn round(&mut self, matrix: &Matrix) {
        let cols = matrix.form.shape()[1];
        let out = RoundedMut { values: &mut self.values, scales: &mut self.scales, sums: &mut self.sums };
        round_activations(Level::best(), &self.full, cols, out);
    }

    fn rounded(&self) -> Rounded<'_> {
        Rounded { values: &self.values, scales: &self.scales, sums: &self.sums }
    }
}

/// Panics where products of a level have other bits than their definition.
fn check(matrix: &Matrix, tokens: usize) {
    let (w, x) = (matrix.packed(), Inputs::new(matrix, tokens));
    let run = |level| {
        let (mut int8, mut full) =
            (vec![0.0; tokens * matrix.form.shape()[0]], vec![0.0; tokens * matrix.form.shape()[0]]);
        packed_product_int8(level, &w, &x.rounded(), &mut int8);
        packed_product(level, &w, &x.full, &mut full);
        (int8, full)
    };
    let definition = run(Level::Scalar);
    assert!(Level::all().into_iter().all(|level| run(level) == definition), "another answer than the definition's");
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

/// As many copies of a matrix.
fn uncached(bits: u32, group: usize, shape: [usize; 2]) -> Vec<Matrix> {
    let first = Matrix::new(bits, group, shape);
    let more = (UNCACHED / first.bytes()).ceil() as usize - 1;
    let mut all = vec![first];
    all.extend((0..more).map(|_| Matrix::new(bits, group, shape)));
    all
}

/// Seconds that one token takes to meet a matrix that is in memory, with rounded activations and with full ones, and to read
/// as many bytes.
fn one_token(bits: u32, shape: [usize; 2]) -> [f64; 3] {
    let matrices = uncached(bits, 128, shape);
    let (first, copies) = (&matrices[0], matrices.len());
    let (mut x, mut out) = (Inputs::new(first, 1), vec![0.0; shape[0]]);
    let full = Inputs::new(first, 1);
    let mut again = out.clone();
    let words = |bytes: &[u8]| bytes.as_chunks().0.iter().fold(0u64, |sum, &word| sum ^ u64::from_le_bytes(word));
    // Each thread reads one stretch, as it does of a matrix.
    let threads = rayon::current_num_threads();
    let mut read = vec![0; threads];
    let seconds = in_turns(&mut [
        &mut || {
            awake(|| {
                for matrix in &matrices {
                    x.round(matrix);
                    packed_product_int8(Level::best(), &matrix.packed(), &x.rounded(), &mut out);
                }
            });
        },
        &mut || {
            awake(|| {
                for matrix in &matrices {
                    packed_product(Level::best(), &matrix.packed(), &full.full, &mut again);
                }
            });
        },
        &mut || {
            awake(|| {
                for Matrix { codes, .. } in &matrices {
                    let part = codes.len().div_ceil(threads).next_multiple_of(8);
                    let own = |i: usize| words(&codes[(i * part).min(codes.len())..codes.len().min((i + 1) * part)]);
                    fill_chunks(&mut read, 1, usize::MAX, |i, read| read[0] = own(i));
                    black_box(&read);
                }
            });
        },
    ]);
    let share = first.bytes() / first.codes.len() as f64;
    [seconds[0], seconds[1], seconds[2] * share].map(|s| s / copies as f64)
}

/// What products of `tokens` tokens with codes of 4 bits take by every level, in groups of 32 and of 128, in turns with the peer:
/// names and seconds of ours and of the peer's. Inputs are rounded within the time.
fn beside(peer: &mut Peer, tokens: usize, shape: [usize; 2]) -> [Vec<(String, f64)>; 2] {
    let matrices = [32, 128].map(|group| match tokens {
        1 => (group, uncached(4, group, shape)),
        _ => (group, vec![Matrix::new(4, group, shape)]),
    });
    let levels = Level::all().into_iter().filter(|level| *level != Level::Scalar);
    let ways: Vec<(Level, &(usize, Vec<Matrix>))> =
        levels.flat_map(|level| matrices.each_ref().map(|matrices| (level, matrices))).collect();
    let work = format!("{tokens} {} {}", shape[0], shape[1]);
    let mut ours: Vec<Box<dyn FnMut()>> = Vec::new();
    for &(level, (_, matrices)) in &ways {
        let (mut x, mut out) = (Inputs::new(&matrices[0], tokens), vec![0.0; tokens * shape[0]]);
        ours.push(Box::new(move || {
            awake(|| {
                for matrix in matrices {
                    x.round(matrix);
                    packed_product_int8(level, &matrix.packed(), &x.rounded(), &mut out);
                }
            });
        }));
    }
    let mut theirs = || peer.run(&work);
    let mut all: Vec<&mut dyn FnMut()> = ours.iter_mut().map(|f| &mut **f as &mut dyn FnMut()).collect();
    all.push(&mut theirs);
    let seconds = in_turns(&mut all);
    let name = |level: Level| format!("{level:?}").split('(').next().unwrap_or_default().to_lowercase();
    let named = |(&(level, (group, matrices)), seconds): (&(Level, &(usize, Vec<Matrix>)), f64)| {
        (format!("{}/g{group}", name(level)), seconds / matrices.len() as f64)
    };
    [ways.iter().zip(seconds).map(named).collect(), peer.medians()]
}

fn alone() {
    let threads = rayon::current_num_threads();
    let (a, mut c) = (vec![0.5f32; 1024 * 1024], vec![0.0f32; 1024 * 1024]);
    let view = View::new(&a, 1024, 1024, 1024);
    let peak = time(|| gemm(1.0, view, view, 0.0, &mut ViewMut::new(&mut c, 1024, 1024, 1024)));
    let macs = 1024f64.powi(3) / peak / 1e9 * threads as f64;
    println!("{:?}, {threads} threads; limit: f32 product {macs:.0} GMAC/s", Level::best());

    WIDTHS.iter().for_each(|&bits| check(&Matrix::new(bits, 128, [512, 512]), 5));
    println!("\none token              bits    MB   reading     int8 activations           f32 activations");
    for shape in SHAPES {
        for bits in WIDTHS {
            let [int8, full, read] = one_token(bits, shape);
            let bytes = Matrix::new(bits, 128, shape).bytes();
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
            let matrix = Matrix::new(bits, 128, shape);
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

fn main() {
    let Some(mut peer) = Peer::of_arguments() else { return alone() };
    [32, 128].iter().for_each(|&group| check(&Matrix::new(4, group, [512, 512]), 5));
    println!(
        "codes of 4 bits, {} threads, µs, and how many times the fastest of the peer's takes longer",
        rayon::current_num_threads()
    );
    for tokens in [1, 512] {
        for shape in SHAPES {
            let [ours, theirs] = beside(&mut peer, tokens, shape);
            let fastest = theirs.iter().map(|(_, seconds)| *seconds).fold(f64::MAX, f64::min);
            let ours =
                ours.iter().map(|(name, seconds)| format!("{name} {:.0} ({:.2}x)", seconds * 1e6, fastest / seconds));
            let theirs = theirs.iter().map(|(name, seconds)| format!("{name} {:.0}", seconds * 1e6));
            let words: Vec<String> = ours.chain(theirs).collect();
            println!("{tokens:>3} x {:<14} {}", format!("[{}, {}]", shape[0], shape[1]), words.join("  "));
        }
    }
}
