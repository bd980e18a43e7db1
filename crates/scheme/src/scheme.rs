//! Schemes: grid × granularity × scale encoding, and what they cost in bits.

use crate::{
    Activations, BLOCKS, BinaryParams, BlockForm, BlockType, Error, FloatGrid, FloatType, IntGrid, Shift,
    exponent_byte, exponent_value,
};
use half::{bf16, f16};
use serde::{Deserialize, Serialize};

/// Width of a code: 1 to 8 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct Bits(u8);

impl Bits {
    /// Every width, narrowest first.
    pub const ALL: [Bits; 8] = [Bits(1), Bits(2), Bits(3), Bits(4), Bits(5), Bits(6), Bits(7), Bits(8)];

    /// A width of `bits`.
    ///
    /// # Errors
    /// [`Error::Bits`] outside 1 to 8.
    pub fn new(bits: u32) -> Result<Self, Error> {
        match u8::try_from(bits) {
            Ok(b @ 1..=8) => Ok(Bits(b)),
            _ => Err(Error::Bits(bits)),
        }
    }

    /// The width as a number.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0 as u32
    }

    /// The largest code, 2^b − 1.
    #[must_use]
    pub const fn max_code(self) -> u8 {
        ((1u16 << self.0) - 1) as u8
    }

    /// Zero point of a symmetric grid, 2^(b−1).
    #[must_use]
    pub const fn middle(self) -> u8 {
        1 << (self.0 - 1)
    }
}

impl TryFrom<u32> for Bits {
    type Error = Error;
    fn try_from(bits: u32) -> Result<Self, Error> {
        Bits::new(bits)
    }
}

impl From<Bits> for u32 {
    fn from(bits: Bits) -> u32 {
        bits.get()
    }
}

/// Which values a code may stand for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GridKind {
    /// Evenly spaced values `scale · (code − zero)`.
    Int {
        /// Width of a code.
        bits: Bits,
        /// Whether the zero point is fixed at 2^(b−1) instead of stored per group.
        symmetric: bool,
    },
    /// Numbers with an exponent of their own, `scale · float`; codes are their bit patterns.
    Float(FloatType),
    /// A quantized type of GGUF.
    Block(BlockType),
    /// BiLLM's means and magnitudes; codes are those of [`BinaryParams`].
    Binary,
}

/// Which weights of a matrix `[out, in]` share one scale and zero point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Granularity {
    /// The whole matrix.
    Tensor,
    /// One output row.
    Channel,
    /// This many consecutive inputs of one output row.
    Group(usize),
    /// A tile of this many consecutive output rows and as many consecutive inputs; the last tiles may be smaller.
    Tile(usize),
    /// Inputs of one output row that a map sends to the same group, this many on average (GPTQ's `desc_act`). It is read and
    /// converted, and no method rounds to it.
    Mapped(usize),
}

/// Number type of the stored scales.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScaleType {
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// IEEE single precision; read from other tools' 8-bit checkpoints.
    F32,
    /// A power of two, 2^(byte − 127): the MX types.
    E8m0,
    /// An E4M3 number, over a divisor that the whole matrix shares: NVFP4.
    E4m3,
}

impl ScaleType {
    /// Width in bits.
    #[must_use]
    pub const fn bits(self) -> u32 {
        match self {
            ScaleType::F16 | ScaleType::Bf16 => 16,
            ScaleType::F32 => 32,
            ScaleType::E8m0 | ScaleType::E4m3 => 8,
        }
    }

    /// Whether a model's own type stands in for it; otherwise it belongs to the scheme.
    #[must_use]
    pub const fn is_wide(self) -> bool {
        matches!(self, ScaleType::F16 | ScaleType::Bf16 | ScaleType::F32)
    }

    /// The nearest value of this type to `scale`; it stays finite, and non-zero where `scale` is. E8M0 has neither sign nor
    /// zero.
    #[must_use]
    pub fn round(self, scale: f32) -> f32 {
        let (rounded, max, tiny) = match self {
            ScaleType::F16 => (f16::from_f32(scale).to_f32(), f16::MAX.to_f32(), f16::MIN_POSITIVE_SUBNORMAL.to_f32()),
            ScaleType::Bf16 => (bf16::from_f32(scale).to_f32(), bf16::MAX.to_f32(), bf16::MIN_POSITIVE.to_f32()),
            ScaleType::F32 => return scale,
            ScaleType::E8m0 => return exponent_value(exponent_byte(scale)),
            ScaleType::E4m3 => {
                let float = FloatType::E4m3;
                (float.value(float.nearest(scale)), float.max(), float.value(1))
            }
        };
        if rounded == 0.0 && scale != 0.0 { tiny.copysign(scale) } else { rounded.clamp(-max, max) }
    }
}

/// How the numbers of a weight matrix are stored.
///
/// ```
/// use bitmill_scheme::{Bits, Granularity, Scheme};
/// let w4 = Scheme::int(Bits::new(4)?, true, Granularity::Group(128));
/// assert_eq!(w4.bits_per_weight([4096, 4096]), 4.125);
/// # Ok::<(), bitmill_scheme::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scheme {
    /// The values a code may stand for.
    pub grid: GridKind,
    /// The weights that share a scale.
    pub granularity: Granularity,
    /// The type of a scale.
    pub scale: ScaleType,
    /// What happens to the linear's input at run time.
    pub activations: Activations,
}

impl Scheme {
    /// A weight-only integer scheme with bf16 scales.
    #[must_use]
    pub const fn int(bits: Bits, symmetric: bool, granularity: Granularity) -> Self {
        Scheme {
            grid: GridKind::Int { bits, symmetric },
            granularity,
            scale: ScaleType::Bf16,
            activations: Activations::Full,
        }
    }

    /// The scheme of a GGUF type: its blocks are the groups, their real numbers are half precision.
    #[must_use]
    pub fn block(kind: BlockType) -> Self {
        Scheme {
            grid: GridKind::Block(kind),
            granularity: Granularity::Group(kind.form().len),
            scale: ScaleType::F16,
            activations: Activations::Full,
        }
    }

    /// A weight-only float scheme.
    #[must_use]
    pub const fn float(float: FloatType, granularity: Granularity, scale: ScaleType) -> Self {
        Scheme { grid: GridKind::Float(float), granularity, scale, activations: Activations::Full }
    }

    /// BiLLM's binary numbers, in groups of `group` inputs; their real numbers are half precision.
    #[must_use]
    pub const fn binary(group: usize) -> Self {
        Scheme {
            grid: GridKind::Binary,
            granularity: Granularity::Group(group),
            scale: ScaleType::F16,
            activations: Activations::Full,
        }
    }

    /// The GGUF type, where the scheme is one.
    #[must_use]
    pub fn form(&self) -> Option<&'static BlockForm> {
        match self.grid {
            GridKind::Int { .. } | GridKind::Float(_) | GridKind::Binary => None,
            GridKind::Block(kind) => Some(kind.form()),
        }
    }

    /// The same scheme with scales of type `scale`; those of a GGUF, MX, NVFP4 or binary type are what they are.
    #[must_use]
    pub const fn with_scale(self, scale: ScaleType) -> Self {
        match self.grid {
            GridKind::Int { .. } | GridKind::Float(_) if self.scale.is_wide() => Scheme { scale, ..self },
            _ => self,
        }
    }

    /// Width of a code.
    #[must_use]
    pub fn bits(&self) -> Bits {
        match self.grid {
            GridKind::Int { bits, .. } => bits,
            GridKind::Float(float) => Bits(float.bits() as u8),
            GridKind::Block(kind) => Bits((kind.form().levels.len() - 1).ilog2() as u8 + 1),
            GridKind::Binary => Bits(3),
        }
    }

    /// Whether nothing but a scale is stored per group: the zero point is fixed in the middle of the grid.
    #[must_use]
    pub fn symmetric(&self) -> bool {
        match self.grid {
            GridKind::Int { symmetric, .. } => symmetric,
            GridKind::Float(_) | GridKind::Binary => true,
            GridKind::Block(kind) => kind.form().shift == Shift::None,
        }
    }

    /// The arithmetic of an integer grid.
    ///
    /// # Panics
    /// For a GGUF type, whose arithmetic is that of [`Scheme::form`], a float and a binary number: a caller's bug.
    #[must_use]
    pub fn grid(&self) -> IntGrid {
        assert!(matches!(self.grid, GridKind::Int { .. }), "{self} has no integer grid");
        IntGrid { bits: self.bits(), symmetric: self.symmetric(), scale: self.scale }
    }

    /// The arithmetic of a float grid in a matrix whose scales are divided by `divisor`; `None` for other grids.
    #[must_use]
    pub fn float_grid(&self, divisor: f32) -> Option<FloatGrid> {
        match self.grid {
            GridKind::Float(float) => Some(FloatGrid { float, scale: self.scale, divisor }),
            _ => None,
        }
    }

    /// Whether a matrix stores a divisor of all its scales.
    #[must_use]
    pub fn has_divisor(&self) -> bool {
        self.scale == ScaleType::E4m3
    }

    /// Whether loaders need one scale, or one divisor, for all matrices that they hold as one.
    #[must_use]
    pub fn shares_scale(&self) -> bool {
        self.has_divisor() || (matches!(self.grid, GridKind::Float(_)) && self.granularity == Granularity::Tensor)
    }

    /// Number of inputs that share one scale in a matrix with `cols` inputs.
    #[must_use]
    pub const fn group_len(&self, cols: usize) -> usize {
        match self.granularity {
            Granularity::Tensor | Granularity::Channel => cols,
            Granularity::Group(group) | Granularity::Mapped(group) | Granularity::Tile(group) => group,
        }
    }

    /// Number of groups along the input of a matrix with `cols` inputs; a ragged last group counts.
    #[must_use]
    pub const fn groups(&self, cols: usize) -> usize {
        match self.granularity {
            Granularity::Tensor | Granularity::Channel => 1,
            Granularity::Group(group) | Granularity::Mapped(group) | Granularity::Tile(group) => cols.div_ceil(group),
        }
    }

    /// Number of stored scales of a matrix `[out, in]`, a divisor not counted; of binary numbers, of their means and
    /// magnitudes.
    #[must_use]
    pub const fn scales(&self, [rows, cols]: [usize; 2]) -> usize {
        let each = if matches!(self.grid, GridKind::Binary) { BinaryParams::REALS } else { 1 };
        each * match self.granularity {
            Granularity::Tensor => 1,
            Granularity::Tile(side) => rows.div_ceil(side) * self.groups(cols),
            _ => rows * self.groups(cols),
        }
    }

    /// Whether the scheme fits a matrix with `cols` inputs.
    ///
    /// # Errors
    /// [`Error::Group`] when the group size is zero or does not divide `cols`, and for binary numbers that have none.
    pub const fn check(&self, cols: usize) -> Result<(), Error> {
        match self.granularity {
            Granularity::Group(group) | Granularity::Mapped(group) if group == 0 || !cols.is_multiple_of(group) => {
                Err(Error::Group { group, cols })
            }
            Granularity::Tile(0) => Err(Error::Group { group: 0, cols }),
            Granularity::Group(_) => Ok(()),
            _ if matches!(self.grid, GridKind::Binary) => Err(Error::Group { group: 0, cols }),
            _ => Ok(()),
        }
    }

    /// Bits per weight of codes, scales and packed zero points of a matrix `[out, in]` (methods part 0.3). A file
    /// adds what its format needs besides: see `Format::layout`, whose bytes are what reports count.
    #[must_use]
    pub fn bits_per_weight(&self, shape: [usize; 2]) -> f64 {
        if let Some(form) = self.form() {
            return form.bits_per_weight();
        }
        let zero = if self.symmetric() { 0 } else { self.bits().get() };
        let side = self.scales(shape) as f64 * f64::from(self.scale.bits() + zero)
            + if self.has_divisor() { 32.0 } else { 0.0 }
            + if self.activations.is_calibrated() { 32.0 } else { 0.0 };
        // What tells a salient column is a bit of the column, and no weight's.
        let code = if self.grid == GridKind::Binary { 2 } else { self.bits().get() };
        f64::from(code) + side / (shape[0] as f64 * shape[1] as f64)
    }
}

impl std::fmt::Display for Scheme {
    /// The short name used in tables: `w4 g128 sym`, `q4_k`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(form) = self.form() {
            return f.write_str(form.name);
        }
        match (self.grid, self.scale) {
            (GridKind::Binary, _) => write!(f, "binary")?,
            (GridKind::Float(FloatType::E4m3), ScaleType::E8m0) => write!(f, "mxfp8")?,
            (GridKind::Float(FloatType::E2m1), ScaleType::E8m0) => write!(f, "mxfp4")?,
            (GridKind::Float(FloatType::E2m1), ScaleType::E4m3) => write!(f, "nvfp4")?,
            (GridKind::Float(FloatType::E4m3), _) => write!(f, "fp8")?,
            (GridKind::Float(FloatType::E2m1), _) => write!(f, "e2m1")?,
            (GridKind::Float(FloatType::Fp4), _) => write!(f, "fp4")?,
            (GridKind::Float(FloatType::Nf4), _) => write!(f, "nf4")?,
            _ => write!(f, "w{}", self.bits().get())?,
        }
        match self.activations {
            Activations::Full => {}
            Activations::DynamicInt8 => write!(f, "a8")?,
            Activations::DynamicFp8 => write!(f, "afp8")?,
            Activations::DynamicFp8Groups => write!(f, "afp8g128")?,
            Activations::StaticFp8 => write!(f, "afp8static")?,
            Activations::Nvfp4 | Activations::Mxfp4 => write!(f, "a4")?,
            Activations::Mxfp8 => write!(f, "a8")?,
        }
        match self.granularity {
            Granularity::Tensor => write!(f, " tensor")?,
            Granularity::Tile(side) => write!(f, " {side}x{side}")?,
            Granularity::Channel => write!(f, " channel")?,
            Granularity::Group(g) => write!(f, " g{g}")?,
            Granularity::Mapped(g) => write!(f, " g{g} mapped")?,
        }
        match self.grid {
            GridKind::Float(_) | GridKind::Binary => Ok(()),
            _ => write!(f, " {}", if self.symmetric() { "sym" } else { "asym" }),
        }
    }
}

/// A scheme under the name its users know it by.
#[derive(Debug)]
pub struct Preset {
    /// The value of `--scheme`.
    pub name: &'static str,
    /// One line of help.
    pub summary: &'static str,
    /// The scheme; its scale type is replaced by the model's own where that is 16 bits wide.
    pub scheme: Scheme,
}

const fn preset(
    name: &'static str,
    summary: &'static str,
    bits: u8,
    symmetric: bool,
    granularity: Granularity,
) -> Preset {
    Preset { name, summary, scheme: Scheme::int(Bits(bits), symmetric, granularity) }
}

/// The scheme called `name`: a row of [`SCHEMES`], or a GGUF type of [`BLOCKS`], whose name may be that of a row too.
#[must_use]
pub fn scheme(name: &str) -> Option<Scheme> {
    SCHEMES.iter().find(|p| p.name == name).map(|p| p.scheme).or_else(|| block_scheme(name))
}

/// The scheme of the GGUF type called `name`.
#[must_use]
pub fn block_scheme(name: &str) -> Option<Scheme> {
    BLOCKS.iter().find(|b| b.name == name).map(|b| Scheme::block(b.kind))
}

/// Every named scheme but the GGUF types, which are the rows of [`BLOCKS`].
pub static SCHEMES: &[Preset] = &[
    preset("w4a16", "4-bit symmetric integers, groups of 128", 4, true, Granularity::Group(128)),
    preset("w4a16_asym", "4-bit integers with zero points, groups of 128", 4, false, Granularity::Group(128)),
    preset("w3a16", "3-bit symmetric integers, groups of 128", 3, true, Granularity::Group(128)),
    preset("w2a16", "2-bit symmetric integers, groups of 64", 2, true, Granularity::Group(64)),
    preset("w8a16", "8-bit symmetric integers, one scale per output channel", 8, true, Granularity::Channel),
    Preset {
        name: "w8a8",
        summary: "8-bit weights per output channel, 8-bit activations per token at run time",
        scheme: Scheme {
            grid: GridKind::Int { bits: Bits(8), symmetric: true },
            granularity: Granularity::Channel,
            scale: ScaleType::Bf16,
            activations: Activations::DynamicInt8,
        },
    },
    Preset {
        name: "w4a8",
        summary: "4-bit weights in groups of 128, a byte each, 8-bit activations per token at run time",
        scheme: Scheme { activations: Activations::DynamicInt8, ..Scheme::int(Bits(4), true, Granularity::Group(128)) },
    },
    Preset {
        name: "w4afp8",
        summary: "4-bit weights in groups of 128, 8-bit floats per token at run time",
        scheme: Scheme { activations: Activations::DynamicFp8, ..Scheme::int(Bits(4), true, Granularity::Group(128)) },
    },
    Preset {
        name: "fp8",
        summary: "8-bit floats (E4M3) with one scale per matrix, and inputs with one from calibration",
        scheme: Scheme {
            activations: Activations::StaticFp8,
            ..Scheme::float(FloatType::E4m3, Granularity::Tensor, ScaleType::Bf16)
        },
    },
    Preset {
        name: "fp8_dynamic",
        summary: "8-bit floats (E4M3) per output channel, 8-bit floats per token at run time",
        scheme: Scheme {
            activations: Activations::DynamicFp8,
            ..Scheme::float(FloatType::E4m3, Granularity::Channel, ScaleType::Bf16)
        },
    },
    Preset {
        name: "fp8a16",
        summary: "8-bit floats (E4M3) per output channel, inputs as they are",
        scheme: Scheme::float(FloatType::E4m3, Granularity::Channel, ScaleType::Bf16),
    },
    Preset {
        name: "fp8_block",
        summary: "8-bit floats in tiles of 128 x 128, 8-bit floats per token and 128 inputs at run time",
        scheme: Scheme {
            activations: Activations::DynamicFp8Groups,
            ..Scheme::float(FloatType::E4m3, Granularity::Tile(128), ScaleType::Bf16)
        },
    },
    Preset {
        name: "nvfp4",
        summary: "4-bit floats (E2M1) with an 8-bit float per 16, of weights and inputs",
        scheme: Scheme {
            activations: Activations::Nvfp4,
            ..Scheme::float(FloatType::E2m1, Granularity::Group(16), ScaleType::E4m3)
        },
    },
    Preset {
        name: "nvfp4a16",
        summary: "4-bit floats (E2M1) with an 8-bit float per 16, 4.5 bits per weight",
        scheme: Scheme::float(FloatType::E2m1, Granularity::Group(16), ScaleType::E4m3),
    },
    Preset {
        name: "mxfp4",
        summary: "4-bit floats (E2M1) with a power of two per 32, of weights and inputs",
        scheme: Scheme {
            activations: Activations::Mxfp4,
            ..Scheme::float(FloatType::E2m1, Granularity::Group(32), ScaleType::E8m0)
        },
    },
    Preset {
        name: "mxfp4a16",
        summary: "4-bit floats (E2M1) with a power of two per 32, 4.25 bits per weight",
        scheme: Scheme::float(FloatType::E2m1, Granularity::Group(32), ScaleType::E8m0),
    },
    Preset {
        name: "mxfp8",
        summary: "8-bit floats (E4M3) with a power of two per 32, of weights and inputs",
        scheme: Scheme {
            activations: Activations::Mxfp8,
            ..Scheme::float(FloatType::E4m3, Granularity::Group(32), ScaleType::E8m0)
        },
    },
    Preset {
        name: "mxfp8a16",
        summary: "8-bit floats (E4M3) with a power of two per 32, 8.25 bits per weight",
        scheme: Scheme::float(FloatType::E4m3, Granularity::Group(32), ScaleType::E8m0),
    },
    Preset {
        name: "nf4",
        summary: "4-bit normal quantiles with an f32 per 64, of bitsandbytes; 4.5 bits per weight",
        scheme: Scheme::float(FloatType::Nf4, Granularity::Group(64), ScaleType::F32),
    },
    Preset {
        name: "fp4",
        summary: "4-bit floats with an f32 per 64, of bitsandbytes; 4.5 bits per weight",
        scheme: Scheme::float(FloatType::Fp4, Granularity::Group(64), ScaleType::F32),
    },
    Preset {
        name: "binary",
        summary: "BiLLM's signs in two parts and salient columns, for --method billm; as stored 2.9 bits per weight, not 1.1",
        scheme: Scheme::binary(128),
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_per_weight_of_the_textbook_cases() {
        // Oracle 21, the closed forms of methods part 0.3.
        let shape = [4096, 4096];
        for (bits, symmetric, granularity, expected) in [
            (4, true, Granularity::Group(128), 4.125),
            (4, false, Granularity::Group(128), 4.15625),
            (3, true, Granularity::Group(128), 3.125),
            (2, true, Granularity::Group(64), 2.25),
            (8, true, Granularity::Channel, 8.0 + 16.0 / 4096.0),
            (8, true, Granularity::Tensor, 8.0 + 16.0 / (4096.0 * 4096.0)),
        ] {
            assert_eq!(Scheme::int(Bits(bits), symmetric, granularity).bits_per_weight(shape), expected);
        }
        // Section 2.8: a sign, a side of the split, and seven half-precision numbers per 128 weights.
        assert_eq!(Scheme::binary(128).bits_per_weight(shape), 2.875);
        assert_eq!(Scheme::binary(128).with_scale(ScaleType::Bf16), Scheme::binary(128));
        assert_eq!(scheme("binary").map(|s| s.to_string()).as_deref(), Some("binary g128"));
    }

    #[test]
    fn a_width_is_one_to_eight() {
        assert!(Bits::new(0).is_err() && Bits::new(9).is_err() && Bits::new(300).is_err());
        assert!(serde_roundtrip_rejects_nine());
        assert_eq!(Bits::ALL.map(Bits::max_code), [1, 3, 7, 15, 31, 63, 127, 255]);
        assert_eq!(Bits::ALL.map(Bits::middle), [1, 2, 4, 8, 16, 32, 64, 128]);
    }

    fn serde_roundtrip_rejects_nine() -> bool {
        Bits::try_from(9).is_err()
    }

    #[test]
    fn a_scale_stays_finite_and_non_zero() {
        for t in [ScaleType::F16, ScaleType::Bf16, ScaleType::F32] {
            for s in [1e-30f32, -1e-30, 1e30, 0.1, 0.0, 3e38] {
                let r = t.round(s);
                assert!(r.is_finite() && (r == 0.0) == (s == 0.0), "{t:?} {s} {r}");
                assert_eq!(t.round(r), r, "rounding is idempotent");
            }
        }
    }

    #[test]
    fn group_size_must_divide() {
        let s = Scheme::int(Bits(4), true, Granularity::Group(128));
        assert_eq!(s.check(200), Err(Error::Group { group: 128, cols: 200 }));
        assert!(Scheme::int(Bits(4), true, Granularity::Group(0)).check(128).is_err());
        assert!(s.check(256).is_ok());
    }
}
