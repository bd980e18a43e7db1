//! Reading a header: every rule of the loader, on bytes nobody vouches for.

use super::{ALIGNMENT, GgmlType, LONGEST_NAME, MAGIC, VALUE_TYPES, VERSION, Value, ValueType, by_id};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// The loader's bound on a key.
const LONGEST_KEY: usize = 65_535;

/// A parsed header.
#[derive(Debug)]
pub struct Gguf {
    /// The metadata, by key.
    pub metadata: BTreeMap<String, Value>,
    /// The tensors, in the order of the file.
    pub tensors: Vec<GgufTensor>,
}

/// One tensor of a file.
#[derive(Debug, Clone)]
pub struct GgufTensor {
    /// Its name in the file.
    pub name: String,
    /// Its type.
    pub kind: &'static GgmlType,
    /// Dimensions, outermost first as everywhere in bitmill; the file has them the other way round.
    pub shape: Vec<usize>,
    /// Where its bytes lie in the file.
    pub range: Range<usize>,
}

impl Gguf {
    /// The value of `key`.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// The architecture it says it is of.
    #[must_use]
    pub fn architecture(&self) -> &str {
        self.get("general.architecture").and_then(Value::text).unwrap_or("(none)")
    }

    /// The tensor `name`, as the file calls it.
    #[must_use]
    pub fn tensor(&self, name: &str) -> Option<&GgufTensor> {
        self.tensors.iter().find(|t| t.name == name)
    }
}

/// Parses the header of the file `bytes`.
///
/// # Errors
/// A sentence on the first rule it breaks. Nothing larger than the file is ever allocated.
pub fn parse(bytes: &[u8]) -> Result<Gguf, String> {
    let mut reader = Reader { bytes, at: 0 };
    if reader.take(4)? != MAGIC {
        return Err("it does not begin with GGUF".into());
    }
    let version = reader.u32()?;
    if !matches!(version, 2 | VERSION) {
        let swapped = matches!(version.swap_bytes(), 2 | VERSION);
        let order = if swapped { "its numbers are big-endian" } else { "versions 2 and 3 are read" };
        return Err(format!("version {version}: {order}"));
    }
    let (tensors, keys) = (reader.u64()?, reader.u64()?);
    // A key takes 13 bytes at least, a tensor 24.
    let (tensors, keys) = (reader.count(tensors, 24, "tensors")?, reader.count(keys, 13, "metadata keys")?);
    let mut metadata = BTreeMap::new();
    for _ in 0..keys {
        let key = reader.text("a metadata key")?;
        if key.is_empty() || key.len() > LONGEST_KEY {
            return Err(format!("a metadata key has {} bytes", key.len()));
        }
        let value = reader.value(&key)?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(format!("the metadata key {key} is there twice"));
        }
    }
    let alignment = match metadata.get("general.alignment") {
        None => ALIGNMENT,
        Some(Value::U32(a)) if a.is_power_of_two() => *a as usize,
        Some(other) => return Err(format!("general.alignment is {other:?}, not a u32 power of two")),
    };
    let infos = (0..tensors).map(|_| reader.info()).collect::<Result<Vec<_>, _>>()?;
    let tensors = place(infos, reader.at, alignment, bytes.len())?;
    Ok(Gguf { metadata, tensors })
}

/// A tensor's description as the file has it.
struct Info {
    name: String,
    kind: &'static GgmlType,
    shape: Vec<usize>,
    bytes: usize,
    offset: u64,
}

/// Offsets are the running sum of padded sizes; all of it lies in the file.
fn place(infos: Vec<Info>, header: usize, alignment: usize, size: usize) -> Result<Vec<GgufTensor>, String> {
    let too_large = || "its sizes are beyond any file".to_owned();
    let pad = |n: usize| n.checked_next_multiple_of(alignment).ok_or_else(too_large);
    let data = if infos.is_empty() { header } else { pad(header)? };
    let (mut offset, mut names, mut tensors) = (0usize, BTreeSet::new(), Vec::with_capacity(infos.len()));
    for info in infos {
        let name = info.name;
        if !names.insert(name.clone()) {
            return Err(format!("tensor {name} is there twice"));
        }
        if info.offset != offset as u64 {
            return Err(format!("tensor {name} lies at offset {} where {offset} is expected", info.offset));
        }
        let from = data.checked_add(offset).ok_or_else(too_large)?;
        let to = from.checked_add(info.bytes).ok_or_else(too_large)?;
        if to > size {
            return Err(format!("tensor {name} ends at byte {to} of {size}"));
        }
        offset = offset.checked_add(pad(info.bytes)?).ok_or_else(too_large)?;
        tensors.push(GgufTensor { name, kind: info.kind, shape: info.shape, range: from..to });
    }
    Ok(tensors)
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], String> {
        let end = self.at.checked_add(n).filter(|&e| e <= self.bytes.len()).ok_or("it ends inside its header")?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    fn u32(&mut self) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A number of things that take `least` bytes each, which must fit into what is left.
    fn count(&self, n: u64, least: usize, what: &str) -> Result<usize, String> {
        let left = (self.bytes.len() - self.at) / least;
        usize::try_from(n).ok().filter(|&n| n <= left).ok_or_else(|| format!("it claims {n} {what} in {left} places"))
    }

    fn text(&mut self, what: &str) -> Result<String, String> {
        let length = self.u64()?;
        let length = self.count(length, 1, "bytes of text")?;
        let bytes = self.take(length)?;
        Ok(std::str::from_utf8(bytes).map_err(|_| format!("{what} is not UTF-8"))?.to_owned())
    }

    fn value_type(&mut self, key: &str) -> Result<ValueType, String> {
        let number = self.u32()?;
        let known = usize::try_from(number).ok().and_then(|n| VALUE_TYPES.get(n).copied());
        known.ok_or_else(|| format!("{key} has a value of the unknown type {number}"))
    }

    fn value(&mut self, key: &str) -> Result<Value, String> {
        let kind = self.value_type(key)?;
        if kind != ValueType::Array {
            return self.scalar(kind, key);
        }
        let element = self.value_type(key)?;
        if element == ValueType::Array {
            return Err(format!("{key} is an array of arrays"));
        }
        let count = self.u64()?;
        let count = self.count(count, width(element), "array elements")?;
        let items = (0..count).map(|_| self.scalar(element, key)).collect::<Result<_, _>>()?;
        Ok(Value::Array(element, items))
    }

    fn scalar(&mut self, kind: ValueType, key: &str) -> Result<Value, String> {
        Ok(match kind {
            ValueType::U8 => Value::U8(self.array::<1>()?[0]),
            ValueType::I8 => Value::I8(i8::from_le_bytes(self.array()?)),
            ValueType::U16 => Value::U16(u16::from_le_bytes(self.array()?)),
            ValueType::I16 => Value::I16(i16::from_le_bytes(self.array()?)),
            ValueType::U32 => Value::U32(self.u32()?),
            ValueType::I32 => Value::I32(i32::from_le_bytes(self.array()?)),
            ValueType::F32 => Value::F32(f32::from_le_bytes(self.array()?)),
            ValueType::Bool => Value::Bool(self.array::<1>()?[0] != 0),
            ValueType::Text => Value::Text(self.text(key)?),
            ValueType::U64 => Value::U64(self.u64()?),
            ValueType::I64 => Value::I64(i64::from_le_bytes(self.array()?)),
            ValueType::F64 => Value::F64(f64::from_le_bytes(self.array()?)),
            ValueType::Array => return Err(format!("{key} is an array of arrays")),
        })
    }

    fn info(&mut self) -> Result<Info, String> {
        let name = self.text("a tensor's name")?;
        if name.len() >= LONGEST_NAME {
            return Err(format!(
                "the tensor name {name} has {} bytes, the loader takes {}",
                name.len(),
                LONGEST_NAME - 1
            ));
        }
        let dimensions = self.u32()?;
        if dimensions > 4 {
            return Err(format!("tensor {name} has {dimensions} dimensions"));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            shape.push(usize::try_from(self.u64()?).map_err(|_| format!("tensor {name} is larger than any file"))?);
        }
        let id = self.u32()?;
        let kind = by_id(id).ok_or_else(|| format!("tensor {name} is of the unknown type {id}"))?;
        let row = shape.first().copied().unwrap_or(1);
        if !row.is_multiple_of(kind.block) {
            let (block, type_name) = (kind.block, kind.name);
            return Err(format!("tensor {name} has rows of {row}, no multiple of {type_name}'s {block}"));
        }
        let elements = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).filter(|&n| n <= i64::MAX as usize);
        let bytes = elements.and_then(|n| (n / kind.block).checked_mul(kind.bytes));
        let bytes = bytes.ok_or_else(|| format!("tensor {name} is larger than any file"))?;
        let offset = self.u64()?;
        shape.reverse();
        Ok(Info { name, kind, shape, bytes, offset })
    }
}

/// Bytes that a value of this type takes at least.
fn width(kind: ValueType) -> usize {
    match kind {
        ValueType::U8 | ValueType::I8 | ValueType::Bool => 1,
        ValueType::U16 | ValueType::I16 => 2,
        ValueType::U32 | ValueType::I32 | ValueType::F32 => 4,
        ValueType::Text | ValueType::Array | ValueType::U64 | ValueType::I64 | ValueType::F64 => 8,
    }
}
