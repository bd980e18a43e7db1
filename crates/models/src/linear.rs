//! One linear: a weight, maybe a bias, and how its input is rounded.

use crate::backward::values;
use crate::weights::{check, shaped};
use crate::{Error, PackedWeight, Weights, ops};
use bitmill_kernels::{self as kernels, Panels, Short};
use bitmill_scheme::{Activations, Inputs};
use candle_core::{Device, Tensor};
use std::borrow::Cow;
use std::cell::{Cell, OnceCell};
use std::ops::Range;
use std::sync::{Arc, OnceLock};

/// `y = x Wᵀ + b`.
#[derive(Debug, Clone)]
pub(crate) struct Linear {
    pub(crate) matrix: Matrix,
    /// `[out]`.
    pub(crate) bias: Option<Tensor>,
    /// Rounding of `x`.
    pub(crate) inputs: Inputs,
    /// What a dense matrix and what it meets are rounded to when they are multiplied.
    short: Option<Rounding>,
}

/// A dense matrix rounded for products, once something is multiplied by it; clones share it.
#[derive(Debug, Clone)]
struct Rounding {
    short: Short,
    panels: Arc<OnceLock<Panels>>,
}

impl Rounding {
    /// `weight`, which is the matrix, rounded.
    fn of(&self, weight: &Tensor) -> Result<&Panels, Error> {
        if let Some(panels) = self.panels.get() {
            return Ok(panels);
        }
        // Outside of the lock: other threads are needed for it, and one of them may come here.
        let panels = ops::right_panels(self.short, weight)?;
        Ok(self.panels.get_or_init(|| panels))
    }
}

/// A matrix `[out, in]`.
#[derive(Debug, Clone)]
pub(crate) enum Matrix {
    /// In f32, contiguous: to be looked at, replaced and derived by.
    Dense(Tensor),
    /// In the size it is stored in: to be run.
    Packed(PackedWeight),
}

impl Matrix {
    /// The matrix at `module`, which must be `[out, in]`; `transposed` as for [`Linear::load`].
    fn load(weights: &dyn Weights, module: &str, shape: [usize; 2], transposed: bool) -> Result<Self, Error> {
        let name = format!("{module}.weight");
        let transposed = transposed && !weights.quantized(module);
        if !transposed && let Some(packed) = weights.packed(module)? {
            return Matrix::checked(&name, packed, shape);
        }
        let weight = weights.linear(module)?;
        Ok(Matrix::Dense(match transposed {
            true => check(&name, weight, &[shape[1], shape[0]])?.t()?.contiguous()?,
            false => check(&name, weight, &shape)?,
        }))
    }

    /// The embedding `name`, which must be `shape`.
    pub(crate) fn embedding(weights: &dyn Weights, name: &str, shape: [usize; 2]) -> Result<Self, Error> {
        match name.strip_suffix(".weight").map(|module| weights.packed(module)).transpose()?.flatten() {
            // Rows are looked up, which 16-bit numbers can be and codes cannot.
            Some(packed) if packed.rows(&[]).is_some() => Matrix::checked(name, packed, shape),
            _ => Ok(Matrix::Dense(shaped(weights, name, &shape)?)),
        }
    }

    fn checked(name: &str, packed: PackedWeight, shape: [usize; 2]) -> Result<Self, Error> {
        match packed.shape() == shape {
            true => Ok(Matrix::Packed(packed)),
            false => {
                let (expected, got) = (shape.to_vec(), packed.shape().to_vec());
                Err(Error::Shape { tensor: name.into(), expected, got })
            }
        }
    }

    /// Number of rows.
    pub(crate) fn rows(&self) -> usize {
        match self {
            Matrix::Dense(weight) => weight.dims()[0],
            Matrix::Packed(packed) => packed.shape()[0],
        }
    }

    /// Rows of an embedding, `[rows, in]`.
    pub(crate) fn select(&self, rows: &[u32]) -> Result<Tensor, Error> {
        match self {
            Matrix::Dense(w) => Ok(w.index_select(&Tensor::from_slice(rows, rows.len(), &Device::Cpu)?, 0)?),
            Matrix::Packed(packed) => match packed.rows(rows) {
                Some(values) => Ok(Tensor::from_vec(values, (rows.len(), packed.shape()[1]), &Device::Cpu)?),
                None => panic!("an embedding of codes"),
            },
        }
    }
}

impl Linear {
    /// Loads `module` and checks its shape `[out, in]`; `transposed` tells that it is stored the other way round as long as
    /// it is dense.
    pub(crate) fn load(
        weights: &dyn Weights,
        module: &str,
        shape: [usize; 2],
        (bias, transposed): (bool, bool),
    ) -> Result<Self, Error> {
        let matrix = Matrix::load(weights, module, shape, transposed)?;
        let bias = bias.then(|| shaped(weights, &format!("{module}.bias"), &shape[..1])).transpose()?;
        Ok(Linear { inputs: weights.inputs(module)?, ..Linear::new(matrix, bias) })
    }

    /// What reads its input as it is.
    pub(crate) fn new(matrix: Matrix, bias: Option<Tensor>) -> Self {
        Linear { matrix, bias, inputs: Inputs::FULL, short: None }
    }

    /// Replaces the matrix.
    pub(crate) fn set(&mut self, matrix: Matrix) {
        self.matrix = matrix;
        self.multiply_by(self.short.as_ref().map(|rounding| rounding.short));
    }

    /// Has a dense matrix multiply in fewer bits, or in f32.
    pub(crate) fn multiply_by(&mut self, short: Option<Short>) {
        self.short = short.map(|short| Rounding { short, panels: Arc::default() });
    }

    /// Rounds what it multiplies by, by all threads, before several of them come for it.
    pub(crate) fn prepare(&self) -> Result<(), Error> {
        match (&self.matrix, &self.short) {
            (Matrix::Dense(weight), Some(rounding)) => rounding.of(weight).map(|_| ()),
            _ => Ok(()),
        }
    }

    /// The weight, `[out, in]`.
    ///
    /// # Panics
    /// Where it is packed: such a block runs, and nothing else.
    pub(crate) fn weight(&self) -> &Tensor {
        match &self.matrix {
            Matrix::Dense(weight) => weight,
            Matrix::Packed(_) => panic!("a packed weight is not to be looked at"),
        }
    }

    /// Whether it rounds its input for products, and does nothing else with it: one in bfloat16 is as good then.
    pub(crate) fn rounds(&self) -> bool {
        let dense = matches!(self.matrix, Matrix::Dense(_));
        dense && self.short.is_some() && self.inputs.activations == Activations::Full
    }

    /// `x [tokens, in]`, in f32 or bfloat16, to `[tokens, out]` in f32.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor, Error> {
        let x = if self.rounds() { Cow::Borrowed(x) } else { ops::widened(x)? };
        self.read(&Input::new(&x, &[self])?)
    }

    /// What each of `linears` makes of `x`: [`Linear::forward`], where they share what can be shared.
    pub(crate) fn forward_all<const N: usize>(linears: [&Linear; N], x: &Tensor) -> Result<[Tensor; N], Error> {
        let outputs = Linear::all_outputs(&linears, x)?;
        match outputs.try_into() {
            Ok(outputs) => Ok(outputs),
            Err(_) => unreachable!("there is one output for every linear"),
        }
    }

    /// Whether [`Linear::gated_strips`] can be had of them.
    pub(crate) fn have_strips(linears: [&Linear; 2]) -> bool {
        let [gate, up] = linears.map(|linear| linear.short.as_ref().map(|rounding| rounding.short));
        linears.iter().all(|linear| linear.rounds() && linear.bias.is_none()) && gate == up
    }

    /// `silu(gate) · up` of what the two make of `x`, in strips of columns: `take` gets the columns of each, and its entries,
    /// `[tokens, columns]`.
    ///
    /// # Panics
    /// Where they do not [have them](Linear::have_strips).
    pub(crate) fn gated_strips<'a>(
        linears: [&'a Linear; 2],
        x: &Tensor,
        take: &mut dyn FnMut(Range<usize>, &[f32]),
    ) -> Result<(), Error> {
        let input = Input::new(x, &linears)?;
        let of = |linear: &'a Linear| -> Result<(Short, &'a Panels), Error> {
            match (&linear.matrix, &linear.short) {
                (Matrix::Dense(weight), Some(rounding)) => Ok((rounding.short, rounding.of(weight)?)),
                _ => panic!("linears that have strips"),
            }
        };
        let [gate, up] = linears;
        let ((short, gate), (_, up)) = (of(gate)?, of(up)?);
        let mut memory = STRIPS.take();
        kernels::gated_strips(input.panels(short)?, [gate, up], &mut memory, take);
        STRIPS.set(memory);
        Ok(())
    }

    fn all_outputs(linears: &[&Linear], x: &Tensor) -> Result<Vec<Tensor>, Error> {
        let x = if linears.iter().all(|linear| linear.rounds()) { Cow::Borrowed(x) } else { ops::widened(x)? };
        let packed: Vec<&PackedWeight> = linears.iter().filter_map(|linear| linear.packed()).collect();
        if let Some(first) = packed.first()
            && packed.len() == linears.len()
            && packed.iter().all(|packed| packed.reads_alike(first))
        {
            let (tokens, entries) = (x.dim(0)?, values(&x)?);
            let mut outputs: Vec<Vec<f32>> = packed.iter().map(|w| vec![0.0; tokens * w.shape()[0]]).collect();
            let mut all: Vec<_> = packed.iter().copied().zip(outputs.iter_mut().map(|y| &mut y[..])).collect();
            PackedWeight::products(&first.input(&entries), &mut all);
            let shaped = |(y, linear): (Vec<f32>, &&Linear)| {
                let width = linear.matrix.rows();
                linear.biased(Tensor::from_vec(y, (tokens, width), &Device::Cpu)?)
            };
            return outputs.into_iter().zip(linears).map(shaped).collect();
        }
        let input = Input::new(&x, linears)?;
        linears.iter().map(|linear| linear.read(&input)).collect()
    }

    /// The matrix, where it is packed and meets its input as it is.
    fn packed(&self) -> Option<&PackedWeight> {
        match &self.matrix {
            Matrix::Packed(packed) if self.inputs.activations == Activations::Full => Some(packed),
            _ => None,
        }
    }

    /// The output `[tokens, out]` for an input shared with other linears.
    fn read(&self, input: &Input<'_>) -> Result<Tensor, Error> {
        let rounded = input.rounded.iter().find(|(inputs, _)| *inputs == self.inputs);
        let x = rounded.map_or(input.full, |(_, rounded)| rounded);
        self.biased(match &self.matrix {
            Matrix::Dense(weight) => match &self.short {
                Some(rounding) => {
                    let weight = rounding.of(weight)?;
                    match rounded {
                        Some(_) => ops::short_product(&ops::left_panels(rounding.short, x, None)?, weight)?,
                        None => ops::short_product(input.panels(rounding.short)?, weight)?,
                    }
                }
                None => ops::product(x, weight)?,
            },
            Matrix::Packed(packed) => {
                let mut y = vec![0.0; x.dim(0)? * packed.shape()[0]];
                packed.forward(&values(x)?, &mut y);
                Tensor::from_vec(y, (x.dim(0)?, packed.shape()[0]), &Device::Cpu)?
            }
        })
    }

    /// Adds the bias to a product.
    fn biased(&self, y: Tensor) -> Result<Tensor, Error> {
        if let Some(bias) = &self.bias {
            ops::add(&y, bias)?;
        }
        Ok(y)
    }
}

thread_local! {
    /// Where this thread rounded its last activation: memory for the next.
    static LEFT: Cell<Option<Panels>> = const { Cell::new(None) };
    /// Where it computed its last strip, likewise.
    static STRIPS: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// An activation `[tokens, in]` as the linears of one site read it: rounded once for all that want it so.
struct Input<'a> {
    full: &'a Tensor,
    rounded: Vec<(Inputs, Tensor)>,
    /// Rounded for products, once a linear asks for it.
    panels: OnceCell<Panels>,
}

impl<'a> Input<'a> {
    /// Prepares `x` for `linears`.
    fn new(x: &'a Tensor, linears: &[&Linear]) -> Result<Self, Error> {
        let mut rounded: Vec<(Inputs, Tensor)> = Vec::new();
        for inputs in linears.iter().map(|linear| linear.inputs).filter(|i| i.activations != Activations::Full) {
            if !rounded.iter().any(|(done, _)| *done == inputs) {
                rounded.push((inputs, ops::round_inputs(x, inputs)?));
            }
        }
        Ok(Input { full: x, rounded, panels: OnceCell::new() })
    }

    /// The activation as it is, but rounded for products.
    fn panels(&self, short: Short) -> Result<&Panels, Error> {
        if let Some(panels) = self.panels.get() {
            return Ok(panels);
        }
        let panels = ops::left_panels(short, self.full, LEFT.take())?;
        Ok(self.panels.get_or_init(|| panels))
    }
}

impl Drop for Input<'_> {
    fn drop(&mut self) {
        if let Some(panels) = self.panels.take() {
            LEFT.set(Some(panels));
        }
    }
}
