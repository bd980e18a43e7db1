//! Where a model's tensors come from.

use crate::packed::packed;
use crate::{Error, PackedWeight, Precision};
use bitmill_checkpoint::Checkpoint;
use bitmill_scheme::Inputs;
use candle_core::{Device, Tensor};
use std::collections::BTreeMap;

/// A source of tensors by name, all f32 on the CPU.
pub trait Weights: Sync {
    /// The tensor `name`, in its stored shape.
    ///
    /// # Errors
    /// When it is missing or unreadable.
    fn tensor(&self, name: &str) -> Result<Tensor, Error>;

    /// The weight of a linear: as stored where it is dense, and where it is quantized dequantized, `[out, in]`.
    ///
    /// # Errors
    /// When it is missing or unreadable.
    fn linear(&self, module: &str) -> Result<Tensor, Error>;

    /// Whether a tensor `name` is stored.
    fn contains(&self, name: &str) -> bool;

    /// Whether a linear is stored quantized.
    fn quantized(&self, module: &str) -> bool;

    /// How the input of a linear is rounded at run time.
    ///
    /// # Errors
    /// When calibration had to say it and what it said is missing or unreadable.
    fn inputs(&self, module: &str) -> Result<Inputs, Error>;

    /// The scales of keys and values of an attention layer, where they are rounded to 8-bit floats.
    ///
    /// # Errors
    /// When they are missing or unreadable.
    fn cache_scales(&self, _attention: &str) -> Result<Option<[f32; 2]>, Error> {
        Ok(None)
    }

    /// The weight of a linear or an embedding in the size it is stored in, where the source offers that.
    ///
    /// # Errors
    /// When it is missing or unreadable.
    fn packed(&self, _module: &str) -> Result<Option<PackedWeight>, Error> {
        Ok(None)
    }
}

/// Dense f32 tensors in memory.
impl Weights for BTreeMap<String, Tensor> {
    fn tensor(&self, name: &str) -> Result<Tensor, Error> {
        self.get(name).cloned().ok_or_else(|| Error::Missing { tensor: name.into() })
    }

    fn linear(&self, module: &str) -> Result<Tensor, Error> {
        self.tensor(&format!("{module}.weight"))
    }

    fn contains(&self, name: &str) -> bool {
        self.contains_key(name)
    }

    fn quantized(&self, _module: &str) -> bool {
        false
    }

    fn inputs(&self, _module: &str) -> Result<Inputs, Error> {
        Ok(Inputs::FULL)
    }
}

/// An opened folder, dense or quantized in any dialect that bitmill reads.
impl Weights for Checkpoint {
    fn tensor(&self, name: &str) -> Result<Tensor, Error> {
        // Embeddings and heads are quantized too in GGUF files.
        if let Some(module) = name.strip_suffix(".weight").filter(|m| self.scheme_of(m).is_some()) {
            return Weights::linear(self, module);
        }
        let view = Checkpoint::tensor(self, name)?;
        Ok(Tensor::from_vec(view.to_f32()?, view.shape, &Device::Cpu)?)
    }

    fn linear(&self, module: &str) -> Result<Tensor, Error> {
        let weight = self.weight(module)?;
        Ok(Tensor::from_vec(weight.to_f32()?, &weight.shape(), &Device::Cpu)?)
    }

    fn contains(&self, name: &str) -> bool {
        Checkpoint::contains(self, name)
    }

    fn quantized(&self, module: &str) -> bool {
        self.scheme_of(module).is_some()
    }

    fn inputs(&self, module: &str) -> Result<Inputs, Error> {
        // A linear that is stored as plain numbers is one, whatever the configuration claims.
        if self.scheme_of(module).is_none() {
            return Ok(Inputs::FULL);
        }
        Ok(Checkpoint::inputs(self, module)?)
    }

    fn cache_scales(&self, attention: &str) -> Result<Option<[f32; 2]>, Error> {
        Ok(Checkpoint::cache_scales(self, attention)?)
    }
}

/// A folder for running: its weights stay in the size they are stored in wherever a kernel reads them so.
#[derive(Debug, Clone, Copy)]
pub struct AsStored<'a> {
    /// The folder.
    pub folder: &'a Checkpoint,
    /// How products with integer codes read their input.
    pub precision: Precision,
}

impl Weights for AsStored<'_> {
    fn tensor(&self, name: &str) -> Result<Tensor, Error> {
        Weights::tensor(self.folder, name)
    }

    fn linear(&self, module: &str) -> Result<Tensor, Error> {
        self.folder.linear(module)
    }

    fn contains(&self, name: &str) -> bool {
        self.folder.contains(name)
    }

    fn quantized(&self, module: &str) -> bool {
        self.folder.quantized(module)
    }

    fn inputs(&self, module: &str) -> Result<Inputs, Error> {
        Weights::inputs(self.folder, module)
    }

    fn cache_scales(&self, attention: &str) -> Result<Option<[f32; 2]>, Error> {
        Weights::cache_scales(self.folder, attention)
    }

    fn packed(&self, module: &str) -> Result<Option<PackedWeight>, Error> {
        packed(self.folder, module, self.precision)
    }
}

/// The tensor `name`, whose shape must be `shape`.
pub(crate) fn shaped(weights: &dyn Weights, name: &str, shape: &[usize]) -> Result<Tensor, Error> {
    check(name, weights.tensor(name)?, shape)
}

/// `tensor` contiguous, after checking its shape.
pub(crate) fn check(name: &str, tensor: Tensor, shape: &[usize]) -> Result<Tensor, Error> {
    if tensor.dims() == shape {
        Ok(tensor.contiguous()?)
    } else {
        Err(Error::Shape { tensor: name.into(), expected: shape.to_vec(), got: tensor.dims().to_vec() })
    }
}
