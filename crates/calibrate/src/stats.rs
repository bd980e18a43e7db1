//! What calibration saw at a site: everything a layer-wise solver needs, and nothing that grows with the text.

use bitmill_kernels::{
    Level, MOMENT_ROWS, Moments, Panels, Short, add_moments, mirror, panels_square, panels_syrk, short_syrk, syrk,
};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::ops::{Deref, Range};

/// Streaming statistics of the activations `x: [tokens, n]` that feed one site's linears.
#[derive(Debug, Clone, PartialEq)]
pub struct SiteStats {
    n: usize,
    short: Option<Short>,
    tokens: u64,
    /// Σ r, the weights of the tokens.
    weight: f64,
    /// Σ r·x·xᵀ, row-major `[n, n]`, on and below the diagonal.
    gram: Vec<f32>,
    /// Σ r·x.
    weighted_sum: Vec<f64>,
    sum: Vec<f64>,
    abs_sum: Vec<f64>,
    /// Σ x⁴.
    fourth_sum: Vec<f64>,
    abs_max: Vec<f32>,
}

/// Activations of some tokens, and what their columns add up to: that is found where they are made, while a cache still holds
/// them.
#[derive(Debug, Default)]
pub struct Tokens {
    n: usize,
    count: usize,
    /// As they are, where they are kept so.
    values: Vec<f32>,
    /// Their transpose, rounded for H, where they are kept so.
    panels: Option<Panels>,
    /// Their part of H, on and below the diagonal, where that is all that is kept.
    square: Option<Vec<f32>>,
    pieces: Vec<Piece>,
}

/// Sums over the columns of up to [`PIECE`] tokens.
#[derive(Debug, Clone)]
struct Piece {
    sum: Vec<f64>,
    abs_sum: Vec<f64>,
    fourth_sum: Vec<f64>,
    abs_max: Vec<f32>,
}

impl Piece {
    fn zeros(n: usize) -> Self {
        let zeros = || vec![0.0; n];
        Piece { sum: zeros(), abs_sum: zeros(), fourth_sum: zeros(), abs_max: vec![0.0; n] }
    }

    /// Adds some `columns` of tokens, `x [tokens, columns]`.
    fn add(&mut self, columns: Range<usize>, x: &[f32]) {
        let (sum, abs_sum) = (&mut self.sum[columns.clone()], &mut self.abs_sum[columns.clone()]);
        let (fourth_sum, abs_max) = (&mut self.fourth_sum[columns.clone()], &mut self.abs_max[columns.clone()]);
        add_moments(Level::best(), x, columns.len(), &mut Moments { sum, abs_sum, fourth_sum, abs_max });
    }
}

impl Tokens {
    /// The tokens `values`, row-major `[tokens, n]`.
    #[must_use]
    pub fn new(values: Vec<f32>, n: usize) -> Self {
        Tokens { n, count: values.len() / n, pieces: Tokens::pieces(&values, n), values, ..Tokens::default() }
    }

    /// So many `tokens` of width `n`, which [`Tokens::push`] brings. With `panels`, they are rounded there, for H and for what
    /// columns add up to, and are of use for nothing else.
    #[must_use]
    pub fn to_come(tokens: usize, n: usize, mut panels: Option<Panels>) -> Self {
        match &mut panels {
            Some(panels) => panels.reshape([n, tokens]),
            None => return Tokens { n, values: Vec::with_capacity(tokens * n), ..Tokens::default() },
        }
        Tokens { n, panels, ..Tokens::default() }
    }

    /// Adds the next tokens, `x [some, n]`.
    ///
    /// # Panics
    /// Where there are more than were to come, or where tokens are rounded and other than the last come in numbers that are no
    /// multiples of [`APART`](bitmill_kernels::APART): a caller's bug.
    pub fn push(&mut self, x: &[f32]) {
        self.pieces.extend(Tokens::pieces(x, self.n));
        match &mut self.panels {
            Some(panels) => panels.put(self.count, &x.chunks_exact(self.n).collect::<Vec<_>>()),
            None => self.values.extend_from_slice(x),
        }
        self.count += x.len() / self.n;
    }

    /// Makes room for so many of rounded tokens to come by columns, which [`Tokens::push_columns`] brings.
    ///
    /// # Panics
    /// Where they are not rounded: a caller's bug.
    pub fn await_columns(&mut self, tokens: usize) {
        assert!(self.panels.is_some(), "tokens that are rounded");
        self.pieces.extend((0..tokens).step_by(PIECE).map(|_| Piece::zeros(self.n)));
        self.count += tokens;
    }

    /// Some `columns`, the first of 16, of the tokens that were [awaited](Tokens::await_columns) last: `x [tokens, columns]`.
    ///
    /// # Panics
    /// As [`Tokens::push`], and where there are no such columns.
    pub fn push_columns(&mut self, columns: Range<usize>, x: &[f32]) {
        let width = columns.len();
        let tokens: Vec<&[f32]> = x.chunks_exact(width).collect();
        let last = self.pieces.len() - tokens.len().div_ceil(PIECE);
        for (piece, x) in self.pieces[last..].iter_mut().zip(x.chunks(PIECE * width)) {
            piece.add(columns.clone(), x);
        }
        if let Some(panels) = &mut self.panels {
            panels.put_some(columns.start, self.count - tokens.len(), &tokens);
        }
    }

    /// Multiplies rounded tokens for H as soon as all have come, in `memory` that holds anything, as long as a cache holds them: they
    /// need not be kept for it, and what they were rounded in is returned.
    ///
    /// # Panics
    /// Where they are not rounded, or some are still to come: a caller's bug.
    #[must_use]
    pub fn multiply(&mut self, mut memory: Vec<f32>) -> Panels {
        assert!(self.are_complete(), "all tokens that were to come");
        let Some(panels) = self.panels.take() else { panic!("tokens that are rounded") };
        memory.resize(self.n * self.n, 0.0);
        panels_square(&panels, &mut memory);
        self.square = Some(memory);
        panels
    }

    /// What they are rounded in, and what they are multiplied in.
    pub(crate) fn into_memory(self) -> (Option<Panels>, Option<Vec<f32>>) {
        (self.panels, self.square)
    }

    /// Whether it is as well to round so many tokens by themselves: whole groups of those that share a scale, or whose products are
    /// added up before H takes them, and so few columns that H need not be gone through for as many tokens as can be at a time.
    #[must_use]
    pub fn can_be_rounded(tokens: usize, n: usize) -> bool {
        tokens.is_multiple_of(256) && n <= 2048
    }

    /// Whether it is as well to multiply so many tokens by themselves: their part of H is no larger than they are.
    #[must_use]
    pub fn can_be_multiplied(tokens: usize, n: usize) -> bool {
        n <= tokens && n <= FEW_COLUMNS
    }

    /// Entries of a token.
    #[must_use]
    pub fn width(&self) -> usize {
        self.n
    }

    /// Whether they are kept rounded, or multiplied, and not as they are.
    #[must_use]
    pub fn are_rounded(&self) -> bool {
        self.panels.is_some() || self.square.is_some()
    }

    fn are_complete(&self) -> bool {
        self.panels.as_ref().is_none_or(|panels| panels.shape()[1] == self.count)
    }

    fn pieces(values: &[f32], n: usize) -> Vec<Piece> {
        let piece = |x: &[f32]| {
            let mut piece = Piece::zeros(n);
            piece.add(0..n, x);
            piece
        };
        values.par_chunks(PIECE * n).map(piece).collect()
    }
}

/// The values, none where they are rounded.
impl Deref for Tokens {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.values
    }
}

/// Columns up to which the tokens of a window and their part of H are in the second cache of a core together.
const FEW_COLUMNS: usize = 512;
/// Tokens whose columns one task adds up: as many whoever does it, so that sums are the same bits at any thread count.
const PIECE: usize = 256;

/// Adds the columns of `parts`, rows as long as `sums` whose weights are 1 where there are none; folded as [`add_moments`] does.
pub(crate) fn add_columns(sums: &mut [f64], parts: &[(&[f32], Option<&[f32]>)]) {
    let n = sums.len();
    let pieces = parts.iter().flat_map(|&(x, r)| {
        let weights = move |i: usize| r.map(|r| &r[i * PIECE..]);
        x.chunks(PIECE * n).enumerate().map(move |(i, x)| (x, weights(i)))
    });
    let of = |(x, r): (&[f32], Option<&[f32]>)| {
        let (mut sums, mut some) = (vec![0.0f64; n], vec![0.0f32; n]);
        for (i, rows) in x.chunks(MOMENT_ROWS * n).enumerate() {
            some.fill(0.0);
            for (t, row) in rows.chunks_exact(n).enumerate() {
                let r = r.map_or(1.0, |r| r[i * MOMENT_ROWS + t]);
                some.iter_mut().zip(row).for_each(|(s, &v)| *s += r * v);
            }
            sums.iter_mut().zip(&some).for_each(|(sum, &some)| *sum += f64::from(some));
        }
        sums
    };
    for part in pieces.collect::<Vec<_>>().into_par_iter().map(of).collect::<Vec<_>>() {
        sums.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
    }
}

fn add(all: &mut [f64], sums: &[f64]) {
    all.iter_mut().zip(sums).for_each(|(all, sum)| *all += sum);
}

impl SiteStats {
    /// Statistics of no tokens for inputs of width `n`.
    #[must_use]
    pub fn new(n: usize) -> Self {
        SiteStats {
            n,
            short: None,
            tokens: 0,
            weight: 0.0,
            gram: vec![0.0; n * n],
            weighted_sum: vec![0.0; n],
            sum: vec![0.0; n],
            abs_sum: vec![0.0; n],
            fourth_sum: vec![0.0; n],
            abs_max: vec![0.0; n],
        }
    }

    /// The same, with activations rounded where H is concerned, or as they are with `None`.
    #[must_use]
    pub fn by(self, short: Option<Short>) -> Self {
        SiteStats { short, ..self }
    }

    /// Adds activations `x`, row-major `[tokens, n]`. Sums are folded in the order of the calls and, within one, of the
    /// tokens.
    pub fn add(&mut self, x: &[f32]) {
        self.add_parts(&[&Tokens::new(x.to_vec(), self.n)]);
    }

    /// The same of activations that come in several parts.
    ///
    /// # Panics
    /// Where some that were to come did not: a caller's bug.
    pub fn add_parts(&mut self, parts: &[&Tokens]) {
        self.weight += parts.iter().map(|x| x.count).sum::<usize>() as f64;
        let (rounded, whole): (Vec<&Tokens>, Vec<_>) = parts.iter().partition(|x| x.are_rounded());
        assert!(parts.iter().all(|x| x.are_complete()), "all tokens that were to come");
        panels_syrk(&rounded.iter().filter_map(|x| x.panels.as_ref()).collect::<Vec<_>>(), &mut self.gram);
        self.add_squares(&rounded.iter().filter_map(|x| x.square.as_deref()).collect::<Vec<_>>());
        self.add_products(&whole.iter().map(|x| &x[..]).collect::<Vec<_>>());
        // As long as no token was weighted, both sums are of the same terms.
        let alike = self.weighted_sum == self.sum;
        self.add_moments(parts);
        if alike {
            self.weighted_sum.copy_from_slice(&self.sum);
        } else {
            parts.iter().flat_map(|part| &part.pieces).for_each(|piece| add(&mut self.weighted_sum, &piece.sum));
        }
    }

    /// Adds activations, each part with `weights: [tokens]`: how many times its tokens count in H (the token importance of
    /// RSQ); a weight of 0 leaves a token out. Means and maxima stay unweighted.
    ///
    /// # Panics
    /// Where they are rounded: a caller's bug.
    pub fn add_weighted(&mut self, parts: &[(&Tokens, &[f32])]) {
        assert!(parts.iter().all(|(x, _)| !x.are_rounded()), "tokens as they are");
        self.add_gram(&parts.iter().map(|&(x, r)| (&x[..], r)).collect::<Vec<_>>());
        self.add_moments(&parts.iter().map(|&(x, _)| x).collect::<Vec<_>>());
    }

    /// Adds tokens to H alone, as [`SiteStats::add_weighted`] does: those of another stream, say.
    pub fn add_gram(&mut self, parts: &[(&[f32], &[f32])]) {
        let n = self.n;
        let root = |&(x, r): &(&[f32], &[f32])| -> Vec<f32> {
            x.chunks_exact(n).zip(r).flat_map(|(row, r)| row.iter().map(move |v| v * r.sqrt())).collect()
        };
        let scaled: Vec<Vec<f32>> = parts.par_iter().map(root).collect();
        self.weight += parts.iter().flat_map(|(_, r)| *r).map(|&r| f64::from(r)).sum::<f64>();
        self.add_products(&scaled.iter().map(|x| &x[..]).collect::<Vec<_>>());
        add_columns(&mut self.weighted_sum, &parts.iter().map(|&(x, r)| (x, Some(r))).collect::<Vec<_>>());
    }

    /// Adds parts of H, row by row: it is gone through once.
    fn add_squares(&mut self, squares: &[&[f32]]) {
        let n = self.n;
        for (i, row) in self.gram.chunks_exact_mut(n).enumerate() {
            for square in squares {
                let own = &square[i * n..=i * n + i];
                row.iter_mut().zip(own).for_each(|(sum, own)| *sum += own);
            }
        }
    }

    fn add_products(&mut self, parts: &[&[f32]]) {
        match self.short {
            Some(short) => short_syrk(short, parts, self.n, &mut self.gram),
            None => syrk(parts, self.n, &mut self.gram),
        }
    }

    fn add_moments(&mut self, parts: &[&Tokens]) {
        self.tokens += parts.iter().map(|x| x.count).sum::<usize>() as u64;
        for piece in parts.iter().flat_map(|part| &part.pieces) {
            add(&mut self.sum, &piece.sum);
            add(&mut self.abs_sum, &piece.abs_sum);
            add(&mut self.fourth_sum, &piece.fourth_sum);
            self.abs_max.iter_mut().zip(&piece.abs_max).for_each(|(all, &most)| *all = all.max(most));
        }
    }

    /// Width of the input.
    #[must_use]
    pub fn width(&self) -> usize {
        self.n
    }

    /// Tokens seen.
    #[must_use]
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Σ r, the weights of all tokens that H is of, counted as seen or not.
    #[must_use]
    pub fn weight(&self) -> f64 {
        self.weight
    }

    /// H = E[x·xᵀ], weighted where tokens were, row-major `[n, n]`.
    #[must_use]
    pub fn hessian(&self) -> Vec<f32> {
        self.clone().into_hessian()
    }

    /// The same in the memory of the sums.
    #[must_use]
    pub fn into_hessian(mut self) -> Vec<f32> {
        let scale = self.scale();
        self.gram.par_iter_mut().for_each(|v| *v *= scale);
        mirror(&mut self.gram, self.n);
        self.gram
    }

    fn scale(&self) -> f32 {
        if self.weight > 0.0 { (1.0 / self.weight) as f32 } else { 0.0 }
    }

    /// E[x], per input, weighted as H is: H minus its outer product is the second moment about it.
    #[must_use]
    pub fn centre(&self) -> Vec<f32> {
        let scale = if self.weight > 0.0 { 1.0 / self.weight } else { 0.0 };
        self.weighted_sum.iter().map(|s| (s * scale) as f32).collect()
    }

    /// E[x], per input.
    #[must_use]
    pub fn mean(&self) -> Vec<f32> {
        self.sum.iter().map(|s| (s / self.tokens.max(1) as f64) as f32).collect()
    }

    /// E|x|, per input.
    #[must_use]
    pub fn mean_abs(&self) -> Vec<f32> {
        self.abs_sum.iter().map(|s| (s / self.tokens.max(1) as f64) as f32).collect()
    }

    /// E[x⁴], per input.
    #[must_use]
    pub fn fourth(&self) -> Vec<f32> {
        self.fourth_sum.iter().map(|s| (s / self.tokens.max(1) as f64) as f32).collect()
    }

    /// max |x|, per input.
    #[must_use]
    pub fn abs_max(&self) -> &[f32] {
        &self.abs_max
    }

    /// The shape of the distribution: what makes an activation hard to round.
    #[must_use]
    pub fn spread(&self) -> Spread {
        Spread::of_parts(&[self])
    }

    /// Whether every number is finite.
    #[must_use]
    pub fn is_finite(&self) -> bool {
        self.sum.iter().all(|s| s.is_finite()) && (0..self.n).all(|i| self.gram[i * self.n + i].is_finite())
    }
}

/// How far an activation is from evenly spread numbers.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// E[x⁴]/E[x²]² over all inputs: 3 for normal numbers, more where few are large. `None` where fourth moments are
    /// not known.
    pub kurtosis: Option<f64>,
    /// Largest magnitude over the root mean square.
    pub peak: f64,
    /// Root mean square of the largest input over that of the median one.
    pub outlier: f64,
}

impl Spread {
    /// That of everything that `parts` have seen, which are of one width.
    ///
    /// # Panics
    /// Where there is none: a caller's bug.
    #[must_use]
    pub fn of_parts(parts: &[&SiteStats]) -> Self {
        let (n, sum) = (parts[0].n, |of: &dyn Fn(&SiteStats) -> f64| parts.iter().map(|s| of(s)).sum::<f64>());
        let (weight, tokens) = (sum(&|s| s.weight), sum(&|s| s.tokens as f64));
        let scale = if weight > 0.0 { 1.0 / weight } else { 0.0 };
        let square: Vec<f64> = (0..n).map(|i| sum(&|s| f64::from(s.gram[i * n + i])) * scale).collect();
        let fourth: Vec<f32> = (0..n).map(|i| (sum(&|s| s.fourth_sum[i]) / tokens.max(1.0)) as f32).collect();
        let most = |i: usize| parts.iter().fold(0.0f32, |most, s| most.max(s.abs_max[i]));
        Spread::of(&square, Some(&fourth), &(0..n).map(most).collect::<Vec<_>>())
    }

    /// From E[x²], E[x⁴] and max |x|, each per input.
    #[must_use]
    pub fn of(square: &[f64], fourth: Option<&[f32]>, abs_max: &[f32]) -> Self {
        let n = square.len().max(1) as f64;
        let mean = square.iter().sum::<f64>() / n;
        let mut sorted = square.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (median, largest) =
            (sorted.get(sorted.len() / 2).copied().unwrap_or(0.0), sorted.last().copied().unwrap_or(0.0));
        let ratio = |a: f64, b: f64| if b > 0.0 { a / b } else { 0.0 };
        let peak = abs_max.iter().fold(0.0f32, |a, &v| a.max(v));
        let fourth = fourth.map(|f| f.iter().map(|&v| f64::from(v)).sum::<f64>() / n);
        Spread {
            kurtosis: fourth.map(|f| ratio(f, mean * mean)),
            peak: ratio(f64::from(peak), mean.sqrt()),
            outlier: ratio(largest, median).sqrt(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::splitmix;

    #[test]
    fn h_is_the_same_bits_however_tokens_are_parted() {
        let (tokens, n) = (2500, 12);
        let x: Vec<f32> = (0..tokens * n).map(|i| ((i * 7919 % 1013) as f32 - 500.0) / 400.0).collect();
        let (mut whole, mut parted) = (SiteStats::new(n), SiteStats::new(n));
        whole.add(&x);
        let parts: Vec<Tokens> = x.chunks(37 * n).map(|part| Tokens::new(part.to_vec(), n)).collect();
        parted.add_parts(&parts.iter().collect::<Vec<_>>());
        assert_eq!(whole.hessian(), parted.hessian());
        assert_eq!((whole.tokens(), whole.abs_max()), (parted.tokens(), parted.abs_max()));
    }

    #[test]
    fn tokens_that_are_rounded_before_have_the_same_statistics() {
        let (tokens, n) = (1024, 70);
        let x: Vec<f32> = (0..tokens * n).map(|i| ((i * 7919 % 1013) as f32 - 500.0) / 400.0).collect();
        for short in Short::all() {
            let mut whole = SiteStats::new(n).by(Some(short));
            whole.add(&x);
            let mut rounded_tokens = |x: &[f32]| {
                let mut tokens = Tokens::to_come(x.len() / n, n, Some(Panels::empty(short)));
                x.chunks(128 * n).for_each(|x| tokens.push(x));
                tokens
            };
            let parts: Vec<Tokens> = x.chunks(256 * n).map(&mut rounded_tokens).collect();
            let by_columns = |x: &[f32]| {
                let mut tokens = Tokens::to_come(x.len() / n, n, Some(Panels::empty(short)));
                for x in x.chunks(128 * n) {
                    tokens.await_columns(128);
                    for columns in [0..32, 32..64, 64..n] {
                        let strip = x.chunks(n).flat_map(|row| row[columns.clone()].to_vec());
                        tokens.push_columns(columns.clone(), &strip.collect::<Vec<_>>());
                    }
                }
                tokens
            };
            let strips: Vec<Tokens> = x.chunks(256 * n).map(by_columns).collect();
            let mut squares: Vec<Tokens> = x.chunks(256 * n).map(&mut rounded_tokens).collect();
            squares.iter_mut().for_each(|part| assert_eq!(part.multiply(vec![f32::NAN; 7]).shape(), [n, 256]));
            for parts in [parts, strips, squares] {
                let mut rounded = SiteStats::new(n).by(Some(short));
                rounded.add_parts(&parts.iter().collect::<Vec<_>>());
                assert_eq!((whole.mean(), whole.fourth()), (rounded.mean(), rounded.fourth()));
                assert_eq!((whole.tokens(), whole.weight()), (rounded.tokens(), rounded.weight()));
                assert!(whole.hessian().iter().zip(rounded.hessian()).all(|(a, b)| (a - b).abs() < 1e-5));
            }
        }
    }

    #[test]
    fn a_weight_of_k_is_the_token_k_times() {
        // Oracle 1: weights of 1 change nothing. Oracle 13: weight k equals k copies, weight 0 none.
        let (tokens, n) = (40, 24);
        let x: Vec<f32> = (0..tokens * n).map(|i| ((i * 7919 % 1013) as f32 - 500.0) / 400.0).collect();
        let (mut plain, mut ones, mut weighted, mut copied) =
            (SiteStats::new(n), SiteStats::new(n), SiteStats::new(n), SiteStats::new(n));
        plain.add(&x);
        let all = Tokens::new(x.clone(), n);
        ones.add_weighted(&[(&all, &vec![1.0; tokens])]);
        assert_eq!(plain, ones);
        let weights: Vec<f32> = (0..tokens).map(|t| (t % 4) as f32).collect();
        weighted.add_weighted(&[(&all, &weights)]);
        for (row, &w) in x.chunks(n).zip(&weights) {
            (0..w as usize).for_each(|_| copied.add(row));
        }
        assert!(weighted.hessian().iter().zip(copied.hessian()).all(|(a, b)| (a - b).abs() < 1e-5));
        assert!(weighted.centre().iter().zip(copied.mean()).all(|(a, b)| (a - b).abs() < 1e-5));
    }

    #[test]
    fn spread_knows_normal_numbers_and_outliers() {
        let (tokens, n) = (4000, 16);
        // Sums of twelve uniform numbers are nearly normal, with kurtosis 2.9.
        let unit = |i: usize| (splitmix(i as u64) >> 11) as f32 / (1u64 << 53) as f32;
        let normal = |i: usize| (0..12).map(|k| unit(12 * i + k)).sum::<f32>() - 6.0;
        let mut x: Vec<f32> = (0..tokens * n).map(normal).collect();
        let spread = |x: &[f32]| {
            let mut s = SiteStats::new(n);
            s.add(x);
            s.spread()
        };
        let even = spread(&x);
        assert!((even.kurtosis.unwrap() - 2.9).abs() < 0.05 && even.outlier < 1.1 && even.peak < 6.0, "{even:?}");
        x.iter_mut().step_by(n).for_each(|v| *v *= 20.0);
        let loud = spread(&x);
        assert!((loud.outlier / 20.0 - 1.0).abs() < 0.1 && loud.kurtosis.unwrap() > 30.0, "{loud:?}");
    }

    #[test]
    fn streaming_equals_one_pass_by_definition() {
        let (tokens, n) = (150, 70);
        let x: Vec<f32> = (0..tokens * n).map(|i| ((i * 7919 % 1013) as f32 - 500.0) / 400.0).collect();
        let column = |j: usize| x.iter().skip(j).step_by(n).map(|&v| f64::from(v));
        for batch in [1, 13, 150] {
            let mut s = SiteStats::new(n);
            x.chunks(batch * n).for_each(|part| s.add(part));
            assert_eq!((s.tokens(), s.width()), (150, n));
            let (h, mean, mean_abs) = (s.hessian(), s.mean(), s.mean_abs());
            for i in 0..n {
                assert!((f64::from(mean[i]) - column(i).sum::<f64>() / 150.0).abs() < 1e-6);
                assert!((f64::from(mean_abs[i]) - column(i).map(f64::abs).sum::<f64>() / 150.0).abs() < 1e-6);
                assert_eq!(f64::from(s.abs_max()[i]), column(i).map(f64::abs).fold(0.0, f64::max));
                for j in 0..n {
                    let dot = column(i).zip(column(j)).map(|(a, b)| a * b).sum::<f64>() / 150.0;
                    assert!((f64::from(h[i * n + j]) - dot).abs() < 1e-5);
                }
            }
        }
    }
}
