//! One tensor of a file: its description, and a view of its bytes with the conversions every reader needs.

use crate::Error;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::Dtype;
use std::borrow::Cow;
use std::path::Path;

/// Name, type and shape of a tensor, before or without its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name in the file.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions; empty for a scalar.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// A description.
    #[must_use]
    pub fn new(name: impl Into<String>, dtype: Dtype, shape: impl Into<Vec<usize>>) -> Self {
        TensorSpec { name: name.into(), dtype, shape: shape.into() }
    }

    /// Size of the payload in bytes; saturates where the shape is absurd, so that no disk can be large enough.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let bits = self.shape.iter().try_fold(self.dtype.bitsize(), |n, &d| n.checked_mul(d));
        bits.map_or(usize::MAX, |b| b.div_ceil(8))
    }
}

/// A tensor in a mapped shard. Its bytes are little-endian and may be unaligned.
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    /// Name in the file.
    pub name: &'a str,
    /// The shard it lies in.
    pub file: &'a Path,
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions.
    pub shape: &'a [usize],
    /// The payload as it lies, exactly as long as type and shape ask for unless [`Order::Columns`] says otherwise.
    pub bytes: &'a [u8],
    /// How the numbers lie in `bytes`. They are handed out row after row.
    pub order: Order,
}

/// How the numbers of a tensor lie in its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Row after row.
    Rows,
    /// The rows of so many heads pairwise interleaved (queries and keys in GGUF files of `llama`).
    Interleaved(usize),
    /// A matrix that lies the other way round, among others: `width` numbers for each of its columns, of which those from
    /// `first` on are its own (experts in the stacks of Llama 4).
    Columns {
        /// Where its own begin.
        first: usize,
        /// All that lie together.
        width: usize,
    },
}

/// Elements converted or scanned by one task.
const TASK: usize = 1 << 15;
/// Rows that are gathered at once from columns: as many as a cache line or two has elements.
const BAND: usize = 64;

impl<'a> TensorView<'a> {
    /// The payload as a folder has it: row after row where it lies in columns, else as it lies.
    #[must_use]
    pub fn by_rows(&self) -> Cow<'a, [u8]> {
        let (Order::Columns { first, width }, &[rows, inner]) = (self.order, self.shape) else {
            return Cow::Borrowed(self.bytes);
        };
        let size = self.dtype.bitsize() / 8;
        let mut out = vec![0u8; rows * inner * size];
        out.par_chunks_mut((BAND * inner * size).max(1)).enumerate().for_each(|(band, out)| {
            let count = BAND.min(rows - band * BAND);
            for (column, run) in self.bytes.chunks_exact(width * size).enumerate() {
                let own = run[(first + band * BAND) * size..][..count * size].chunks_exact(size);
                own.enumerate().for_each(|(row, v)| out[(row * inner + column) * size..][..size].copy_from_slice(v));
            }
        });
        Cow::Owned(out)
    }
}

impl TensorView<'_> {
    /// All elements as f32, row after row. F32, F16 and BF16 are exact; F64 is rounded.
    ///
    /// # Errors
    /// [`Error::Dtype`] for any other type.
    pub fn to_f32(&self) -> Result<Vec<f32>, Error> {
        let bytes = &*self.by_rows();
        let mut values = match self.dtype {
            Dtype::F32 => convert(bytes, f32::from_le_bytes),
            Dtype::BF16 => convert(bytes, |b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16)),
            Dtype::F16 => halves(bytes),
            Dtype::F64 => convert(bytes, |b| f64::from_le_bytes(b) as f32),
            _ => return Err(self.wrong_dtype("F32, F16, BF16 or F64")),
        };
        if let (Order::Interleaved(heads), Some(&rows)) = (self.order, self.shape.first()) {
            crate::gguf::deinterleave(&mut values, rows, heads);
        }
        Ok(values)
    }

    /// `values` as the payload of a tensor of this one's type, each rounded to the nearest value of that type.
    ///
    /// # Errors
    /// [`Error::Dtype`] for a type other than F32, F16, BF16 or F64.
    pub fn with_values(&self, values: &[f32]) -> Result<Vec<u8>, Error> {
        let each = values.iter().copied();
        match self.dtype {
            Dtype::F32 => Ok(each.flat_map(f32::to_le_bytes).collect()),
            Dtype::BF16 => Ok(each.flat_map(|v| bf16::from_f32(v).to_le_bytes()).collect()),
            Dtype::F16 => Ok(each.flat_map(|v| f16::from_f32(v).to_le_bytes()).collect()),
            Dtype::F64 => Ok(each.flat_map(|v| f64::from(v).to_le_bytes()).collect()),
            _ => Err(self.wrong_dtype("F32, F16, BF16 or F64")),
        }
    }

    /// Index of the first NaN or infinity of a F32, F16, BF16 or F64 tensor; `None` for other types.
    #[must_use]
    pub fn first_non_finite(&self) -> Option<usize> {
        let bytes = &*self.by_rows();
        match self.dtype {
            Dtype::F32 => scan(bytes, f32_is_not_finite),
            Dtype::BF16 => scan(bytes, bf16_is_not_finite),
            Dtype::F16 => scan(bytes, f16_is_not_finite),
            Dtype::F64 => scan(bytes, f64_is_not_finite),
            _ => None,
        }
    }

    /// The shape of a matrix.
    pub(crate) fn matrix(&self) -> Result<[usize; 2], Error> {
        self.shape.try_into().map_err(|_| self.wrong_shape("a matrix [out, in]"))
    }

    /// The elements of an I32 tensor as bit patterns.
    pub(crate) fn words(&self) -> Result<Vec<u32>, Error> {
        match self.dtype {
            Dtype::I32 | Dtype::U32 => Ok(convert(self.bytes, u32::from_le_bytes)),
            _ => Err(self.wrong_dtype("I32")),
        }
    }

    pub(crate) fn wrong_dtype(&self, expected: &'static str) -> Error {
        Error::Dtype { tensor: self.name.to_owned(), file: self.file.to_owned(), expected, got: self.dtype }
    }

    pub(crate) fn wrong_shape(&self, expected: impl Into<String>) -> Error {
        let (tensor, file) = (self.name.to_owned(), self.file.to_owned());
        Error::Shape { tensor, file, expected: expected.into(), got: self.shape.to_vec() }
    }
}

/// Whether a type holds ordinary floating-point weights.
pub(crate) fn is_dense(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::F64)
}

fn convert<const N: usize, T: Copy + Default + Send>(bytes: &[u8], each: impl Fn([u8; N]) -> T + Sync) -> Vec<T> {
    let (elements, _) = bytes.as_chunks::<N>();
    if elements.len() <= TASK {
        return elements.iter().map(|&e| each(e)).collect();
    }
    let mut out = vec![T::default(); elements.len()];
    out.par_chunks_mut(TASK).zip(elements.par_chunks(TASK)).for_each(|(out, elements)| {
        for (o, &e) in out.iter_mut().zip(elements) {
            *o = each(e);
        }
    });
    out
}

/// f16 goes through a small aligned buffer, because the hardware conversion wants a slice of halves.
fn halves(bytes: &[u8]) -> Vec<f32> {
    const BUFFER: usize = 1024;
    let (elements, _) = bytes.as_chunks::<2>();
    let mut out = vec![0.0f32; elements.len()];
    out.par_chunks_mut(TASK).zip(elements.par_chunks(TASK)).for_each(|(out, elements)| {
        let mut buffer = [f16::ZERO; BUFFER];
        for (out, elements) in out.chunks_mut(BUFFER).zip(elements.chunks(BUFFER)) {
            for (h, &e) in buffer.iter_mut().zip(elements) {
                *h = f16::from_le_bytes(e);
            }
            buffer[..out.len()].convert_to_f32_slice(out);
        }
    });
    out
}

fn scan<const N: usize>(bytes: &[u8], bad: impl Fn([u8; N]) -> bool + Sync) -> Option<usize> {
    let (elements, _) = bytes.as_chunks::<N>();
    elements.par_chunks(TASK).enumerate().find_map_first(|(i, chunk)| {
        // The common, clean case vectorises; only a dirty chunk is searched.
        if any(chunk, &bad) { chunk.iter().position(|&e| bad(e)).map(|j| i * TASK + j) } else { None }
    })
}

fn any<const N: usize>(elements: &[[u8; N]], bad: impl Fn([u8; N]) -> bool) -> bool {
    elements.iter().fold(false, |any, &e| any | bad(e))
}

/// Whether there is a NaN or infinity among the F32, F16, BF16 or F64 numbers in `bytes`.
pub(crate) fn has_non_finite(dtype: Dtype, bytes: &[u8]) -> bool {
    match dtype {
        Dtype::F32 => any(bytes.as_chunks().0, f32_is_not_finite),
        Dtype::BF16 => any(bytes.as_chunks().0, bf16_is_not_finite),
        Dtype::F16 => any(bytes.as_chunks().0, f16_is_not_finite),
        Dtype::F64 => any(bytes.as_chunks().0, f64_is_not_finite),
        _ => false,
    }
}

fn f32_is_not_finite(b: [u8; 4]) -> bool {
    u32::from_le_bytes(b) & 0x7f80_0000 == 0x7f80_0000
}

fn bf16_is_not_finite(b: [u8; 2]) -> bool {
    u16::from_le_bytes(b) & 0x7f80 == 0x7f80
}

fn f16_is_not_finite(b: [u8; 2]) -> bool {
    u16::from_le_bytes(b) & 0x7c00 == 0x7c00
}

fn f64_is_not_finite(b: [u8; 8]) -> bool {
    !f64::from_le_bytes(b).is_finite()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view<'a>(dtype: Dtype, shape: &'a [usize], bytes: &'a [u8]) -> TensorView<'a> {
        TensorView { name: "t", file: Path::new("f"), dtype, shape, bytes, order: Order::Rows }
    }

    #[test]
    fn conversions_equal_the_scalar_ones_and_mind_no_alignment() {
        let n = 3000;
        let bits: Vec<u16> = (0..n as u16).map(|i| i.wrapping_mul(21)).collect();
        let mut bytes = vec![0u8];
        bytes.extend(bits.iter().flat_map(|b| b.to_le_bytes()));
        let got = view(Dtype::F16, &[n], &bytes[1..]).to_f32().unwrap();
        assert!(got.iter().zip(&bits).all(|(g, &b)| g.to_bits() == f16::from_bits(b).to_f32().to_bits()));
        let got = view(Dtype::BF16, &[n], &bytes[1..]).to_f32().unwrap();
        // NaNs stay NaNs; that half also quiets them is of no matter.
        let same = |g: f32, b: u16| g.total_cmp(&half::bf16::from_bits(b).to_f32()).is_eq() || g.is_nan();
        assert!(got.iter().zip(&bits).all(|(&g, &b)| same(g, b)));
        let doubles: Vec<u8> = [1.5f64, -0.25].iter().flat_map(|d| d.to_le_bytes()).collect();
        assert_eq!(view(Dtype::F64, &[2], &doubles).to_f32().unwrap(), [1.5, -0.25]);
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::F64] {
            let values = [1.5f32, -0.25, 0.0, 3.0];
            let bytes = view(dtype, &[4], &[]).with_values(&values).unwrap();
            assert_eq!(view(dtype, &[4], &bytes).to_f32().unwrap(), values);
        }
        let error = view(Dtype::I8, &[1], &[1]).to_f32().unwrap_err();
        assert_eq!(error.to_string(), "tensor t in f is I8, but F32, F16, BF16 or F64 is needed here");
    }

    #[test]
    fn the_first_bad_value_is_found() {
        let n = 3 * TASK;
        let clean = vec![0x3c00u16; n];
        for (dtype, nan, infinity) in [(Dtype::F16, 0x7e00u16, 0xfc00u16), (Dtype::BF16, 0x7fc0, 0xff80)] {
            let mut values = clean.clone();
            let bytes: Vec<u8> = values.iter().flat_map(|b| b.to_le_bytes()).collect();
            assert_eq!(view(dtype, &[n], &bytes).first_non_finite(), None);
            values[2 * TASK + 7] = nan;
            values[TASK + 3] = infinity;
            let bytes: Vec<u8> = values.iter().flat_map(|b| b.to_le_bytes()).collect();
            assert_eq!(view(dtype, &[n], &bytes).first_non_finite(), Some(TASK + 3));
        }
        let bytes: Vec<u8> = [1.0f32, f32::INFINITY].iter().flat_map(|f| f.to_le_bytes()).collect();
        assert_eq!(view(Dtype::F32, &[2], &bytes).first_non_finite(), Some(1));
    }

    #[test]
    fn sizes_of_natural_limits() {
        assert_eq!(TensorSpec::new("scalar", Dtype::F32, []).bytes(), 4);
        assert_eq!(TensorSpec::new("empty", Dtype::F32, [0, 7]).bytes(), 0);
        assert_eq!(TensorSpec::new("fp4", Dtype::F4, [2, 3]).bytes(), 3);
        assert_eq!(TensorSpec::new("absurd", Dtype::F32, [usize::MAX, 3]).bytes(), usize::MAX);
    }
}
