//! Weights that stay as small as they are stored, for running a model: what `bitmill run` and inference servers read.
//!
//! Integer codes are laid out once for the kernels, in as many bytes as the folder holds; 16-bit weights stay 16 bits. What
//! no kernel reads is told by [`PackedWeight::new`], never expanded behind the caller's back.

use crate::Error;
use bitmill_checkpoint::{Checkpoint, Order, Weight};
use bitmill_kernels::{
    CHUNK, Halves, Level, Meeting, Packed, PackedForm, Rounded, RoundedMut, SPAN, Scales, half_product,
    packed_products, packed_products_int8, round_activations,
};
use bitmill_scheme::{Activations, Granularity, GridKind, Quantized, ScaleType};
use candle_core::{Device, Module, Tensor};
use half::{bf16, f16};
use safetensors::Dtype;
use std::borrow::Cow;
use std::sync::Arc;

/// How products with integer codes read their input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// Rounded to 8 bits, 128 numbers of a token sharing a scale: products of integers, the fastest.
    #[default]
    Int8,
    /// As it is, in f32.
    Full,
}

/// A weight `[out, in]` in the size it is stored in. Cloning shares it; any number of threads may read it.
#[derive(Debug, Clone)]
pub struct PackedWeight {
    store: Arc<Store>,
    precision: Precision,
}

#[derive(Debug)]
enum Store {
    Codes(Codes),
    Half { shape: [usize; 2], bits: Vec<u16>, brain: bool },
}

/// Integer codes with a scale a group.
#[derive(Debug)]
struct Codes {
    form: PackedForm,
    codes: Vec<u8>,
    scales: StoredScales,
    zeros: Vec<u8>,
    /// Which input column stands at each place, where groups are no neighbours.
    order: Option<Vec<u32>>,
}

/// Scales in the type of the scheme.
#[derive(Debug)]
enum StoredScales {
    F32(Vec<f32>),
    F16(Vec<u16>),
    Bf16(Vec<u16>),
}

impl PackedWeight {
    /// The weight as it is stored, or `None` where no kernel reads it that way: float and GGUF grids, groups that are no
    /// multiple of 32, dense weights other than of 16 bits, and numbers that do not lie row after row.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] where the tensor cannot be read.
    pub fn new(weight: &Weight<'_>, precision: Precision) -> Result<Option<Self>, Error> {
        let store = match weight {
            Weight::Quantized(q) => Codes::new(q).map(Store::Codes),
            Weight::Dense(view) if view.order == Order::Rows => match view.dtype {
                Dtype::F16 | Dtype::BF16 => {
                    let bits = view.bytes.as_chunks().0.iter().map(|b| u16::from_le_bytes(*b)).collect();
                    Some(Store::Half { shape: weight.shape(), bits, brain: view.dtype == Dtype::BF16 })
                }
                _ => None,
            },
            Weight::Dense(_) => None,
        };
        Ok(store.map(|store| PackedWeight { store: Arc::new(store), precision }))
    }

    /// `[out, in]`.
    #[must_use]
    pub fn shape(&self) -> [usize; 2] {
        match &*self.store {
            Store::Codes(codes) => codes.form.shape(),
            Store::Half { shape, .. } => *shape,
        }
    }

    /// Bytes in memory.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match &*self.store {
            Store::Codes(c) => {
                let scales = match &c.scales {
                    StoredScales::F32(s) => 4 * s.len(),
                    StoredScales::F16(s) | StoredScales::Bf16(s) => 2 * s.len(),
                };
                c.codes.len() + scales + c.zeros.len() + c.order.as_ref().map_or(0, |o| 4 * o.len())
            }
            Store::Half { bits, .. } => 2 * bits.len(),
        }
    }

    /// `x` made ready for [`PackedWeight::product`]; linears that read the same `x` share it where
    /// [`PackedWeight::reads_alike`] says so.
    ///
    /// # Panics
    /// When `x` is not `[tokens, in]`: a caller's bug.
    #[must_use]
    pub fn input<'a>(&self, x: &'a [f32]) -> PackedInput<'a> {
        let [_, cols] = self.shape();
        assert!(x.len().is_multiple_of(cols), "an input [tokens, in]");
        let Store::Codes(codes) = &*self.store else { return PackedInput::Full(Cow::Borrowed(x)) };
        let x: Cow<'a, [f32]> = match &codes.order {
            Some(order) => x.chunks_exact(cols).flat_map(|x| order.iter().map(|&i| x[i as usize])).collect(),
            None => Cow::Borrowed(x),
        };
        if self.precision == Precision::Full {
            return PackedInput::Full(x);
        }
        let (tokens, chunks) = (x.len() / cols, cols.div_ceil(CHUNK));
        let (mut values, mut sums) = (vec![0; tokens * chunks * CHUNK], vec![0; tokens * chunks]);
        let mut scales = vec![0.0; tokens * cols.div_ceil(SPAN)];
        let out = RoundedMut { values: &mut values, scales: &mut scales, sums: &mut sums };
        round_activations(Level::best(), &x, cols, out);
        PackedInput::Int8 { values, scales, sums }
    }

    /// Whether an input made ready for `other` suits this weight too.
    #[must_use]
    pub fn reads_alike(&self, other: &PackedWeight) -> bool {
        let plain = |w: &PackedWeight| match &*w.store {
            Store::Codes(codes) => codes.order.is_none().then_some(w.precision),
            Store::Half { .. } => Some(Precision::Full),
        };
        self.shape()[1] == other.shape()[1] && plain(self).is_some() && plain(self) == plain(other)
    }

    /// `y = x·Ŵᵀ` into `out: [tokens, out]`.
    ///
    /// # Panics
    /// When `out` does not fit, or `x` was made for another weight: a caller's bug.
    pub fn product(&self, x: &PackedInput<'_>, out: &mut [f32]) {
        PackedWeight::products(x, &mut [(self, out)]);
    }

    /// The same of several weights, which read alike, each with what its products go into; of codes they cost less together
    /// than one after another.
    ///
    /// # Panics
    /// As [`PackedWeight::product`].
    pub fn products(x: &PackedInput<'_>, all: &mut [(&PackedWeight, &mut [f32])]) {
        let level = Level::best();
        let mut codes = Vec::new();
        for (weight, out) in all {
            match (&*weight.store, x) {
                (Store::Codes(own), _) => codes.push(Meeting { weight: own.packed(), out }),
                (Store::Half { shape, bits, brain }, PackedInput::Full(x)) => {
                    let w = if *brain { Halves::Bf16(bits) } else { Halves::F16(bits) };
                    half_product(level, w, shape[1], x, out);
                }
                (Store::Half { .. }, _) => panic!("an input that was rounded for another weight"),
            }
        }
        match x {
            PackedInput::Int8 { values, scales, sums } => {
                packed_products_int8(level, &mut codes, &Rounded { values, scales, sums })
            }
            PackedInput::Full(x) => packed_products(level, &mut codes, x),
        }
    }

    /// `y = x·Ŵᵀ` for `x: [tokens, in]`, into `out: [tokens, out]`.
    ///
    /// # Panics
    /// When a length does not fit: a caller's bug.
    pub fn forward(&self, x: &[f32], out: &mut [f32]) {
        self.product(&self.input(x), out);
    }

    /// Rows `rows` of a 16-bit weight in f32, `[rows, in]`; `None` for codes.
    pub(crate) fn rows(&self, rows: &[u32]) -> Option<Vec<f32>> {
        let Store::Half { shape: [_, cols], bits, brain } = &*self.store else { return None };
        let value = |&b: &u16| if *brain { bf16::from_bits(b).to_f32() } else { f16::from_bits(b).to_f32() };
        Some(rows.iter().flat_map(|&row| bits[row as usize * cols..][..*cols].iter().map(value)).collect())
    }
}

/// An input `[tokens, in]` as a [`PackedWeight`] reads it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum PackedInput<'a> {
    /// In f32.
    Full(Cow<'a, [f32]>),
    /// Rounded to 8 bits: values, the scale of every 128 of them, and the sum of every 32.
    Int8 {
        /// `[tokens, in]`, padded to a multiple of 32.
        values: Vec<i8>,
        /// `[tokens, in / 128]`.
        scales: Vec<f32>,
        /// `[tokens, in / 32]`.
        sums: Vec<i32>,
    },
}

impl Codes {
    fn new(q: &Quantized) -> Option<Self> {
        let GridKind::Int { bits, .. } = q.scheme.grid else { return None };
        let [rows, cols] = q.shape;
        let group = match q.scheme.granularity {
            Granularity::Group(group) | Granularity::Mapped(group) => group,
            Granularity::Channel | Granularity::Tensor => cols,
            _ => return None,
        };
        let form = PackedForm::new(bits.get(), q.shape, group)?;
        let order = if q.group_of.is_empty() { None } else { Some(neighbours(&q.group_of, group)?) };
        let mut codes = vec![0; form.code_bytes()];
        match &order {
            Some(order) => {
                let moved = q.codes.chunks_exact(cols).flat_map(|row| order.iter().map(|&i| row[i as usize]));
                form.pack(&moved.collect::<Vec<_>>(), &mut codes);
            }
            None => form.pack(&q.codes, &mut codes),
        }
        let mut scales = vec![0.0; form.params()];
        let mut zeros = vec![0; if q.zeros.is_empty() { 0 } else { form.params() }];
        for row in 0..rows {
            for group in 0..form.groups() {
                let (at, params) = (form.param(row, group), q.params(row, group));
                scales[at] = params.scale;
                if let Some(zero) = zeros.get_mut(at) {
                    *zero = params.zero;
                }
            }
        }
        let halves = |half: fn(f32) -> u16| scales.iter().map(|&s| half(s)).collect();
        let scales = match q.scheme.scale {
            ScaleType::F16 => StoredScales::F16(halves(|s| f16::from_f32(s).to_bits())),
            ScaleType::Bf16 => StoredScales::Bf16(halves(|s| bf16::from_f32(s).to_bits())),
            _ => StoredScales::F32(scales),
        };
        Some(Codes { form, codes, scales, zeros, order })
    }

    fn packed(&self) -> Packed<'_> {
        let scales = match &self.scales {
            StoredScales::F32(s) => Scales::F32(s),
            StoredScales::F16(s) => Scales::F16(s),
            StoredScales::Bf16(s) => Scales::Bf16(s),
        };
        Packed { form: self.form, codes: &self.codes, scales, zeros: &self.zeros }
    }
}

/// The columns by group, in which groups of `group` columns are neighbours; `None` where one has another number of them.
fn neighbours(group_of: &[u32], group: usize) -> Option<Vec<u32>> {
    let mut order: Vec<u32> = (0..group_of.len() as u32).collect();
    order.sort_by_key(|&i| group_of[i as usize]);
    let stands = |(place, &i): (usize, &u32)| group_of[i as usize] as usize == place / group;
    order.iter().enumerate().all(stands).then_some(order)
}

/// A linear of a quantized folder, for servers: `y = x·Ŵᵀ + b`.
///
/// ```no_run
/// use bitmill_checkpoint::Checkpoint;
/// use bitmill_models::{PackedLinear, Precision};
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let folder = Checkpoint::open("out/books-10m-w4".as_ref())?;
/// let linear = PackedLinear::load(&folder, "model.layers.0.mlp.up_proj", Precision::Int8)?;
/// let [rows, cols] = linear.weight().shape();
/// let mut y = vec![0.0; rows];
/// linear.forward_slice(&vec![1.0; cols], &mut y);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct PackedLinear {
    weight: PackedWeight,
    bias: Option<Vec<f32>>,
}

impl PackedLinear {
    /// Loads `module` of a folder.
    ///
    /// # Errors
    /// [`Error::NotPacked`] for a weight that no kernel reads as it is stored; [`Error::Checkpoint`] where it is missing
    /// or cannot be read.
    pub fn load(folder: &Checkpoint, module: &str, precision: Precision) -> Result<Self, Error> {
        let weight = packed(folder, module, precision)?.ok_or_else(|| Error::NotPacked { module: module.into() })?;
        let name = format!("{module}.bias");
        let bias = if folder.contains(&name) { Some(folder.tensor(&name)?.to_f32()?) } else { None };
        let rows = weight.shape()[0];
        match &bias {
            Some(b) if b.len() != rows => Err(Error::Shape { tensor: name, expected: vec![rows], got: vec![b.len()] }),
            _ => Ok(PackedLinear { weight, bias }),
        }
    }

    /// The weight.
    #[must_use]
    pub fn weight(&self) -> &PackedWeight {
        &self.weight
    }

    /// `x: [tokens, in]` to `out: [tokens, out]`.
    ///
    /// # Panics
    /// When a length does not fit: a caller's bug.
    pub fn forward_slice(&self, x: &[f32], out: &mut [f32]) {
        self.weight.forward(x, out);
        if let Some(bias) = &self.bias {
            for y in out.chunks_exact_mut(bias.len()) {
                y.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
            }
        }
    }
}

impl Module for PackedLinear {
    /// `x [.., in]` to `[.., out]`, f32 on the CPU.
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let [rows, cols] = self.weight.shape();
        let mut shape = x.dims().to_vec();
        if shape.last() != Some(&cols) {
            candle_core::bail!("an input of shape {shape:?} for a linear [{rows}, {cols}]");
        }
        let values = x.flatten_all()?.to_vec1::<f32>()?;
        let mut out = vec![0.0; values.len() / cols * rows];
        self.forward_slice(&values, &mut out);
        *shape.last_mut().unwrap_or(&mut 0) = rows;
        Tensor::from_vec(out, shape, &Device::Cpu)
    }
}

/// The weight of `module` as it is stored, where a kernel reads it. Where the folder asks for rounded activations, those
/// are what it is multiplied by.
pub(crate) fn packed(folder: &Checkpoint, module: &str, precision: Precision) -> Result<Option<PackedWeight>, Error> {
    let rounds = folder.scheme_of(module).is_some_and(|scheme| scheme.activations != Activations::Full);
    let precision = if rounds { Precision::Full } else { precision };
    PackedWeight::new(&folder.weight(module)?, precision)
}

#[cfg(test)]
mod tests;
