//! Writing a header: metadata, then every tensor at the running sum of the padded sizes before it.

use super::{ALIGNMENT, GgmlType, LONGEST_NAME, MAGIC, VERSION, Value};
use crate::Error;
use std::collections::BTreeSet;

/// A tensor to be written.
#[derive(Debug, Clone)]
pub struct GgufSpec {
    /// Its name in the file.
    pub name: String,
    /// Its type.
    pub kind: &'static GgmlType,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
}

impl GgufSpec {
    /// Its size in bytes, without padding.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() / self.kind.block * self.kind.bytes
    }
}

/// The header of a file with `metadata` and `tensors` in this order, padded up to the data; the offset of every tensor
/// in the file; and the file's size.
///
/// # Errors
/// [`Error::Layout`] for what a loader would refuse: a name that is too long or there twice, rows that blocks do not
/// fill, more than four dimensions.
pub fn header(metadata: &[(String, Value)], tensors: &[GgufSpec]) -> Result<(Vec<u8>, Vec<u64>, u64), Error> {
    let mut out = Vec::new();
    out.extend(MAGIC);
    out.extend(VERSION.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    let mut keys = BTreeSet::new();
    for (key, value) in metadata {
        if !keys.insert(key) {
            return Err(Error::Layout { tensor: key.clone(), reason: "a metadata key given twice".into() });
        }
        text(&mut out, key);
        out.extend((value.kind() as u32).to_le_bytes());
        put(&mut out, value);
    }
    let (mut names, mut offset, mut offsets) = (BTreeSet::new(), 0u64, Vec::new());
    for t in tensors {
        let wrong = |reason: String| Err(Error::Layout { tensor: t.name.clone(), reason });
        if t.name.len() >= LONGEST_NAME {
            return wrong(format!("GGUF names have at most {} bytes", LONGEST_NAME - 1));
        }
        if !names.insert(&t.name) {
            return wrong("named twice".into());
        }
        if t.shape.is_empty() || t.shape.len() > 4 || t.shape.contains(&0) {
            return wrong(format!("GGUF has no tensors of shape {:?}", t.shape));
        }
        let row = t.shape[t.shape.len() - 1];
        if !row.is_multiple_of(t.kind.block) {
            return wrong(format!("rows of {row} are no multiple of {}'s {}", t.kind.name, t.kind.block));
        }
        text(&mut out, &t.name);
        out.extend((t.shape.len() as u32).to_le_bytes());
        t.shape.iter().rev().for_each(|&d| out.extend((d as u64).to_le_bytes()));
        out.extend(t.kind.id.to_le_bytes());
        out.extend(offset.to_le_bytes());
        offsets.push(offset);
        offset += (t.bytes() as u64).next_multiple_of(ALIGNMENT as u64);
    }
    if !tensors.is_empty() {
        out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
    }
    let data = out.len() as u64;
    offsets.iter_mut().for_each(|o| *o += data);
    Ok((out, offsets, data + offset))
}

fn text(out: &mut Vec<u8>, s: &str) {
    out.extend((s.len() as u64).to_le_bytes());
    out.extend(s.as_bytes());
}

fn put(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::U8(v) => out.push(*v),
        Value::I8(v) => out.extend(v.to_le_bytes()),
        Value::U16(v) => out.extend(v.to_le_bytes()),
        Value::I16(v) => out.extend(v.to_le_bytes()),
        Value::U32(v) => out.extend(v.to_le_bytes()),
        Value::I32(v) => out.extend(v.to_le_bytes()),
        Value::F32(v) => out.extend(v.to_le_bytes()),
        Value::Bool(v) => out.push(u8::from(*v)),
        Value::Text(v) => text(out, v),
        Value::U64(v) => out.extend(v.to_le_bytes()),
        Value::I64(v) => out.extend(v.to_le_bytes()),
        Value::F64(v) => out.extend(v.to_le_bytes()),
        Value::Array(kind, items) => {
            out.extend((*kind as u32).to_le_bytes());
            out.extend((items.len() as u64).to_le_bytes());
            items.iter().for_each(|v| put(out, v));
        }
    }
}
