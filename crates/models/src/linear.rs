//! One linear: a weight, maybe a bias, and how its input is rounded.

use crate::backward::values;
use crate::weights::{check, shaped};
use crate::{Error, PackedInput, PackedWeight, Weights, ops};
use bitmill_kernels::{Brain, Panels};
use bitmill_scheme::{Activations, Inputs};
use candle_core::{Device, Tensor};
use std::cell::OnceCell;
use std::sync::{Arc, OnceLock};

/// `y = x Wᵀ + b`.
#[derive(Debug, Clone)]
pub(crate) struct Linear {
    pub(crate) matrix: Matrix,
    /// `[out]`.
    pub(crate) bias: Option<Tensor>,
    /// Rounding of `x`.
    pub(crate) inputs: Inputs,
    /// Whether a dense matrix and what it meets are rounded to bfloat16 to be multiplied.
    brain: Option<Rounding>,
}

/// A dense matrix rounded to bfloat16, once something is multiplied by it; clones share it.
#[derive(Debug, Clone)]
struct Rounding {
    brain: Brain,
    panels: Arc<OnceLock<Panels>>,
}

impl Rounding {
    /// `weight`, which is the matrix, rounded.
    fn of(&self, weight: &Tensor) -> Result<&Panels, Error> {
        if let Some(panels) = self.panels.get() {
            return Ok(panels);
        }
        // Outside of the lock: other threads are needed for it, and one of them may come here.
        let panels = ops::right_panels(self.brain, weight)?;
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
        Linear { matrix, bias, inputs: Inputs::FULL, brain: None }
    }

    /// Replaces the matrix.
    pub(crate) fn set(&mut self, matrix: Matrix) {
        self.matrix = matrix;
        self.multiply_by(self.brain.as_ref().map(|rounding| rounding.brain));
    }

    /// Has a dense matrix multiply in bfloat16, or in f32.
    pub(crate) fn multiply_by(&mut self, brain: Option<Brain>) {
        self.brain = brain.map(|brain| Rounding { brain, panels: Arc::default() });
    }

    /// Rounds what it multiplies by, by all threads, before several of them come for it.
    pub(crate) fn prepare(&self) -> Result<(), Error> {
        match (&self.matrix, &self.brain) {
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

    /// `x [tokens, in]` to `[tokens, out]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor, Error> {
        self.read(&Input::new(x, &[self])?)
    }

    /// The output `[tokens, out]` for an input shared with other linears.
    pub(crate) fn read(&self, input: &Input<'_>) -> Result<Tensor, Error> {
        let rounded = input.rounded.iter().find(|(inputs, _)| *inputs == self.inputs);
        let x = rounded.map_or(input.full, |(_, rounded)| rounded);
        let y = match &self.matrix {
            Matrix::Dense(weight) => match &self.brain {
                Some(rounding) => {
                    let weight = rounding.of(weight)?;
                    match rounded {
                        Some(_) => ops::brain_product(rounding.brain, &ops::left_panels(rounding.brain, x)?, weight)?,
                        None => ops::brain_product(rounding.brain, input.panels(rounding.brain)?, weight)?,
                    }
                }
                None => ops::product(x, weight)?,
            },
            Matrix::Packed(packed) => {
                let mut y = vec![0.0; x.dim(0)? * packed.shape()[0]];
                match &input.packed {
                    Some((like, ready)) if like.reads_alike(packed) => packed.product(ready, &mut y),
                    _ => packed.forward(&values(x)?, &mut y),
                }
                Tensor::from_vec(y, (x.dim(0)?, packed.shape()[0]), &Device::Cpu)?
            }
        };
        if let Some(bias) = &self.bias {
            ops::add(&y, bias)?;
        }
        Ok(y)
    }
}

/// An activation `[tokens, in]` as the linears of one site read it: rounded once for all that want it so.
pub(crate) struct Input<'a> {
    full: &'a Tensor,
    rounded: Vec<(Inputs, Tensor)>,
    /// For packed weights that read alike, and one of them.
    packed: Option<(PackedWeight, PackedInput<'static>)>,
    /// Rounded to bfloat16, once a linear asks for it.
    panels: OnceCell<Panels>,
}

impl<'a> Input<'a> {
    /// Prepares `x` for `linears`.
    pub(crate) fn new(x: &'a Tensor, linears: &[&Linear]) -> Result<Self, Error> {
        let mut rounded: Vec<(Inputs, Tensor)> = Vec::new();
        for inputs in linears.iter().map(|linear| linear.inputs).filter(|i| i.activations != Activations::Full) {
            if !rounded.iter().any(|(done, _)| *done == inputs) {
                rounded.push((inputs, ops::round_inputs(x, inputs)?));
            }
        }
        // One linear alone rounds its input by itself.
        let several = linears.iter().filter_map(|linear| match &linear.matrix {
            Matrix::Packed(packed) if linears.len() > 1 => Some(packed),
            _ => None,
        });
        let packed = match several.into_iter().find(|packed| packed.reads_alike(packed)) {
            Some(packed) => match packed.input(&values(x)?) {
                PackedInput::Int8 { values, scales } => Some((packed.clone(), PackedInput::Int8 { values, scales })),
                // There is nothing to share where nothing is rounded.
                PackedInput::Full(_) => None,
            },
            None => None,
        };
        Ok(Input { full: x, rounded, packed, panels: OnceCell::new() })
    }

    /// The activation as it is, but rounded to bfloat16.
    fn panels(&self, brain: Brain) -> Result<&Panels, Error> {
        if let Some(panels) = self.panels.get() {
            return Ok(panels);
        }
        let panels = ops::left_panels(brain, self.full)?;
        Ok(self.panels.get_or_init(|| panels))
    }
}
