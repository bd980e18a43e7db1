//! Methods: rules that round the weights of a site onto a grid.
//!
//! To add one, write `methods/x.rs`, its `mod` line, and a row of [`METHODS`]: `--method x`, help and the conformance
//! tests below come with it.

mod billm;
pub(crate) mod blocks;
mod gptq;
mod hqq;
mod rtn;

pub(crate) use gptq::order;

use crate::{Error, SolverOptions, StageChange};
use bitmill_kernels::Stored;
use bitmill_scheme::{FloatGrid, Granularity, Grid, GridKind, GroupParams, IntGrid, Quantized, Scheme};
use rayon::prelude::*;
use std::ops::Range;

/// A linear to round: `y = x·Wᵀ`.
#[derive(Debug, Clone, Copy)]
pub struct Linear<'a> {
    /// Module name, for messages.
    pub name: &'a str,
    /// W, row-major `[out, in]`; finite.
    pub weight: &'a [f32],
    /// `[out, in]`.
    pub shape: [usize; 2],
    /// What it becomes; it fits the shape.
    pub scheme: Scheme,
    /// The largest magnitude over all linears that loaders hold as one matrix with it; its own where it is alone. What
    /// NVFP4 divides scales by follows from it, and the one scale of a matrix of floats.
    pub amax: Option<f32>,
    /// The largest magnitude of its input, where calibration has something to say of that; else 0.
    pub input: f32,
}

impl<'a> Linear<'a> {
    /// A linear that is alone and of whose input nothing is known: what it shares with others is its own, and no range of its input is
    /// stored.
    #[must_use]
    pub const fn new(name: &'a str, weight: &'a [f32], shape: [usize; 2], scheme: Scheme) -> Self {
        Linear { name, weight, shape, scheme, amax: None, input: 0.0 }
    }
}

/// What a method needs besides weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    /// Nothing: it runs from names and shapes alone, on any architecture.
    Nothing,
    /// H = E[x·xᵀ] of the linears' input.
    Hessian,
}

/// A rounded linear.
#[derive(Debug, Clone)]
pub struct Solved {
    /// Its codes and parameters.
    pub quantized: Quantized,
    /// Damping its Hessian needed, where one was factored.
    pub damping: Option<f32>,
    /// What single stages of the method brought, where it has any.
    pub stages: Vec<StageChange>,
}

/// Rounds rows of a linear, whose own weights are not read; errors cost as much as the last argument says of their columns, or
/// alike. Returns Σ h(w − ŵ)² and Σ h·w² besides, h being what they cost.
pub type ByRows = fn(&Linear<'_>, Stored<'_>, Option<&[f32]>) -> (Quantized, [f64; 2]);

/// A rounding method.
pub trait Method: Sync {
    /// The value of `--method`.
    fn name(&self) -> &'static str;
    /// One line of help.
    fn summary(&self) -> &'static str;
    /// Why the method cannot round onto `scheme`; `None` where it can.
    fn refuses(&self, _scheme: &Scheme) -> Option<&'static str> {
        None
    }
    /// What [`Method::solve`] must be given under `options`.
    fn needs(&self, options: &SolverOptions) -> Needs;
    /// How rows of a matrix under `scheme` are rounded, where each is rounded by itself and nothing need be known of its inputs.
    fn by_rows(&self, _scheme: &Scheme, _options: &SolverOptions) -> Option<ByRows> {
        None
    }
    /// Whether the diagonal of H is enough.
    fn takes_diagonal(&self) -> bool {
        false
    }
    /// Rounds the linears that read one activation. `h` is H, row-major `[in, in]`, present if [`Method::needs`] asks
    /// for it; for a method that [takes it](Method::takes_diagonal), it may be the diagonal, `[in]`.
    ///
    /// # Errors
    /// [`Error::NotPositive`] when H cannot be factored.
    fn solve(&self, linears: &[Linear<'_>], h: Option<&[f32]>, options: &SolverOptions) -> Result<Vec<Solved>, Error>;
}

/// Every method.
pub static METHODS: &[&dyn Method] = &[&gptq::Gptq, &rtn::Rtn, &hqq::Hqq, &billm::Billm];

/// The method called `name`.
///
/// # Errors
/// [`Error::UnknownMethod`], listing the names there are.
pub fn method(name: &str) -> Result<&'static dyn Method, Error> {
    let known = || METHODS.iter().map(|m| m.name()).collect::<Vec<_>>().join(", ");
    let found = METHODS.iter().find(|m| m.name() == name);
    found.copied().ok_or_else(|| Error::UnknownMethod { name: name.into(), known: known() })
}

/// The arithmetic of a scheme whose groups have a scale and a zero point.
#[derive(Clone, Copy)]
enum GroupGrid {
    Int(IntGrid),
    Float(FloatGrid),
}

impl GroupGrid {
    /// That of a linear whose scheme is no GGUF type and not binary.
    fn of(linear: &Linear<'_>) -> Self {
        match linear.scheme.float_grid(divisor(linear)) {
            Some(grid) => GroupGrid::Float(grid),
            None => GroupGrid::Int(linear.scheme.grid()),
        }
    }
}

/// What the stored scales of a linear are divided by.
fn divisor(linear: &Linear<'_>) -> f32 {
    match linear.scheme.grid {
        GridKind::Float(float) if linear.scheme.has_divisor() => {
            let own = || linear.weight.iter().fold(0.0f32, |a, w| a.max(w.abs()));
            FloatGrid::divisor_for(float, linear.amax.unwrap_or_else(own))
        }
        _ => 1.0,
    }
}

/// A [`Quantized`] from codes `[out, in]` and parameters `[out, groups]`, of which rows that share scales hold the same.
fn assemble(linear: &Linear<'_>, codes: Vec<u8>, mut params: Vec<GroupParams>) -> Quantized {
    let groups = linear.scheme.groups(linear.shape[1]);
    match linear.scheme.granularity {
        Granularity::Tensor => params.truncate(1),
        Granularity::Tile(side) => {
            params = params.chunks(side * groups).flat_map(|tiles| &tiles[..groups]).copied().collect();
        }
        _ => {}
    }
    let zeros = if linear.scheme.symmetric() { Vec::new() } else { params.iter().map(|p| p.zero).collect() };
    let divisor = divisor(linear);
    // Exact, since divisors are powers of two.
    let mut scales: Vec<f32> = params.iter().map(|p| p.scale * divisor).collect();
    if linear.scheme.has_divisor() {
        scales.push(divisor);
    }
    let input = linear.scheme.activations.calibrated(linear.input, linear.scheme.scale);
    Quantized { scheme: linear.scheme, shape: linear.shape, codes, scales, zeros, group_of: Vec::new(), input }
}

/// Parameters `[out, groups]`, each what `fit` makes of the weights that share them and of their range of inputs.
fn fitted(linear: &Linear<'_>, fit: impl Fn(&[f32], Range<usize>) -> GroupParams + Sync) -> Vec<GroupParams> {
    let [rows, n] = linear.shape;
    let height = match linear.scheme.granularity {
        Granularity::Tensor => rows.max(1),
        Granularity::Tile(side) => side.max(1),
        _ => 1,
    };
    let len = linear.scheme.group_len(n).max(1);
    let corners = (0..rows).step_by(height).flat_map(|row| (0..n).step_by(len).map(move |col| (row, col)));
    let corners: Vec<(usize, usize)> = corners.collect();
    let of = |&(row, col): &(usize, usize)| {
        let cols = col..n.min(col + len);
        let part = |row: usize| &linear.weight[row * n..][cols.clone()];
        match height {
            1 => fit(part(row), cols.clone()),
            _ => fit(&(row..rows.min(row + height)).flat_map(part).copied().collect::<Vec<f32>>(), cols.clone()),
        }
    };
    let params: Vec<GroupParams> = corners.par_iter().map(of).collect();
    let groups = n.div_ceil(len);
    (0..rows).flat_map(|row| &params[row / height * groups..][..groups]).copied().collect()
}

/// Codes nearest to the weights under parameters `[out, groups]`.
fn nearest(linear: &Linear<'_>, params: &[GroupParams], grid: impl Grid + Copy) -> Vec<u8> {
    let (n, len) = (linear.shape[1].max(1), linear.scheme.group_len(linear.shape[1]).max(1));
    let groups = linear.weight.chunks(n).flat_map(|row| row.chunks(len));
    groups.zip(params).flat_map(|(w, &p)| w.iter().map(move |&x| grid.nearest(x, p))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sweep::tests::{random_h, random_w};
    use crate::{ScaleSearch, loss};
    use bitmill_scheme::{BLOCKS, Bits, BlockType, SCHEMES, ScaleType};

    fn schemes() -> Vec<Scheme> {
        let mut all = Vec::new();
        for bits in [2, 3, 4, 5, 8] {
            for symmetric in [true, false] {
                for granularity in [Granularity::Tensor, Granularity::Channel, Granularity::Group(32)] {
                    all.push(Scheme::int(Bits::new(bits).unwrap(), symmetric, granularity));
                }
            }
        }
        all.extend(SCHEMES.iter().map(|p| p.scheme).filter(|s| matches!(s.grid, GridKind::Float(_))));
        all.extend([128, 32].map(Scheme::binary));
        all.push(Scheme { granularity: Granularity::Tensor, ..bitmill_scheme::scheme("fp8_dynamic").unwrap() });
        all.extend(BLOCKS.iter().map(|form| Scheme::block(form.kind)));
        all
    }

    fn solve(
        method: &dyn Method,
        w: &[f32],
        h: &[f32],
        n: usize,
        scheme: Scheme,
        options: &SolverOptions,
    ) -> Quantized {
        let linear = Linear::new("x", w, [w.len() / n, n], scheme);
        let h = (method.needs(options) == Needs::Hessian).then_some(h);
        method.solve(&[linear], h, options).unwrap().remove(0).quantized
    }

    #[test]
    fn every_method_fills_every_scheme_validly() {
        let n = 256;
        let (h, w) = (random_h(n, 51), random_w(40 * n, 52));
        for method in METHODS {
            for scheme in schemes().into_iter().filter(|s| method.refuses(s).is_none()) {
                let q = solve(*method, &w, &h, n, scheme, &SolverOptions::default());
                q.validate().unwrap();
                assert_eq!((q.scheme, q.shape), (scheme, [40, n]), "{}", method.name());
                let scales = q.scales.len() - usize::from(scheme.has_divisor());
                assert!(q.scales[..scales].iter().all(|&s| scheme.scale.round(s) == s), "scales are of their type");
                let error: f32 =
                    q.dequantize().iter().zip(&w).map(|(a, b)| (a - b).powi(2)).sum::<f32>() / w.len() as f32;
                let bound = if scheme.bits().get() >= 4 { 0.2 } else { 1.3 };
                assert!(error < bound, "{} {scheme}: {error}", method.name());
            }
        }
    }

    #[test]
    fn codes_do_not_depend_on_threads() {
        let n = 256;
        let (h, w) = (random_h(n, 61), random_w(100 * n, 62));
        let block = [BlockType::Q2K, BlockType::Iq2Xs].map(Scheme::block);
        let floats = ["nvfp4a16", "fp8_block"].map(|name| bitmill_scheme::scheme(name).unwrap());
        let schemes = [
            Scheme::int(Bits::new(3).unwrap(), true, Granularity::Group(32)),
            floats[0],
            floats[1],
            block[0],
            block[1],
            Scheme::binary(128),
        ];
        for (method, scheme) in METHODS.iter().flat_map(|m| schemes.map(|s| (m, s))) {
            if method.refuses(&scheme).is_some() {
                continue;
            }
            let run = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| solve(*method, &w, &h, n, scheme, &SolverOptions::default()))
            };
            let one = run(1);
            assert!([2, 5].iter().all(|&t| run(t) == one), "{}", method.name());
        }
    }

    #[test]
    fn methods_rank_as_they_should_under_h() {
        let n = 256;
        let (h, w) = (random_h(n, 71), random_w(64 * n, 72));
        let int = |symmetric| Scheme::int(Bits::new(3).unwrap(), symmetric, Granularity::Group(32));
        let blocks = [
            BlockType::Q4_0,
            BlockType::Q2K,
            BlockType::Q3K,
            BlockType::Q4K,
            BlockType::Iq4Xs,
            BlockType::Iq3S,
            BlockType::Iq2Xxs,
            BlockType::Iq1S,
            BlockType::Nvfp4,
        ];
        let floats =
            ["nvfp4a16", "mxfp4a16", "mxfp8a16", "fp8_dynamic"].map(|name| bitmill_scheme::scheme(name).unwrap());
        for scheme in [int(true), int(false)].into_iter().chain(floats).chain(blocks.map(Scheme::block)) {
            let total = |name: &str, options: &SolverOptions| -> f64 {
                loss(&w, &solve(method(name).unwrap(), &w, &h, n, scheme, options).dequantize(), &h).iter().sum()
            };
            let search = |s| SolverOptions { scale_search: Some(s), ..SolverOptions::default() };
            let plain = total("rtn", &SolverOptions::default());
            let weighted = total("rtn", &search(ScaleSearch::Hessian));
            let no_refinement = SolverOptions { descent_sweeps: 0, scale_refits: 0, ..SolverOptions::default() };
            let (swept, refined) = (total("gptq", &no_refinement), total("gptq", &SolverOptions::default()));
            // Numbers of 8 bits under a power of two are as fine under the next.
            let indifferent = scheme.bits().get() == 8 && scheme.scale == ScaleType::E8m0;
            assert!(weighted < plain || indifferent && weighted == plain, "{scheme}: {weighted} {plain}");
            assert!(refined < swept && swept < weighted, "{scheme}: {refined} {swept} {weighted}");
        }
    }

    #[test]
    fn every_scheme_has_a_method() {
        for scheme in SCHEMES.iter().map(|p| p.scheme).chain(BLOCKS.iter().map(|form| Scheme::block(form.kind))) {
            assert!(METHODS.iter().any(|m| m.refuses(&scheme).is_none()), "{scheme}");
        }
        for method in METHODS.iter().filter(|m| m.name() != "billm") {
            assert!(method.refuses(&Scheme::binary(128)).is_some_and(|reason| reason.contains("--method billm")));
        }
    }

    #[test]
    fn identity_hessian_makes_gptq_round_to_nearest() {
        // Oracle 6 through the method: same scale criterion, same codes.
        let n = 64;
        let w = random_w(8 * n, 81);
        let h: Vec<f32> = (0..n * n).map(|i| f32::from(u8::from(i % (n + 1) == 0))).collect();
        let scheme = Scheme::int(Bits::new(4).unwrap(), true, Granularity::Group(16));
        let options =
            SolverOptions { scale_search: Some(ScaleSearch::Mse), scale_refits: 0, ..SolverOptions::default() };
        let run = |name| solve(method(name).unwrap(), &w, &h, n, scheme, &options);
        assert_eq!(run("gptq"), run("rtn"));
    }

    #[test]
    fn what_is_no_number_shows_in_the_sum_of_squares() {
        // Who reads weights as they are rounded rests on it.
        let n = 512;
        let schemes = SCHEMES.iter().map(|p| p.scheme).chain(BLOCKS.iter().map(|form| Scheme::block(form.kind)));
        let searches = [None, Some(ScaleSearch::Squares)];
        for (scheme, scale_search) in schemes.flat_map(|scheme| searches.map(|search| (scheme, search))) {
            let options = SolverOptions { scale_search, ..SolverOptions::default() };
            let Some(by_rows) = method("rtn").unwrap().by_rows(&scheme, &options) else { continue };
            let linear = Linear::new("x", &[], [2, n], scheme);
            for (at, value) in
                [(0, f32::NAN), (n - 1, f32::INFINITY), (n + 37, f32::NEG_INFINITY), (2 * n - 1, f32::NAN)]
            {
                let mut w = random_w(2 * n, 82);
                assert!(by_rows(&linear, Stored::F32(&w), None).1[1].is_finite(), "{scheme}");
                w[at] = value;
                assert!(!by_rows(&linear, Stored::F32(&w), None).1[1].is_finite(), "{scheme}: {value} at {at}");
            }
        }
    }

    #[test]
    fn unknown_methods_are_refused_by_name() {
        assert_eq!(
            method("gtpq").err().unwrap().to_string(),
            "method `gtpq` does not exist; the methods are gptq, rtn, hqq, billm"
        );
    }
}
