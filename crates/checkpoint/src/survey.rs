//! What reading tensors once shows: fingerprints, and whether their numbers are finite.
//!
//! A fingerprint tells contents apart which were not made to be confused, at the speed of reading them. That of rows is their
//! XXH3 (128 bits), that of a tensor the XXH3 of those of its pieces, [a few rows](TensorView::piece_rows) each, and that of a file the XXH3 of that
//! of its header and those of its tensors. So whoever works through a tensor piece by piece can take its fingerprint on the way.

use crate::TensorView;
use crate::tensor::has_non_finite;
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::fmt::{self, Display, Formatter};
use std::path::Path;
use xxhash_rust::xxh3::xxh3_128;

/// Numbers of a piece, about: they stay in a cache between what is done with them. It decides fingerprints, so it is a constant.
const PIECE: usize = 1 << 15;
/// Pieces that one task reads, about.
const TASK: usize = 64;

/// Tells contents apart; shown as 32 digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint(u128);

impl Fingerprint {
    /// Of the bytes of some rows.
    #[must_use]
    pub fn of_rows(bytes: &[u8]) -> Self {
        Fingerprint(xxh3_128(bytes))
    }

    /// Of a tensor with these pieces, in order.
    #[must_use]
    pub fn of_pieces(pieces: &[Fingerprint]) -> Self {
        let hashes: Vec<[u8; 16]> = pieces.iter().map(|piece| piece.0.to_le_bytes()).collect();
        Fingerprint(xxh3_128(hashes.as_flattened()))
    }
}

impl Display for Fingerprint {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl TensorView<'_> {
    /// Rows of a piece of a matrix with so many columns.
    #[must_use]
    pub const fn piece_rows(columns: usize) -> usize {
        let rows = PIECE / if columns == 0 { 1 } else { columns };
        if rows == 0 { 1 } else { rows }
    }

    /// What tells it apart.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        self.survey().0
    }

    /// Reads it once, by all threads, piece by piece: its fingerprint, and whether every F32, F16, BF16 or F64 number in it is
    /// finite.
    pub(crate) fn survey(&self) -> (Fingerprint, bool) {
        let columns = self.shape.last().copied().unwrap_or(1);
        let rows = self.shape.iter().rev().skip(1).product::<usize>().max(1);
        // What lies in columns has more bytes than rows of its own.
        let step = (TensorView::piece_rows(columns) * self.bytes.len().div_ceil(rows)).max(1);
        let pieces = self.bytes.par_chunks(step).with_min_len(TASK);
        let seen = pieces.map(|piece| (Fingerprint::of_rows(piece), !has_non_finite(self.dtype, piece)));
        let (pieces, finite): (Vec<Fingerprint>, Vec<bool>) = seen.unzip();
        (Fingerprint::of_pieces(&pieces), finite.iter().all(|&finite| finite))
    }
}

/// What reading a file once shows.
#[derive(Debug, Clone)]
pub struct Survey<'a> {
    /// The file.
    pub file: &'a Path,
    head: Fingerprint,
    /// In the order of the file; `None` for those that are read later.
    tensors: Vec<(&'a str, Option<Fingerprint>)>,
    finite: bool,
}

impl<'a> Survey<'a> {
    pub(crate) fn of_head(file: &'a Path, head: &[u8]) -> Self {
        Survey { file, head: Fingerprint::of_rows(head), tensors: Vec::new(), finite: true }
    }

    /// Reads the next tensors, all at once, but for those that are read later.
    pub(crate) fn add(&mut self, tensors: Vec<(&'a str, Option<TensorView<'_>>)>) {
        let survey = |(name, tensor): (&'a str, Option<TensorView<'_>>)| (name, tensor.map(|tensor| tensor.survey()));
        let seen: Vec<_> = tensors.into_par_iter().map(survey).collect();
        self.finite &= seen.iter().all(|(_, seen)| seen.is_none_or(|(_, finite)| finite));
        self.tensors.extend(seen.into_iter().map(|(name, seen)| (name, seen.map(|(fingerprint, _)| fingerprint))));
    }

    /// Whether everything that was read is finite; where not, a closer look says what is.
    #[must_use]
    pub fn finite(&self) -> bool {
        self.finite
    }

    /// The fingerprint of the file, or what of it is known: of the tensors that were left out, those in `later` count, which are
    /// digits by name.
    #[must_use]
    pub fn fingerprint(&self, later: &BTreeMap<String, String>) -> String {
        let digits = |(name, known): &(&str, Option<Fingerprint>)| match known {
            Some(known) => Some(known.to_string()),
            None => later.get(*name).cloned(),
        };
        let all: String = self.tensors.iter().filter_map(digits).collect();
        format!("xxh3:{}", Fingerprint::of_rows(format!("{}{all}", self.head).as_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shard::Shard;

    /// A file of two tensors, the second of bfloat16, which begins at an odd place and has several pieces.
    fn file(second: &[u16], columns: usize) -> Vec<u8> {
        let (first, bytes) = (5, 5 + 2 * second.len());
        let header = format!(
            "{{\"a\":{{\"dtype\":\"U8\",\"shape\":[{first}],\"data_offsets\":[0,{first}]}},\
             \"b\":{{\"dtype\":\"BF16\",\"shape\":[{},{columns}],\"data_offsets\":[{first},{bytes}]}}}}",
            second.len() / columns
        );
        let mut out = (header.len() as u64).to_le_bytes().to_vec();
        out.extend(header.as_bytes());
        out.extend([0xff; 5]);
        out.extend(second.iter().flat_map(|b| b.to_le_bytes()));
        out
    }

    #[test]
    fn a_survey_sees_every_number_and_every_byte() {
        let mut numbers = vec![0x3f80u16; 100 * 1000];
        let survey = |numbers: &[u16]| {
            let shard = Shard::in_memory("x".into(), file(numbers, 1000)).unwrap();
            let survey = shard.survey(&|_| false);
            (survey.finite(), survey.fingerprint(&BTreeMap::new()))
        };
        let (finite, start) = survey(&numbers);
        assert!(finite, "bytes that are no numbers may be anything");
        // The first, the last, and those about where a piece ends.
        for at in [0, 31_999, 32_000, 63_999, 64_000, 99_999] {
            for (bits, is_finite) in [(0xff80, false), (0x3f81, true)] {
                numbers[at] = bits;
                let (finite, other) = survey(&numbers);
                assert_eq!(finite, is_finite, "{at}");
                assert_ne!(other, start, "{at}");
                numbers[at] = 0x3f80;
            }
        }
    }

    #[test]
    fn what_is_read_later_counts_once_it_is_known() {
        let shard = Shard::in_memory("x".into(), file(&[0x3f80; 4000], 4)).unwrap();
        let whole = shard.survey(&|_| false).fingerprint(&BTreeMap::new());
        let partly = shard.survey(&|name| name == "b");
        assert_ne!(partly.fingerprint(&BTreeMap::new()), whole);
        let known = shard.tensor("b").unwrap().fingerprint().to_string();
        assert_eq!(partly.fingerprint(&BTreeMap::from([("b".to_owned(), known)])), whole);
    }
}
