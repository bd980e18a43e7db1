//! The operations of the forward pass that candle lacks or does in a way that hurts here.
//!
//! Candle spreads even an addition over all cores, by a pool whose threads spin; where callers run one window per thread
//! the pools fight, and a block takes twice its time. So everything on the path of a block is here: candle operations on
//! contiguous f32 storage that stay on the calling rayon thread unless they are long. Rows are independent and every
//! reduction inside a row has a fixed order, so results do not depend on the number of threads.

use crate::backward::{values, values_of};
use crate::{Act, Error, Pairs};
use bitmill_kernels::{Level, Panels, Short, View, ViewMut, append_f32, axpy, exp, filled, gemm, rotate_halves};
use bitmill_scheme::Inputs;
use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Device, InplaceOp2, Layout, Result, Shape, Tensor, WithDType,
    bail,
};
use half::bf16;
use rayon::prelude::*;
use std::borrow::Cow;
use std::f64::consts::PI;
use std::ops::Range;

/// Elements a thread takes at a time; below it, handing out work costs more than the work.
const BLOCK: usize = 1 << 16;
/// Rows that are made at a time where they become new memory: they stay in the first cache.
const ROWS: usize = 16;
/// Tokens of a product that one thread takes: fewer would pack the weight too often.
const BAND: usize = 512;
/// Independent accumulators of a row's reduction: enough for any vector width, and one fixed order.
const LANES: usize = 16;

/// Rotates the heads of `x [tokens, kv_heads · group · dim]` by `cos`, `sin` `[tokens or more, rotated / 2]`, the first
/// `rotated` channels of each, and gathers them by key-value head: `[kv_heads, tokens · group, dim]`, rows in order of
/// token, then head.
pub(crate) fn rotate(
    x: &Tensor,
    (cos, sin): (&Tensor, &Tensor),
    (dim, group): (usize, usize),
    pairs: Pairs,
) -> Result<Tensor> {
    x.apply_op3_no_bwd(cos, sin, &Rotate { dim, group, pairs })
}

/// The channels `ranges` of `x [tokens, width]`, one after the other, in memory of their own: what is done in place to one
/// share of an output must not meet another.
pub(crate) fn channels(x: &Tensor, ranges: &[Range<usize>]) -> Result<Tensor> {
    let parts = ranges.iter().map(|range| x.narrow(1, range.start, range.len())).collect::<Result<Vec<_>>>()?;
    match &parts[..] {
        [one] => one.force_contiguous(),
        parts => Tensor::cat(parts, 1),
    }
}

/// Puts rows of `part [tokens, Σ ranges]` back to where [`channels`] took them, into `whole [tokens, width]`.
pub(crate) fn put_channels(whole: &mut [f32], width: usize, ranges: &[Range<usize>], part: &[f32]) {
    let own: usize = ranges.iter().map(Range::len).sum();
    for (whole, mut part) in whole.chunks_exact_mut(width).zip(part.chunks_exact(own)) {
        for range in ranges {
            let (now, rest) = part.split_at(range.len());
            whole[range.clone()].copy_from_slice(now);
            part = rest;
        }
    }
}

/// `x ← factor · x`, in place.
pub(crate) fn scale(x: &Tensor, factor: f32) -> Result<()> {
    let factor = Tensor::full(factor, x.dim(candle_core::D::Minus1)?, x.device())?;
    mul(x, &factor)
}

/// `x [tokens, in]` times the transpose of `weight [out, in]`.
pub(crate) fn product(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op2_no_bwd(&weight.contiguous()?, &Product)
}

/// A weight `[out, in]` rounded for products, the right side of [`short_product`].
pub(crate) fn right_panels(short: Short, weight: &Tensor) -> std::result::Result<Panels, Error> {
    panels(weight, |weight| Panels::right(short, weight))
}

/// An activation `[tokens, in]` rounded for products, the left side of [`short_product`], in `memory` that is of no use any more.
pub(crate) fn left_panels(short: Short, x: &Tensor, memory: Option<Panels>) -> std::result::Result<Panels, Error> {
    let mut own = Panels::within(memory, short);
    if x.dtype() == DType::BF16 {
        let (x, (rows, cols)) = (x.contiguous()?, x.dims2()?);
        own.refill_left_rounded(View::new(&values_of::<bf16>(&x)?, rows, cols, cols));
        return Ok(own);
    }
    panels(x, |x| {
        own.refill_left(x);
        own
    })
}

/// `x`, which may be in bfloat16, in f32.
pub(crate) fn widened(x: &Tensor) -> std::result::Result<Cow<'_, Tensor>, Error> {
    if x.dtype() != DType::BF16 {
        return Ok(Cow::Borrowed(x));
    }
    let (x, mut wide) = (x.contiguous()?, Vec::new());
    append_f32(Level::best(), &values_of::<bf16>(&x)?, &mut wide);
    Ok(Cow::Owned(Tensor::from_vec(wide, x.shape(), &Device::Cpu)?))
}

fn panels(matrix: &Tensor, round: impl FnOnce(View<'_, f32>) -> Panels) -> std::result::Result<Panels, Error> {
    let matrix = matrix.contiguous()?;
    let (rows, cols) = matrix.dims2()?;
    let panels = round(View::new(&values(&matrix)?, rows, cols, cols));
    Ok(panels)
}

/// [`product`] of both rounded to bfloat16, with sums in f32.
pub(crate) fn short_product(x: &Panels, weight: &Panels) -> Result<Tensor> {
    let ([tokens, inner], [out, w_inner]) = (x.shape(), weight.shape());
    if inner != w_inner || inner == 0 || out == 0 {
        bail!("product: an input of {inner} channels, a weight of {out} x {w_inner}");
    }
    Tensor::from_vec(bitmill_kernels::short_outer(x, weight), (tokens, out), &Device::Cpu)
}

/// `gate ← silu(gate) · up`, in place.
pub(crate) fn silu_mul(gate: &Tensor, up: &Tensor) -> Result<()> {
    gate.inplace_op2(up, &ByRows { name: "silu-mul", f: |gate, up| bitmill_kernels::silu_mul(Level::best(), gate, up) })
}

/// `x ← x + y`, in place; a `y` of one row is added to every row.
pub(crate) fn add(x: &Tensor, y: &Tensor) -> Result<()> {
    x.inplace_op2(y, &ByRows { name: "add", f: |x, y| axpy(Level::best(), 1.0, y, x) })
}

/// `x ← x · y`, in place.
pub(crate) fn mul(x: &Tensor, y: &Tensor) -> Result<()> {
    x.inplace_op2(y, &ByRows { name: "mul", f: |x, y| x.iter_mut().zip(y).for_each(|(x, y)| *x *= y) })
}

/// `c · tanh(x / c)`.
pub(crate) fn capped(x: &Tensor, cap: f32) -> Result<Tensor> {
    x.contiguous()?.apply_op1_no_bwd(&Capped { cap })
}

/// Every row of `x [.., width]` rounded as the input of a linear is at run time, and back.
pub(crate) fn round_inputs(x: &Tensor, inputs: Inputs) -> Result<Tensor> {
    x.contiguous()?.apply_op1_no_bwd(&RoundInputs { inputs })
}

/// Every row of `x [rows, width]` over its root mean square: `x / √(mean x² + eps) · weight`.
pub(crate) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    x.apply_op2_no_bwd(weight, &RmsNorm { eps })
}

/// Layer norm of every row of `x [rows, width]`: `(x − mean) / √(var + eps) · weight + bias`, variance over `width`.
pub(crate) fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f32) -> Result<Tensor> {
    x.apply_op3_no_bwd(weight, bias, &LayerNorm { eps })
}

struct Rotate {
    dim: usize,
    group: usize,
    pairs: Pairs,
}

impl CustomOp3 for Rotate {
    fn name(&self) -> &'static str {
        "rotate-heads"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        cos: &CpuStorage,
        cos_layout: &Layout,
        sin: &CpuStorage,
        sin_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (tokens, width) = x_layout.shape().dims2()?;
        let (rows, half) = cos_layout.shape().dims2()?;
        let Rotate { dim, group, pairs } = *self;
        if rows < tokens || 2 * half > dim || sin_layout.shape() != cos_layout.shape() || width % (dim * group) != 0 {
            bail!("rotate-heads: {width} channels of {tokens} tokens, table {rows} x {half}, groups of {group}");
        }
        let (x, cos, sin) = (floats(x, x_layout)?, floats(cos, cos_layout)?, floats(sin, sin_layout)?);
        let kv_heads = width / (dim * group);
        let row = dim * group;
        // Rows in order of head, then token.
        let out = filled(tokens * width, (ROWS * row, BLOCK), |i, mut out| {
            let mut first = i * ROWS;
            while !out.is_empty() {
                let (head, token) = (first / tokens, first % tokens);
                let count = (tokens - token).min(out.len() / row);
                let now;
                (now, out) = out.split_at_mut(count * row);
                first += count;
                let x = &x[token * width + head * row..];
                let (cos, sin) = (&cos[token * half..][..count * half], &sin[token * half..][..count * half]);
                if pairs == Pairs::Halves {
                    rotate_halves(Level::best(), (x, width), (cos, sin), (dim, half), (now, row));
                    continue;
                }
                for (i, dst) in now.chunks_exact_mut(row).enumerate() {
                    let (cos, sin) = (&cos[i * half..][..half], &sin[i * half..][..half]);
                    for (src, dst) in x[i * width..][..row].chunks_exact(dim).zip(dst.chunks_exact_mut(dim)) {
                        dst[2 * half..].copy_from_slice(&src[2 * half..]);
                        neighbours(&src[..2 * half], cos, sin, 1.0, &mut dst[..2 * half]);
                    }
                }
            }
        });
        Ok((CpuStorage::F32(out), (kv_heads, tokens * group, dim).into()))
    }
}

/// Rotates every pair of neighbouring channels, `direction` 1 forwards and −1 back.
fn neighbours(src: &[f32], cos: &[f32], sin: &[f32], direction: f32, dst: &mut [f32]) {
    let (src, dst) = (src.as_chunks::<2>().0, dst.as_chunks_mut::<2>().0);
    for (([a, b], out), (cos, sin)) in src.iter().zip(dst).zip(cos.iter().zip(sin)) {
        let sin = direction * sin;
        *out = [a * cos - b * sin, b * cos + a * sin];
    }
}

struct Product;

impl CustomOp2 for Product {
    fn name(&self) -> &'static str {
        "product"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        w: &CpuStorage,
        w_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let ((tokens, inner), (out, w_inner)) = (x_layout.shape().dims2()?, w_layout.shape().dims2()?);
        if inner != w_inner || inner == 0 || out == 0 {
            bail!("product: an input of {inner} channels, a weight of {out} x {w_inner}");
        }
        let weight = floats(w, w_layout)?;
        let mut y = vec![0.0f32; tokens * out];
        y.par_chunks_mut(BAND * out).zip(floats(x, x_layout)?.par_chunks(BAND * inner)).for_each(|(y, x)| {
            let tokens = y.len() / out;
            let (x, weight) = (View::new(x, tokens, inner, inner), View::new(weight, out, inner, inner));
            gemm(1.0, x, weight.t(), 0.0, &mut ViewMut::new(y, tokens, out, out));
        });
        Ok((CpuStorage::F32(y), (tokens, out).into()))
    }
}

/// `f` of every row of x with its row of y.
struct ByRows {
    name: &'static str,
    f: fn(&mut [f32], &[f32]),
}

impl InplaceOp2 for ByRows {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, x: &mut CpuStorage, x_layout: &Layout, y: &CpuStorage, y_layout: &Layout) -> Result<()> {
        let (x_shape, y_shape) = (x_layout.dims(), y_layout.dims());
        let width = x_shape.last().copied().unwrap_or(1);
        let one_row = y_shape == [width];
        if !one_row && x_shape != y_shape {
            bail!("{}: {x_shape:?} and {y_shape:?}", self.name);
        }
        let y = floats(y, y_layout)?;
        each_block(floats_mut(x, x_layout)?, width, |first, block| {
            for (i, row) in block.chunks_mut(width.max(1)).enumerate() {
                (self.f)(row, if one_row { y } else { &y[(first + i) * width..][..width] });
            }
        });
        Ok(())
    }
}

struct Capped {
    cap: f32,
}

impl CustomOp1 for Capped {
    fn name(&self) -> &'static str {
        "cap"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut out = floats(x, layout)?.to_vec();
        each_block(&mut out, 1, |_, block| block.iter_mut().for_each(|v| *v = self.cap * (*v / self.cap).tanh()));
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }
}

struct RoundInputs {
    inputs: Inputs,
}

impl CustomOp1 for RoundInputs {
    fn name(&self) -> &'static str {
        "round-inputs"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let width = layout.shape().dims().last().copied().unwrap_or(1).max(1);
        let mut out = floats(x, layout)?.to_vec();
        each_block(&mut out, width, |_, block| {
            block.chunks_exact_mut(width).for_each(|row| self.inputs.round(row));
        });
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }
}

struct RmsNorm {
    eps: f32,
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, width) = x_layout.shape().dims2()?;
        if width == 0 || weight_layout.dims() != [width] {
            bail!("rms-norm: rows of {width}, weight {:?}", weight_layout.shape());
        }
        let (weight, x) = (floats(weight, weight_layout)?, floats(x, x_layout)?);
        let size = ROWS * width;
        let out = filled(x.len(), (size, BLOCK), |i, out| {
            bitmill_kernels::rms_norm(Level::best(), &x[i * size..][..out.len()], weight, self.eps, out);
        });
        Ok((CpuStorage::F32(out), x_layout.shape().clone()))
    }
}

struct LayerNorm {
    eps: f32,
}

impl CustomOp3 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, width) = x_layout.shape().dims2()?;
        if width == 0 || weight_layout.dims() != [width] || bias_layout.dims() != [width] {
            bail!("layer-norm: rows of {width}, weight {:?}, bias {:?}", weight_layout.shape(), bias_layout.shape());
        }
        let (weight, bias) = (floats(weight, weight_layout)?, floats(bias, bias_layout)?);
        let mut out = floats(x, x_layout)?.to_vec();
        each_block(&mut out, width, |_, block| {
            for row in block.chunks_exact_mut(width) {
                let mean = reduce(row, 0.0, |a, v| a + v, |a, b| a + b) / width as f32;
                // Two passes: the mean of squares minus the square of the mean loses all digits of a row far from zero.
                let squares = reduce(row, 0.0, |a, v| a + (v - mean) * (v - mean), |a, b| a + b);
                let inverse = 1.0 / (squares / width as f32 + self.eps).sqrt();
                for ((v, &weight), &bias) in row.iter_mut().zip(weight).zip(bias) {
                    *v = (*v - mean) * inverse * weight + bias;
                }
            }
        });
        Ok((CpuStorage::F32(out), x_layout.shape().clone()))
    }
}

/// Adds to `d_x [rows, width]` the gradient through a norm of every row, from `grad = ∂/∂y`, and to `d_weight [width]`
/// that of the norm's weight. With x̂ the normed row, `y = x̂ · weight (+ bias)`: x̂ is `x / rms(x)`, or, where `center` is
/// set, `(x − mean x) / √var x`.
pub(crate) fn norm_backward(
    x: &[f32],
    weight: &[f32],
    (eps, center): (f32, bool),
    grad: &[f32],
    d_x: &mut [f32],
    d_weight: &mut [f32],
) {
    let width = weight.len();
    let mean_of = |sum: f32| sum / width as f32;
    let total = |row: &[f32]| reduce(row, 0.0, |a, v| a + v, |a, b| a + b);
    let (mut normed, mut scaled) = (vec![0.0f32; width], vec![0.0f32; width]);
    let rows = x.chunks_exact(width).zip(grad.chunks_exact(width)).zip(d_x.chunks_exact_mut(width));
    for ((x, grad), d_x) in rows {
        let mean = if center { mean_of(total(x)) } else { 0.0 };
        let squares = reduce(x, 0.0, |a, v| a + (v - mean) * (v - mean), |a, b| a + b);
        let inverse = 1.0 / (mean_of(squares) + eps).sqrt();
        let mut along = [0.0f32; LANES];
        for j in 0..width {
            normed[j] = (x[j] - mean) * inverse;
            scaled[j] = grad[j] * weight[j];
            along[j % LANES] += scaled[j] * normed[j];
            d_weight[j] += grad[j] * normed[j];
        }
        let along = mean_of(along.iter().sum());
        let level = if center { mean_of(total(&scaled)) } else { 0.0 };
        for ((d, &s), &n) in d_x.iter_mut().zip(&scaled).zip(&normed) {
            *d += inverse * (s - level - n * along);
        }
    }
}

/// Gradients of `gate` and `up` from that of `act(gate) · up`.
pub(crate) fn gated_backward(act: Act, gate: &[f32], up: &[f32], grad: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let of = |((&g, &u), &d): ((&f32, &f32), &f32)| {
        let (value, slope) = value_and_slope(act, g);
        (d * u * slope, d * value)
    };
    gate.iter().zip(up).zip(grad).map(of).unzip()
}

/// Gradient of `x` from that of `act(x)`.
pub(crate) fn act_backward(act: Act, x: &[f32], grad: &[f32]) -> Vec<f32> {
    x.iter().zip(grad).map(|(&x, &d)| d * value_and_slope(act, x).1).collect()
}

/// `act(x)` and its derivative.
fn value_and_slope(act: Act, x: f32) -> (f32, f32) {
    match act {
        Act::Silu => {
            let sigmoid = 1.0 / (1.0 + exp(-x));
            (x * sigmoid, sigmoid * (1.0 + x * (1.0 - sigmoid)))
        }
        Act::Gelu => {
            let (wide, density) = (f64::from(x), (-0.5 * f64::from(x).powi(2)).exp() / (2.0 * PI).sqrt());
            let cdf = 0.5 * (1.0 + candle_core::cpu::erf::erf_f64(wide / 2f64.sqrt()));
            ((wide * cdf) as f32, (cdf + wide * density) as f32)
        }
        Act::GeluTanh => {
            let (a, b) = ((2.0 / PI).sqrt() as f32, 0.044_715);
            let t = (a * (x + b * x * x * x)).tanh();
            (0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * a * (1.0 + 3.0 * b * x * x))
        }
        Act::Relu => (x.max(0.0), f32::from(u8::from(x > 0.0))),
    }
}

/// The inverse of [`rotate`], which is its transpose: from `[kv_heads, tokens · group, head_dim]` to
/// `[tokens, kv_heads · group · head_dim]`, rotated back. An attention factor in the table scales both alike.
/// Without a table of cosines and sines and half of the rotated width, heads are only put back in their places.
pub(crate) fn unrotate(
    x: &[f32],
    table: Option<(&[f32], &[f32], usize)>,
    (tokens, dim, group): (usize, usize, usize),
    pairs: Pairs,
) -> Vec<f32> {
    let row = dim * group;
    let mut out = vec![0.0f32; x.len()];
    let width = x.len() / tokens.max(1);
    for (i, src) in x.chunks_exact(row).enumerate() {
        let (head, token) = (i / tokens, i % tokens);
        let dst = &mut out[token * width + head * row..][..row];
        let Some((cos, sin, half)) = table else {
            dst.copy_from_slice(src);
            continue;
        };
        let (cos, sin) = (&cos[token * half..][..half], &sin[token * half..][..half]);
        for (src, dst) in src.chunks_exact(dim).zip(dst.chunks_exact_mut(dim)) {
            if pairs == Pairs::Neighbours {
                dst[2 * half..].copy_from_slice(&src[2 * half..]);
                neighbours(&src[..2 * half], cos, sin, -1.0, &mut dst[..2 * half]);
                continue;
            }
            let ((c, d), (a, b)) = (src.split_at(half), dst.split_at_mut(half));
            b[half..].copy_from_slice(&d[half..]);
            for j in 0..half {
                a[j] = c[j] * cos[j] + d[j] * sin[j];
                b[j] = d[j] * cos[j] - c[j] * sin[j];
            }
        }
    }
    out
}

/// Soft-max of `scale · row`, in place.
pub fn softmax(row: &mut [f32], scale: f32) {
    bitmill_kernels::softmax(Level::best(), row, scale);
}

/// The index that `at`, a number from 0 to below 1, falls on where every index has its probability as room.
#[must_use]
pub fn draw(probabilities: &[f32], at: f32) -> usize {
    let mut left = at;
    let passed = probabilities.iter().position(|p| {
        left -= p;
        left < 0.0
    });
    // Rounding may leave a little room beyond the last, which the likeliest takes.
    let likelier = |a: &usize, b: &usize| probabilities[*a].total_cmp(&probabilities[*b]);
    passed.unwrap_or_else(|| (0..probabilities.len()).max_by(likelier).unwrap_or(0))
}

/// KL(softmax p ‖ softmax q) in nats, of two rows of logits. `q` becomes softmax q − softmax p, the divergence's gradient
/// at q. Sums run in f32 over fixed lanes: the divergence is good to about 1e-6.
pub fn softmax_divergence(q: &mut [f32], p: &[f32]) -> f64 {
    bitmill_kernels::softmax_divergence(Level::best(), q, p)
}

/// Folds a row over [`LANES`] accumulators, then those into one.
#[inline(always)]
fn reduce(row: &[f32], start: f32, step: impl Fn(f32, f32) -> f32, join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [start; LANES];
    let chunks = row.chunks_exact(LANES);
    for (lane, &v) in lanes.iter_mut().zip(chunks.remainder()) {
        *lane = step(*lane, v);
    }
    for chunk in chunks {
        for (lane, &v) in lanes.iter_mut().zip(chunk) {
            *lane = step(*lane, v);
        }
    }
    lanes.into_iter().fold(start, join)
}

/// Runs `f(first row, rows)` over blocks of whole rows of `width`.
fn each_block(data: &mut [f32], width: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    let rows = (BLOCK / width.max(1)).max(1);
    if data.len() <= rows * width {
        f(0, data);
    } else {
        data.par_chunks_mut(rows * width).enumerate().for_each(|(i, block)| f(i * rows, block));
    }
}

/// The entries of a contiguous f32 tensor.
pub(crate) fn floats<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    entries(storage, layout)
}

pub(crate) fn entries<'a, T: WithDType>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    match layout.contiguous_offsets() {
        Some((begin, end)) => Ok(&storage.as_slice::<T>()?[begin..end]),
        None => bail!("a contiguous tensor is needed"),
    }
}

fn floats_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> Result<&'a mut [f32]> {
    match (layout.contiguous_offsets(), storage) {
        (Some((begin, end)), CpuStorage::F32(data)) => Ok(&mut data[begin..end]),
        _ => bail!("a contiguous f32 tensor is needed"),
    }
}

#[cfg(test)]
mod tests;
