//! What comes before the first block: the embeddings of tokens, or of the patches of an image.

use crate::layout::{Entry, Patched};
use crate::linear::{Linear, Matrix};
use crate::norm::Norm;
use crate::weights::shaped;
use crate::{Error, Images, ModelSpec, Weights, ops};
use candle_core::{Device, Tensor};
use std::borrow::Cow;

/// What a model reads at a time.
#[derive(Debug, Clone)]
pub enum Window<'a> {
    /// Ids of tokens.
    Tokens(&'a [u32]),
    /// An image as the model's own preprocessing leaves it, row-major `[channels, height, width]`.
    Image(Cow<'a, [f32]>),
}

impl<'a, T: AsRef<[u32]> + ?Sized> From<&'a T> for Window<'a> {
    fn from(tokens: &'a T) -> Self {
        Window::Tokens(tokens.as_ref())
    }
}

/// From what a model reads to its residual stream.
#[derive(Debug, Clone)]
pub struct Embedding {
    kind: Kind,
}

#[derive(Debug, Clone)]
enum Kind {
    Tokens(Tokens),
    Patches(Patches),
}

impl Embedding {
    /// Loads the embedding alone, which is all that calibration needs.
    ///
    /// # Errors
    /// A tensor that is missing, unreadable or of another shape.
    pub fn load(spec: &ModelSpec, weights: &dyn Weights) -> Result<Self, Error> {
        let kind = match (&spec.layout.entry, spec.images) {
            (Entry::Patches(names), Some(images)) => Kind::Patches(Patches::load(spec, weights, names, images)?),
            (Entry::Patches(_), None) => unreachable!("an architecture of patches says which images they are of"),
            (Entry::Tokens(_, added), _) => Kind::Tokens(Tokens::load(spec, weights, added.as_ref())?),
        };
        Ok(Embedding { kind })
    }

    /// The residual stream `[tokens, hidden]` that enters the first block.
    ///
    /// # Errors
    /// [`Error::Reads`] for what is not of the kind that the model reads; [`Error::Token`] for an id beyond the vocabulary,
    /// [`Error::Positions`] for more tokens than there are positions; [`Error::Image`] for an image of another size.
    pub fn embed<'a>(&self, window: impl Into<Window<'a>>) -> Result<Tensor, Error> {
        match (&self.kind, window.into()) {
            (Kind::Tokens(own), Window::Tokens(tokens)) => own.embed(tokens, |added| added.places(tokens)),
            (Kind::Patches(own), Window::Image(pixels)) => own.embed(&pixels),
            (Kind::Tokens(_), Window::Image(_)) => Err(Error::Reads { expected: "text", got: "images" }),
            (Kind::Patches(_), Window::Tokens(_)) => Err(Error::Reads { expected: "images", got: "text" }),
        }
    }

    /// The same for the token that stands at position `at` of each of several texts.
    pub(crate) fn embed_next(&self, tokens: &[u32], at: usize) -> Result<Tensor, Error> {
        match &self.kind {
            Kind::Tokens(own) => own.embed(tokens, |added| vec![(added.first + at) as u32; tokens.len()]),
            Kind::Patches(_) => Err(Error::Reads { expected: "images", got: "text" }),
        }
    }

    /// The table of the tokens, where the model reads some.
    pub(crate) fn table(&self) -> Option<&Matrix> {
        match &self.kind {
            Kind::Tokens(own) => Some(&own.table),
            Kind::Patches(_) => None,
        }
    }
}

/// The token embedding, and what is added to it.
#[derive(Debug, Clone)]
struct Tokens {
    /// `[vocab, hidden]`.
    table: Matrix,
    /// Factor of its rows.
    factor: f32,
    added: Option<Added>,
}

/// Learned embeddings beside those of the tokens.
#[derive(Debug, Clone)]
struct Added {
    /// `[positions, hidden]`; without them nothing is added, and the norm is all there is.
    positions: Option<Tensor>,
    /// The row of the first position.
    first: usize,
    /// The token that is not counted, whose position is the one before the first.
    padding: Option<u32>,
    /// Of the first type, which every token of a single text has: `[hidden]`.
    token_type: Option<Tensor>,
    /// Of the sum.
    norm: Option<Norm>,
}

impl Tokens {
    fn load(spec: &ModelSpec, weights: &dyn Weights, added: Option<&crate::Added>) -> Result<Self, Error> {
        let table = Matrix::embedding(weights, &spec.embedding(), [spec.vocab, spec.hidden])?;
        let load = |added: &crate::Added| -> Result<Added, Error> {
            let rows = spec.max_positions + spec.position_offset;
            let positions = |name| shaped(weights, &spec.spell(name), &[rows, spec.hidden]);
            let types = |name| -> Result<Tensor, Error> {
                Ok(shaped(weights, &spec.spell(name), &[spec.token_types, spec.hidden])?.get(0)?)
            };
            let norm = |norm| Norm::load(spec, weights, &spec.norm_parts(&spec.spell(norm)));
            Ok(Added {
                positions: added.positions.map(positions).transpose()?,
                first: spec.position_offset,
                padding: spec.padding,
                token_type: added.types.map(types).transpose()?,
                norm: added.norm.map(norm).transpose()?,
            })
        };
        let added = added.map(load).transpose()?;
        Ok(Tokens { table, factor: spec.factors.embedding as f32, added })
    }

    fn embed(&self, tokens: &[u32], places: impl FnOnce(&Added) -> Vec<u32>) -> Result<Tensor, Error> {
        let vocab = self.table.rows();
        if let Some(&token) = tokens.iter().find(|&&t| t as usize >= vocab) {
            return Err(Error::Token { token, vocab });
        }
        let h = self.table.select(tokens)?;
        if self.factor != 1.0 {
            ops::scale(&h, self.factor)?;
        }
        let Some(added) = &self.added else { return Ok(h) };
        if let Some(token_type) = &added.token_type {
            ops::add(&h, token_type)?;
        }
        if let Some(positions) = &added.positions {
            let (places, rows) = (places(added), positions.dim(0)?);
            if let Some(&beyond) = places.iter().max().filter(|&&place| place as usize >= rows) {
                let tokens = beyond as usize + 1 - added.first;
                return Err(Error::Positions { tokens, positions: rows - added.first });
            }
            let places = Tensor::from_slice(&places, places.len(), &Device::Cpu)?;
            ops::add(&h, &positions.index_select(&places, 0)?)?;
        }
        match &added.norm {
            Some(norm) => norm.forward(&h),
            None => Ok(h),
        }
    }
}

impl Added {
    /// The row of the position of every token.
    fn places(&self, tokens: &[u32]) -> Vec<u32> {
        let mut next = self.first as u32;
        let place = |token: &u32| {
            if Some(*token) == self.padding {
                return self.first as u32 - 1;
            }
            next += 1;
            next - 1
        };
        tokens.iter().map(place).collect()
    }
}

/// Patches of an image as tokens.
#[derive(Debug, Clone)]
struct Patches {
    images: Images,
    /// The convolution as a product with patches laid out as rows, `[hidden, channels · height · width]`.
    projection: Linear,
    /// The token before them, `[1, hidden]`.
    class: Tensor,
    /// `[1 + patches, hidden]`.
    positions: Tensor,
}

impl Patches {
    fn load(spec: &ModelSpec, weights: &dyn Weights, names: &Patched, images: Images) -> Result<Self, Error> {
        let (hidden, tokens) = (spec.hidden, 1 + images.patches());
        let Images { channels, patch: [height, width], .. } = images;
        let weight = shaped(weights, &spec.embedding(), &[hidden, channels, height, width])?;
        let bias = shaped(weights, &format!("{}.bias", spec.spell(names.projection)), &[hidden])?;
        let matrix = Matrix::Dense(weight.reshape((hidden, channels * height * width))?);
        let class = shaped(weights, &spec.spell(names.class), &[1, 1, hidden])?;
        let positions = shaped(weights, &spec.spell(names.positions), &[1, tokens, hidden])?;
        Ok(Patches {
            images,
            projection: Linear::new(matrix, Some(bias)),
            class: class.reshape((1, hidden))?,
            positions: positions.reshape((tokens, hidden))?,
        })
    }

    fn embed(&self, pixels: &[f32]) -> Result<Tensor, Error> {
        let Images { channels, patch: [height, width], .. } = self.images;
        if pixels.len() != self.images.shape().iter().product::<usize>() {
            return Err(Error::Image { expected: self.images.shape(), got: pixels.len() });
        }
        let rows = (self.images.patches(), channels * height * width);
        let patches = self.projection.forward(&Tensor::from_vec(self.unfold(pixels), rows, &Device::Cpu)?)?;
        let h = Tensor::cat(&[&self.class, &patches], 0)?;
        ops::add(&h, &self.positions)?;
        Ok(h)
    }

    /// The patches of an image one after the other, each `[channels, height, width]`.
    fn unfold(&self, pixels: &[f32]) -> Vec<f32> {
        let Images { channels, size: [rows, columns], patch: [height, width] } = self.images;
        let mut unfolded = Vec::with_capacity(pixels.len());
        for (top, left) in (0..rows / height).flat_map(|y| (0..columns / width).map(move |x| (y * height, x * width))) {
            for (channel, y) in (0..channels).flat_map(|c| (top..top + height).map(move |y| (c, y))) {
                let from = (channel * rows + y) * columns + left;
                unfolded.extend_from_slice(&pixels[from..from + width]);
            }
        }
        unfolded
    }
}
