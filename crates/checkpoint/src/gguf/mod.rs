//! GGUF: the single-file container of llama.cpp, read and written.
//!
//! A file is a header (metadata and tensor descriptions) and a data section in which every tensor starts at the running
//! sum of the padded sizes before it. [`parse`] checks all rules that llama.cpp's own loader checks, so a file that is
//! accepted here is one that it accepts; [`header`] lays a new file out. The bits inside of blocks are [`blocks`]'
//! matter, and names and settings of architectures [`names`]' and [`config`]'s.

mod blocks;
mod config;
mod names;
mod parse;
mod rows;
mod write;

pub(crate) use blocks::{decode, encode};
pub use config::query_scalar;
pub(crate) use config::{Factors, config};
pub use names::{always_f32, architecture, gguf_name, hf_name, interleaved_heads, lacks_one, model_types};
pub use parse::{Gguf, GgufTensor, parse};
pub(crate) use rows::deinterleave;
pub use rows::{interleave, interleaved_from};
pub use write::{GgufSpec, header};

use bitmill_scheme::BlockType;
use safetensors::Dtype;

/// First bytes of a file.
pub(crate) const MAGIC: &[u8; 4] = b"GGUF";
/// The version written; version 2 has the same layout.
pub(crate) const VERSION: u32 = 3;
/// Bytes tensors are aligned to unless `general.alignment` says otherwise.
pub(crate) const ALIGNMENT: usize = 32;
/// The loader's bound on a tensor's name, its terminating zero included.
pub(crate) const LONGEST_NAME: usize = 64;

/// Keys of a file that is one of several: its number, how many there are, and the tensors of all.
pub(crate) const SPLIT_NO: &str = "split.no";
pub(crate) const SPLIT_COUNT: &str = "split.count";
pub(crate) const SPLIT_TENSORS: &str = "split.tensors.count";

/// Tensors of divisors of the rotary frequencies, which folders have in their config: for all texts, for short ones and for
/// long ones.
pub const ROPE_FACTORS: [&str; 3] = ["rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"];

/// How the name of shard `no` (from 0) of `count` ends.
#[must_use]
pub fn shard_end(no: u64, count: u64) -> String {
    format!("-{:05}-of-{count:05}.gguf", no + 1)
}

/// What the elements of a tensor are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// Numbers of a type that safetensors has too.
    Dense(Dtype),
    /// Blocks of a type that bitmill reads and writes.
    Block(BlockType),
    /// Blocks of a type that only has a name here.
    Opaque,
}

/// A tensor type of the container.
#[derive(Debug)]
pub struct GgmlType {
    /// Its number in files.
    pub id: u32,
    /// Its name.
    pub name: &'static str,
    /// Elements of a block.
    pub block: usize,
    /// Bytes of a block.
    pub bytes: usize,
    /// How it is read.
    pub storage: Storage,
    /// The `general.file_type` of a model made of it.
    pub file_type: u32,
}

const fn dense(id: u32, name: &'static str, bytes: usize, dtype: Dtype, file_type: u32) -> GgmlType {
    GgmlType { id, name, block: 1, bytes, storage: Storage::Dense(dtype), file_type }
}

const fn block(id: u32, name: &'static str, len: usize, bytes: usize, kind: BlockType, file_type: u32) -> GgmlType {
    GgmlType { id, name, block: len, bytes, storage: Storage::Block(kind), file_type }
}

const fn opaque(id: u32, name: &'static str, block: usize, bytes: usize) -> GgmlType {
    GgmlType { id, name, block, bytes, storage: Storage::Opaque, file_type: 0 }
}

/// Every tensor type; numbers that are missing were withdrawn from the format.
pub static TYPES: &[GgmlType] = &[
    dense(0, "F32", 4, Dtype::F32, 0),
    dense(1, "F16", 2, Dtype::F16, 1),
    block(2, "Q4_0", 32, 18, BlockType::Q4_0, 2),
    block(3, "Q4_1", 32, 20, BlockType::Q4_1, 3),
    block(6, "Q5_0", 32, 22, BlockType::Q5_0, 8),
    block(7, "Q5_1", 32, 24, BlockType::Q5_1, 9),
    block(8, "Q8_0", 32, 34, BlockType::Q8_0, 7),
    opaque(9, "Q8_1", 32, 36),
    block(10, "Q2_K", 256, 84, BlockType::Q2K, 10),
    block(11, "Q3_K", 256, 110, BlockType::Q3K, 11),
    block(12, "Q4_K", 256, 144, BlockType::Q4K, 14),
    block(13, "Q5_K", 256, 176, BlockType::Q5K, 16),
    block(14, "Q6_K", 256, 210, BlockType::Q6K, 18),
    opaque(15, "Q8_K", 256, 292),
    block(16, "IQ2_XXS", 256, 66, BlockType::Iq2Xxs, 19),
    block(17, "IQ2_XS", 256, 74, BlockType::Iq2Xs, 20),
    block(18, "IQ3_XXS", 256, 98, BlockType::Iq3Xxs, 23),
    block(19, "IQ1_S", 256, 50, BlockType::Iq1S, 24),
    block(20, "IQ4_NL", 32, 18, BlockType::Iq4Nl, 25),
    block(21, "IQ3_S", 256, 110, BlockType::Iq3S, 26),
    block(22, "IQ2_S", 256, 82, BlockType::Iq2S, 28),
    block(23, "IQ4_XS", 256, 136, BlockType::Iq4Xs, 30),
    dense(24, "I8", 1, Dtype::I8, 0),
    dense(25, "I16", 2, Dtype::I16, 0),
    dense(26, "I32", 4, Dtype::I32, 0),
    dense(27, "I64", 8, Dtype::I64, 0),
    dense(28, "F64", 8, Dtype::F64, 0),
    block(29, "IQ1_M", 256, 56, BlockType::Iq1M, 31),
    dense(30, "BF16", 2, Dtype::BF16, 32),
    block(34, "TQ1_0", 256, 54, BlockType::Tq1_0, 36),
    block(35, "TQ2_0", 256, 66, BlockType::Tq2_0, 37),
    block(39, "MXFP4", 32, 17, BlockType::Mxfp4, 38),
    block(40, "NVFP4", 64, 36, BlockType::Nvfp4, 39),
    block(41, "Q1_0", 128, 18, BlockType::Q1_0, 40),
    block(42, "Q2_0", 64, 18, BlockType::Q2_0, 41),
];

/// The type of number `id`.
#[must_use]
pub fn by_id(id: u32) -> Option<&'static GgmlType> {
    TYPES.iter().find(|t| t.id == id)
}

/// The type that stores `storage`, which is not opaque.
#[must_use]
pub fn by_storage(storage: Storage) -> Option<&'static GgmlType> {
    TYPES.iter().find(|t| t.storage == storage && t.storage != Storage::Opaque)
}

/// A value of the metadata.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "the names are the types")]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    Text(String),
    /// The type of the elements, which an empty array has too, and the elements.
    Array(ValueType, Vec<Value>),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// Types of values, by their numbers in files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the types")]
#[repr(u32)]
pub enum ValueType {
    U8 = 0,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    Text,
    Array,
    U64,
    I64,
    F64,
}

/// Every type of value, by number.
pub(crate) const VALUE_TYPES: [ValueType; 13] = [
    ValueType::U8,
    ValueType::I8,
    ValueType::U16,
    ValueType::I16,
    ValueType::U32,
    ValueType::I32,
    ValueType::F32,
    ValueType::Bool,
    ValueType::Text,
    ValueType::Array,
    ValueType::U64,
    ValueType::I64,
    ValueType::F64,
];

impl Value {
    /// Its type.
    #[must_use]
    pub const fn kind(&self) -> ValueType {
        match self {
            Value::U8(_) => ValueType::U8,
            Value::I8(_) => ValueType::I8,
            Value::U16(_) => ValueType::U16,
            Value::I16(_) => ValueType::I16,
            Value::U32(_) => ValueType::U32,
            Value::I32(_) => ValueType::I32,
            Value::F32(_) => ValueType::F32,
            Value::Bool(_) => ValueType::Bool,
            Value::Text(_) => ValueType::Text,
            Value::Array(..) => ValueType::Array,
            Value::U64(_) => ValueType::U64,
            Value::I64(_) => ValueType::I64,
            Value::F64(_) => ValueType::F64,
        }
    }

    /// An array of strings.
    #[must_use]
    pub fn texts(items: impl IntoIterator<Item = String>) -> Self {
        Value::Array(ValueType::Text, items.into_iter().map(Value::Text).collect())
    }

    /// As a whole number that is not negative.
    #[must_use]
    pub fn unsigned(&self) -> Option<u64> {
        match *self {
            Value::U8(v) => Some(v.into()),
            Value::U16(v) => Some(v.into()),
            Value::U32(v) => Some(v.into()),
            Value::U64(v) => Some(v),
            Value::I8(v) => u64::try_from(v).ok(),
            Value::I16(v) => u64::try_from(v).ok(),
            Value::I32(v) => u64::try_from(v).ok(),
            Value::I64(v) => u64::try_from(v).ok(),
            _ => None,
        }
    }

    /// As a real number.
    #[must_use]
    pub fn real(&self) -> Option<f64> {
        match *self {
            Value::F32(v) => Some(v.into()),
            Value::F64(v) => Some(v),
            _ => None,
        }
    }

    /// As a string.
    #[must_use]
    pub fn text(&self) -> Option<&str> {
        match self {
            Value::Text(s) => Some(s),
            _ => None,
        }
    }

    /// As an array.
    #[must_use]
    pub fn items(&self) -> Option<&[Value]> {
        match self {
            Value::Array(_, items) => Some(items),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_agree_with_the_schemes_they_store() {
        let mut seen = 0;
        for t in TYPES {
            if let Storage::Block(kind) = t.storage {
                let form = kind.form();
                assert_eq!((t.block, t.bytes, t.name.to_lowercase().as_str()), (form.len, form.bytes, form.name));
                seen += 1;
            }
        }
        assert_eq!(seen, bitmill_scheme::BLOCKS.len());
        for (i, kind) in VALUE_TYPES.iter().enumerate() {
            assert_eq!(*kind as usize, i);
        }
    }
}
