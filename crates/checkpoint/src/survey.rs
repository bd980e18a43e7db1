//! What reading tensors once shows: fingerprints, and whether their numbers are finite.
//!
//! A fingerprint tells contents apart which were not made to be confused, at the speed of reading them. That of rows is their
//! XXH3 (128 bits), that of a tensor the XXH3 of those of its [pieces](TensorView::pieces), and that of a file the XXH3 of that
//! of its header and those of its tensors. So whoever works through a tensor piece by piece can take its fingerprint on the way.

use crate::TensorView;
use crate::tensor::has_non_finite;
use rayon::prelude::*;
use safetensors::Dtype;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use xxhash_rust::xxh3::xxh3_128;

/// Numbers of a piece, about: they stay in a cache between what is done with them. It decides fingerprints, so it is a constant.
const PIECE: usize = 1 << 15;
/// Pieces that one task reads, about.
const TASK: usize = 64;

/// What reading some rows, or a whole tensor, shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// It tells them apart from others.
    pub fingerprint: u128,
    /// Whether every F32, F16, BF16 or F64 number among them is finite.
    pub finite: bool,
}

impl Seen {
    /// Reads the `bytes` of rows of numbers of type `dtype`.
    #[must_use]
    pub fn of_rows(dtype: Dtype, bytes: &[u8]) -> Self {
        Seen { finite: !has_non_finite(dtype, bytes), ..Seen::of_numbers(bytes) }
    }

    /// Reads the `bytes` of rows whose numbers are known to be finite, or are looked at by who reads them.
    #[must_use]
    pub fn of_numbers(bytes: &[u8]) -> Self {
        Seen { fingerprint: xxh3_128(bytes), finite: true }
    }

    /// A tensor whose pieces were seen, in order.
    #[must_use]
    pub fn of_pieces(pieces: &[Seen]) -> Self {
        let hashes: Vec<[u8; 16]> = pieces.iter().map(|piece| piece.fingerprint.to_le_bytes()).collect();
        Seen { fingerprint: xxh3_128(hashes.as_flattened()), finite: pieces.iter().all(|piece| piece.finite) }
    }

    /// The fingerprint in digits.
    #[must_use]
    pub fn digits(&self) -> String {
        format!("{:032x}", self.fingerprint)
    }
}

impl TensorView<'_> {
    /// Rows of a piece of a matrix with so many columns.
    #[must_use]
    pub const fn piece_rows(columns: usize) -> usize {
        let rows = PIECE / if columns == 0 { 1 } else { columns };
        if rows == 0 { 1 } else { rows }
    }

    /// Places of its pieces in its bytes: a few whole rows each, as they lie.
    pub fn pieces(&self) -> impl IndexedParallelIterator<Item = Range<usize>> + use<> {
        let columns = self.shape.last().copied().unwrap_or(1);
        let rows = self.shape.iter().rev().skip(1).product::<usize>().max(1);
        let (size, row) = (self.bytes.len(), self.bytes.len().div_ceil(rows));
        // What lies in columns has more bytes than rows of its own.
        let step = (TensorView::piece_rows(columns) * row).max(1);
        (0..size.div_ceil(step)).into_par_iter().map(move |i| i * step..size.min((i + 1) * step))
    }

    /// Reads it once, by all threads.
    #[must_use]
    pub fn survey(&self) -> Seen {
        let pieces = self.pieces().with_min_len(TASK).map(|at| Seen::of_rows(self.dtype, &self.bytes[at]));
        Seen::of_pieces(&pieces.collect::<Vec<_>>())
    }
}

/// What reading a file once shows.
#[derive(Debug, Clone)]
pub struct Survey<'a> {
    /// The file.
    pub file: &'a Path,
    head: u128,
    /// In the order of the file; `None` for those that are read later.
    tensors: Vec<(&'a str, Option<Seen>)>,
}

impl<'a> Survey<'a> {
    pub(crate) fn of_head(file: &'a Path, head: &[u8]) -> Self {
        Survey { file, head: xxh3_128(head), tensors: Vec::new() }
    }

    pub(crate) fn add(&mut self, tensor: &'a str, seen: Option<Seen>) {
        self.tensors.push((tensor, seen));
    }

    /// Whether everything that was read is finite; where not, a closer look says what is.
    #[must_use]
    pub fn finite(&self) -> bool {
        self.tensors.iter().all(|(_, seen)| seen.as_ref().is_none_or(|seen| seen.finite))
    }

    /// The fingerprint of the file, or what of it is known: of the tensors that were left out, those in `later` count, which are
    /// digits by name.
    #[must_use]
    pub fn fingerprint(&self, later: &BTreeMap<String, String>) -> String {
        let digits = |(name, seen): &(&str, Option<Seen>)| match seen {
            Some(seen) => Some(seen.digits()),
            None => later.get(*name).cloned(),
        };
        let all: String = self.tensors.iter().filter_map(digits).collect();
        format!("xxh3:{:032x}", xxh3_128(format!("{:032x}{all}", self.head).as_bytes()))
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
        let seen = shard.tensor("b").unwrap().survey();
        assert_eq!(partly.fingerprint(&BTreeMap::from([("b".to_owned(), seen.digits())])), whole);
    }
}
