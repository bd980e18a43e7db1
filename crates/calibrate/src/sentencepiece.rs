//! SentencePiece `tokenizer.model` files, read as protocol buffers and rewritten as the equivalent `tokenizer.json`.
//!
//! Byte-pair models carry pieces with scores instead of merges: every way to split a piece into two pieces of the
//! vocabulary is a merge, and merges rank by the score of what they produce. Models that normalise text by a character
//! map are refused rather than approximated.

use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Piece types of the SentencePiece schema.
const UNKNOWN: u64 = 2;
const CONTROL: u64 = 3;
/// What text is cut at before anything is merged.
const USER_DEFINED: u64 = 4;
const BYTE: u64 = 6;
const UNIGRAM: u64 = 1;
/// The type of byte-pair models.
pub(crate) const BYTE_PAIRS: u64 = 2;

/// A piece of the vocabulary.
pub(crate) struct Piece {
    pub(crate) text: String,
    pub(crate) score: f32,
    pub(crate) kind: u64,
}

/// What a model file says that matters for encoding.
pub(crate) struct SentencePiece {
    pub(crate) pieces: Vec<Piece>,
    /// Unigram or byte pairs.
    pub(crate) kind: u64,
    /// Whether a space is put before a text.
    pub(crate) dummy_prefix: bool,
}

/// One field of a protocol-buffer message.
enum Field<'a> {
    Varint(u64),
    Bytes(&'a [u8]),
    Fixed32(u32),
    Other,
}

/// The `tokenizer.json` equal to a SentencePiece model.
///
/// # Errors
/// A sentence on what is malformed or unsupported.
pub fn to_tokenizer_json(model: &[u8]) -> Result<Value, String> {
    parse(model)?.to_tokenizer_json()
}

/// Reads a model file.
///
/// # Errors
/// A sentence on what is malformed or unsupported.
pub(crate) fn parse(model: &[u8]) -> Result<SentencePiece, String> {
    let (mut pieces, mut kind, mut dummy_prefix, mut extra_spaces, mut map) = (Vec::new(), UNIGRAM, true, true, false);
    for_each_field(model, |number, field| {
        match (number, field) {
            (1, Field::Bytes(bytes)) => pieces.push(piece(bytes)?),
            (2, Field::Bytes(trainer)) => for_each_field(trainer, |n, f| {
                if let (3, Field::Varint(v)) = (n, f) {
                    kind = v;
                }
                Ok(())
            })?,
            (3, Field::Bytes(normalizer)) => for_each_field(normalizer, |n, f| {
                match (n, f) {
                    (2, Field::Bytes(b)) => map = !b.is_empty(),
                    (3, Field::Varint(v)) => dummy_prefix = v != 0,
                    (4, Field::Varint(v)) => extra_spaces = v != 0,
                    _ => {}
                }
                Ok(())
            })?,
            _ => {}
        }
        Ok(())
    })?;
    if pieces.is_empty() {
        return Err("it holds no pieces".into());
    }
    if map || extra_spaces {
        return Err("it normalises text by a character map or removes spaces".into());
    }
    Ok(SentencePiece { pieces, kind, dummy_prefix })
}

impl Piece {
    /// Its text as it is looked for: what text is cut at is found before spaces are written otherwise.
    fn plain(&self) -> String {
        if self.kind == USER_DEFINED { self.text.replace('▁', " ") } else { self.text.clone() }
    }
}

impl SentencePiece {
    /// The equal `tokenizer.json`.
    ///
    /// # Errors
    /// A sentence on what is contradictory or unsupported.
    pub(crate) fn to_tokenizer_json(&self) -> Result<Value, String> {
        let mut normalizers = vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})];
        if self.dummy_prefix {
            normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
        }
        let added: Vec<Value> = (self.pieces.iter().enumerate())
            .filter(|(_, p)| matches!(p.kind, CONTROL | UNKNOWN | USER_DEFINED))
            .map(|(id, p)| {
                json!({"id": id, "content": p.plain(), "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": p.kind != USER_DEFINED})
            })
            .collect();
        Ok(json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
            "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "pre_tokenizer": null, "post_processor": null, "decoder": null,
            "model": vocabulary(&self.pieces, self.kind)?,
        }))
    }
}

fn vocabulary(pieces: &[Piece], kind: u64) -> Result<Value, String> {
    let unknown = pieces.iter().position(|p| p.kind == UNKNOWN).ok_or("it has no unknown piece")?;
    let byte_fallback = pieces.iter().any(|p| p.kind == BYTE);
    match kind {
        BYTE_PAIRS => {
            let ids: BTreeMap<String, usize> = pieces.iter().enumerate().map(|(id, p)| (p.plain(), id)).collect();
            if ids.len() != pieces.len() {
                return Err("two pieces have the same text".into());
            }
            Ok(json!({
                "type": "BPE", "dropout": null, "unk_token": pieces[unknown].text, "fuse_unk": true,
                "continuing_subword_prefix": null, "end_of_word_suffix": null, "ignore_merges": false,
                "byte_fallback": byte_fallback, "vocab": ids, "merges": merges(pieces, &ids),
            }))
        }
        UNIGRAM => {
            let vocab: Vec<(&str, f32)> = pieces.iter().map(|p| (p.text.as_str(), p.score)).collect();
            Ok(json!({"type": "Unigram", "unk_id": unknown, "byte_fallback": byte_fallback, "vocab": vocab}))
        }
        other => Err(format!("model type {other} is neither unigram (1) nor byte pairs (2)")),
    }
}

/// Every split of every piece into two pieces, best-scored product first.
fn merges(pieces: &[Piece], ids: &BTreeMap<String, usize>) -> Vec<[String; 2]> {
    let merged = |p: &&Piece| !matches!(p.kind, CONTROL | UNKNOWN | USER_DEFINED | BYTE);
    let part = |text: &str| ids.get(text).copied().filter(|&id| pieces[id].kind != USER_DEFINED);
    let mut found: Vec<(f32, usize, usize, [String; 2])> = Vec::new();
    for p in pieces.iter().filter(merged) {
        for (at, _) in p.text.char_indices().skip(1) {
            let (left, right) = p.text.split_at(at);
            if let (Some(l), Some(r)) = (part(left), part(right)) {
                found.push((p.score, l, r, [left.into(), right.into()]));
            }
        }
    }
    found.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    found.into_iter().map(|f| f.3).collect()
}

fn piece(bytes: &[u8]) -> Result<Piece, String> {
    let mut p = Piece { text: String::new(), score: 0.0, kind: 1 };
    for_each_field(bytes, |number, field| {
        match (number, field) {
            (1, Field::Bytes(b)) => p.text = std::str::from_utf8(b).map_err(|_| "a piece is not UTF-8")?.into(),
            (2, Field::Fixed32(v)) => p.score = f32::from_bits(v),
            (3, Field::Varint(v)) => p.kind = v,
            _ => {}
        }
        Ok(())
    })?;
    if p.score.is_nan() { Err("a piece has no number for a score".into()) } else { Ok(p) }
}

fn for_each_field<'a>(
    mut rest: &'a [u8],
    mut visit: impl FnMut(u64, Field<'a>) -> Result<(), String>,
) -> Result<(), String> {
    while !rest.is_empty() {
        let key = varint(&mut rest)?;
        let field = match key & 7 {
            0 => Field::Varint(varint(&mut rest)?),
            1 => take(&mut rest, 8).map(|_| Field::Other)?,
            2 => {
                let length = varint(&mut rest)?;
                Field::Bytes(take(&mut rest, usize::try_from(length).unwrap_or(usize::MAX))?)
            }
            5 => {
                let b = take(&mut rest, 4)?;
                Field::Fixed32(u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            }
            wire => return Err(format!("wire type {wire} does not exist")),
        };
        visit(key >> 3, field)?;
    }
    Ok(())
}

fn take<'a>(rest: &mut &'a [u8], n: usize) -> Result<&'a [u8], String> {
    let (head, tail) = rest.split_at_checked(n).ok_or("it ends inside a field")?;
    *rest = tail;
    Ok(head)
}

fn varint(rest: &mut &[u8]) -> Result<u64, String> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let byte = take(rest, 1)?[0];
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Ok(value);
        }
    }
    Err("a number has more than 64 bits".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = to_tokenizer_json(&bytes);
        }

        #[test]
        fn damaged_models_never_panic(at in 0usize..127_843, value: u8, cut in 0usize..127_843) {
            static MODEL: &[u8] = include_bytes!("../../../models/books-10m/tokenizer.model");
            let head = &mut MODEL[..4000.min(cut)].to_vec();
            if let Some(b) = head.get_mut(at % 4000) {
                *b = value;
            }
            let _ = to_tokenizer_json(head);
        }
    }
}
