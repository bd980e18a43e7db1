//! Dense products on strided slices: C ← βC + αA·B, and H ← H + XᵀX.
//!
//! Single tiles go to the `gemm` crate, which picks AVX-512, AVX2 or NEON at run time. Parallelism is ours: the output
//! is cut into tiles of a fixed size, each computed by one thread in one order, so results are the same bits at any
//! thread count.

use half::bf16;
use rayon::prelude::*;
use std::borrow::Cow;
use std::mem::MaybeUninit;
use std::ops::{AddAssign, Range};

/// A number the products are compiled for.
pub trait Element: Copy + PartialEq + Send + Sync + 'static {
    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
}

impl Element for f32 {
    const ZERO: f32 = 0.0;
    const ONE: f32 = 1.0;
}

impl Element for bf16 {
    const ZERO: bf16 = bf16::ZERO;
    const ONE: bf16 = bf16::ONE;
}

impl Element for f64 {
    const ZERO: f64 = 0.0;
    const ONE: f64 = 1.0;
}

/// Tokens multiplied at a time: 1024 of width 1024 are 4 MB.
pub(super) const TOKENS: usize = 1024;

/// Columns up to which each portion of the tokens has sums of its own: bands of so few rows, shared among threads a portion at a
/// time, wait for one another longer than these sums take to be added up (320 columns, AVX2: 40 and 58 GMAC/s).
const NARROW: usize = 512;
/// Portions that have sums of their own at a time: at most 16 MB in f32, no matter how many threads there are.
const AT_ONCE: usize = 16;

/// Rows of H that are computed at a time: enough for the product to run near its peak, few enough to share among threads.
/// It depends on the shape alone, so the sums are folded the same way at any thread count.
fn band(n: usize) -> usize {
    (n / 16).next_multiple_of(16).clamp(64, 512)
}

/// A borrowed matrix `[rows, cols]`; entry (i, j) lies at `i·row_stride + j·col_stride`.
#[derive(Debug, Clone, Copy)]
pub struct View<'a, T> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a, T: Element> View<'a, T> {
    /// A row-major matrix whose rows start `stride` entries apart.
    ///
    /// # Panics
    /// When `data` is too short for the shape: a caller's bug.
    #[must_use]
    pub fn new(data: &'a [T], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(cols <= stride && (rows == 0 || (rows - 1) * stride + cols <= data.len()), "view beyond its slice");
        View { data, rows, cols, row_stride: stride, col_stride: 1 }
    }

    /// The transpose of this view.
    #[must_use]
    pub fn t(self) -> Self {
        View { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }

    /// Number of rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Whether the entries of a row lie in one piece.
    pub(super) fn has_whole_rows(&self) -> bool {
        self.col_stride == 1
    }

    /// The entries of row `i`, where they lie in one piece.
    pub(super) fn row(&self, i: usize) -> &'a [T] {
        assert!(self.col_stride == 1 && i < self.rows, "a row in one piece");
        &self.data[i * self.row_stride..][..self.cols]
    }

    /// The entries of column `j`, where they lie in one piece.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn column(&self, j: usize) -> &'a [T] {
        assert!(self.row_stride == 1 && j < self.cols, "a column in one piece");
        &self.data[j * self.col_stride..][..self.rows]
    }

    /// The rows `which`.
    ///
    /// # Panics
    /// Where the matrix has no such rows: a caller's bug.
    #[must_use]
    pub fn some_rows(self, which: Range<usize>) -> Self {
        assert!(which.start <= which.end && which.end <= self.rows, "rows of the matrix");
        let from = (which.start * self.row_stride).min(self.data.len());
        View { data: &self.data[from..], rows: which.len(), ..self }
    }

    /// Columns `from..to`.
    fn columns(self, from: usize, to: usize) -> Self {
        View { data: &self.data[(from * self.col_stride).min(self.data.len())..], cols: to - from, ..self }
    }
}

/// A mutable row-major matrix `[rows, cols]` whose rows start `stride` entries apart.
#[derive(Debug)]
pub struct ViewMut<'a, T> {
    data: &'a mut [T],
    rows: usize,
    cols: usize,
    stride: usize,
}

/// What a product may go to, be it memory that holds nothing yet.
pub(super) type Output<'a> = ViewMut<'a, MaybeUninit<f32>>;

impl ViewMut<'_, f32> {
    /// The same to be written to, by who puts nothing there but numbers.
    pub(super) fn output(&mut self) -> Output<'_> {
        let ViewMut { rows, cols, stride, .. } = *self;
        // SAFETY: the type is laid out as the number in it, and none but the products of this crate see it, which store numbers.
        let data = unsafe { std::slice::from_raw_parts_mut(self.data.as_mut_ptr().cast(), self.data.len()) };
        ViewMut { data, rows, cols, stride }
    }
}

impl<'a, T: Copy> ViewMut<'a, T> {
    /// A view of `data`.
    ///
    /// # Panics
    /// When `data` is too short for the shape: a caller's bug.
    #[must_use]
    pub fn new(data: &'a mut [T], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(cols <= stride && (rows == 0 || (rows - 1) * stride + cols <= data.len()), "view beyond its slice");
        ViewMut { data, rows, cols, stride }
    }

    /// Rows and columns.
    pub(super) fn shape(&self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    /// Makes every entry `value`.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn fill(&mut self, value: T) {
        let cols = self.cols;
        self.data.chunks_mut(self.stride.max(1)).take(self.rows).for_each(|row| row[..cols].fill(value));
    }

    /// Up to `count` entries of row `i` from column `j` on; `None` outside of the matrix.
    pub(super) fn part(&mut self, i: usize, j: usize, count: usize) -> Option<&mut [T]> {
        let inside = i < self.rows && j < self.cols;
        inside.then(|| &mut self.data[i * self.stride + j..][..count.min(self.cols - j)])
    }

    /// The entries from row `i` and column `j` on, and how far apart rows of them lie, where a whole tile of `rows` by `cols`
    /// begins there.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn whole(&mut self, (i, j): (usize, usize), (rows, cols): (usize, usize)) -> Option<(&mut [T], usize)> {
        let inside = rows > 0 && i + rows <= self.rows && j + cols <= self.cols;
        let count = (rows.max(1) - 1) * self.stride + cols;
        inside.then(|| (&mut self.data[i * self.stride + j..][..count], self.stride))
    }
}

/// `c ← beta·c + alpha·a·b` for `a: [m, k]`, `b: [k, n]`, `c: [m, n]`, on the calling thread. With `beta` zero the old
/// contents of `c` are not read.
///
/// # Panics
/// When the shapes do not chain: a caller's bug.
pub fn gemm<T: Element>(alpha: T, a: View<'_, T>, b: View<'_, T>, beta: T, c: &mut ViewMut<'_, T>) {
    assert!(a.cols == b.rows && a.rows == c.rows && b.cols == c.cols, "matrix shapes");
    if c.rows == 0 || c.cols == 0 {
        return;
    }
    // SAFETY: the views checked when they were made that every entry (i, j) inside their shape lies in their slice, the
    // shapes chain as asserted above, and `c` is borrowed mutably, so it overlaps neither `a` nor `b`.
    unsafe {
        ::gemm::gemm(
            c.rows,
            c.cols,
            a.cols,
            c.data.as_mut_ptr(),
            1,
            c.stride as isize,
            beta != T::ZERO,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            beta,
            alpha,
            false,
            false,
            false,
            ::gemm::Parallelism::None,
        );
    }
}

/// `h ← h + xᵀ·x` for `x: [tokens, n]`, which comes in parts that may lie anywhere, and a row-major `h: [n, n]`, in parallel. Only
/// tiles on and below the diagonal are multiplied, so what lies above it counts for nothing until [`mirror`] makes it equal to
/// what lies below, once all is added. Results do not depend on how tokens are parted.
///
/// # Panics
/// When the lengths do not fit `n`: a caller's bug.
pub fn syrk<T: Element + AddAssign>(x: &[&[T]], n: usize, h: &mut [T]) {
    assert!(n > 0 && x.iter().all(|part| part.len().is_multiple_of(n)) && h.len() == n * n, "syrk shapes");
    let band = band(n);
    let portions = portions(x, TOKENS * n);
    if n > NARROW {
        // A band of rows of H is one task. All of them read a portion of the tokens while it is in a cache.
        for parts in &portions {
            let x = joined(parts);
            h.par_chunks_mut(band * n).enumerate().for_each(|(i, rows)| add_rows(&x, n, i * band, rows));
        }
        return;
    }
    // A portion of the tokens is one task, whose bands are short, and has sums of its own.
    for portions in portions.chunks(AT_ONCE) {
        let square = |parts: &Vec<&[T]>| {
            let (x, mut sums) = (joined(parts), vec![T::ZERO; n * n]);
            sums.chunks_mut(band * n).enumerate().for_each(|(i, rows)| add_rows(&x, n, i * band, rows));
            sums
        };
        let squares: Vec<Vec<T>> = portions.par_iter().map(square).collect();
        h.par_chunks_mut(band * n).enumerate().for_each(|(i, rows)| {
            for square in &squares {
                rows.iter_mut().zip(&square[i * band * n..]).for_each(|(sum, &own)| *sum += own);
            }
        });
    }
}

/// Adds to the `rows` of H from row `from` on, as far as they lie below the end of its diagonal, what tokens `x: [tokens, n]` add.
fn add_rows<T: Element>(x: &[T], n: usize, from: usize, rows: &mut [T]) {
    let (x, height) = (View::new(x, x.len() / n, n, n), rows.len() / n);
    let to = from + height;
    gemm(T::ONE, x.columns(from, to).t(), x.columns(0, to), T::ONE, &mut ViewMut::new(rows, height, to, n));
}

/// Cuts what comes in parts into portions of `count` entries but for the last, each of which may come in parts, too.
fn portions<'a, T>(x: &[&'a [T]], count: usize) -> Vec<Vec<&'a [T]>> {
    let (mut portions, mut room) = (Vec::new(), 0);
    for &part in x {
        let mut left = part;
        while !left.is_empty() {
            if room == 0 {
                portions.push(Vec::new());
                room = count;
            }
            let (some, rest) = left.split_at(left.len().min(room));
            if let Some(portion) = portions.last_mut() {
                portion.push(some);
            }
            (left, room) = (rest, room - some.len());
        }
    }
    portions
}

/// What comes in parts as one, copied where there are several.
fn joined<'a, T: Copy>(parts: &[&'a [T]]) -> Cow<'a, [T]> {
    match parts {
        [one] => Cow::Borrowed(one),
        parts => Cow::Owned(parts.concat()),
    }
}

/// Makes `h: [n, n]` exactly symmetric by what lies below its diagonal, in parallel.
///
/// # Panics
/// When the lengths do not fit `n`: a caller's bug.
pub fn mirror<T: Element>(h: &mut [T], n: usize) {
    assert!(h.len() == n * n, "a square");
    reflect(h, n, 0, n);
}

/// [`mirror`] of rows and columns `from..to`, whose rows are `h`.
fn reflect<T: Element>(h: &mut [T], n: usize, from: usize, to: usize) {
    // By tiles, since a column of a large matrix has every entry in another line of the cache.
    const TILE: usize = 32;
    if to - from <= TILE {
        for i in 0..to - from {
            for j in 0..i {
                h[j * n + from + i] = h[i * n + from + j];
            }
        }
        return;
    }
    let middle = from + ((to - from) / 2).next_multiple_of(TILE);
    let (top, bottom) = h.split_at_mut((middle - from) * n);
    top.par_chunks_mut(TILE * n).enumerate().for_each(|(t, top)| {
        for col in (middle..to).step_by(TILE) {
            for (i, row) in top.chunks_exact_mut(n).enumerate() {
                for (j, v) in (col..).zip(&mut row[col..to.min(col + TILE)]) {
                    *v = bottom[(j - middle) * n + from + t * TILE + i];
                }
            }
        }
    });
    rayon::join(|| reflect(top, n, from, middle), || reflect(bottom, n, middle, to));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(n: usize, seed: u64) -> Vec<f64> {
        let mut s = seed.wrapping_mul(2).wrapping_add(1);
        (0..n)
            .map(|_| {
                s = s.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (s >> 33) as f64 / f64::from(1u32 << 30) - 1.0
            })
            .collect()
    }

    #[test]
    fn gemm_equals_its_definition() {
        for (m, k, n) in [(1, 1, 1), (3, 5, 2), (17, 33, 65), (1, 300, 7), (64, 1, 64), (5, 0, 4)] {
            let (a, b, c0) = (sample(m * k, 1), sample(k * n, 2), sample(m * n, 3));
            for (alpha, beta) in [(1.0, 0.0), (-1.0, 1.0), (0.5, 2.0)] {
                let mut c = c0.clone();
                gemm(alpha, View::new(&a, m, k, k), View::new(&b, k, n, n), beta, &mut ViewMut::new(&mut c, m, n, n));
                for i in 0..m {
                    for j in 0..n {
                        let dot: f64 = (0..k).map(|l| a[i * k + l] * b[l * n + j]).sum();
                        assert!((c[i * n + j] - (beta * c0[i * n + j] + alpha * dot)).abs() < 1e-12);
                    }
                }
            }
        }
    }

    #[test]
    fn syrk_equals_its_definition_over_any_batching() {
        // Oracle 1: streaming over any batching equals the one-shot product; syrk equals gemm.
        for (tokens, n) in [(311, 290), (311, NARROW + 78)] {
            let x = sample(tokens * n, 7);
            let mut whole = vec![0.0; n * n];
            let view = View::new(&x, tokens, n, n);
            gemm(1.0, view.t(), view, 0.0, &mut ViewMut::new(&mut whole, n, n, n));
            for batch in [1, 7, 64, 311] {
                let mut h = vec![0.0; n * n];
                for part in x.chunks(batch * n) {
                    syrk(&[part], n, &mut h);
                }
                mirror(&mut h, n);
                let worst = h.iter().zip(&whole).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
                assert!(worst < 1e-10, "batches of {batch}: {worst}");
                assert!((0..n).all(|i| (0..n).all(|j| h[i * n + j] == h[j * n + i])));
            }
        }
    }

    #[test]
    fn syrk_in_f32_follows_f64_and_ignores_the_thread_count_and_the_parts() {
        for (tokens, n) in [(2100, 300), (2100, NARROW + 60), ((AT_ONCE + 1) * TOKENS + 3, 20)] {
            let x = sample(tokens * n, 9);
            let x32: Vec<f32> = x.iter().map(|&v| v as f32).collect();
            let mut exact = vec![0.0f64; n * n];
            syrk(&[&x], n, &mut exact);
            mirror(&mut exact, n);
            let run = |threads, part: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let mut h = vec![0.0f32; n * n];
                pool.install(|| {
                    syrk(&x32.chunks(part * n).collect::<Vec<_>>(), n, &mut h);
                    mirror(&mut h, n);
                });
                h
            };
            let h = run(1, tokens);
            let scale = exact.iter().fold(0.0f64, |a, v| a.max(v.abs()));
            assert!(h.iter().zip(&exact).all(|(&a, &b)| (f64::from(a) - b).abs() < 1e-5 * scale));
            assert!([(2, tokens), (3, 512), (8, 77), (2, 1)].iter().all(|&(threads, part)| run(threads, part) == h));
        }
    }
}
