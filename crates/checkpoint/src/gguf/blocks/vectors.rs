//! The bits of the i-quants with a codebook: an index for each vector of codes, and flags for each unit.

use super::{Field, Fields, NONE, Wide, get, put, straddling};
use bitmill_scheme::{BlockForm, BlockType, Codebook};

/// The fields of a type with a codebook.
pub(super) struct Vectors {
    book: &'static Codebook,
    /// Of the index of each vector.
    indices: Vec<Wide>,
    /// Of the flags of each unit.
    flags: Vec<Fields>,
}

impl Vectors {
    pub(super) fn new(form: &BlockForm, book: &'static Codebook) -> Self {
        Vectors {
            book,
            indices: (0..form.len / book.len).map(|i| index(form.kind, i)).collect(),
            flags: (0..form.len / book.unit).map(|i| flags(form.kind, i)).collect(),
        }
    }

    /// Codes of a valid [`bitmill_scheme::Quantized`] are in the codebook.
    pub(super) fn pack(&self, codes: &[u8], out: &mut [u8]) {
        for (f, vector) in self.indices.iter().zip(codes.chunks(self.book.len)) {
            put(out, f, self.book.index(vector).unwrap_or_default() as u32);
        }
        for (f, unit) in self.flags.iter().zip(codes.chunks(self.book.unit)) {
            put(out, f, self.book.stored_flags(unit).unwrap_or_default() as u32);
        }
    }

    /// An index of a field's width is one of the codebook's, so any bytes can be read.
    pub(super) fn unpack(&self, bytes: &[u8], codes: &mut [u8]) {
        for (f, vector) in self.indices.iter().zip(codes.chunks_mut(self.book.len)) {
            self.book.vector(get(bytes, f) as usize, vector);
        }
        for (f, unit) in self.flags.iter().zip(codes.chunks_mut(self.book.unit)) {
            self.book.set_flags(get(bytes, f) as usize, unit);
        }
    }

    /// Every field.
    #[cfg(test)]
    pub(super) fn fields(&self) -> impl Iterator<Item = &Field> {
        self.indices.iter().flatten().chain(self.flags.iter().flatten())
    }
}

const fn field(byte: usize, shift: usize, width: usize) -> Field {
    Field { byte, shift, width }
}

/// Fields of the index of vector `i`.
fn index(kind: BlockType, i: usize) -> Wide {
    let with = |byte: usize, [a, b]: Fields| [field(byte, 0, 8), a, b, NONE];
    let alone = |byte: usize| [field(byte, 0, 8), NONE, NONE, NONE];
    match kind {
        BlockType::Iq2Xxs => alone(2 + i / 4 * 8 + i % 4),
        BlockType::Iq2Xs => with(2 + 2 * i, [field(3 + 2 * i, 0, 1), NONE]),
        BlockType::Iq2S => with(2 + i, [field(66 + i / 4, i % 4 * 2, 2), NONE]),
        BlockType::Iq3Xxs => alone(2 + i),
        BlockType::Iq3S => with(2 + i, [field(66 + i / 8, i % 8, 1), NONE]),
        BlockType::Iq1S => with(2 + i, straddling(34 + i / 4 * 2, i % 4 * 3, 3)),
        BlockType::Iq1M => with(i, [field(32 + i / 2, i % 2 * 4, 3), NONE]),
        _ => [NONE; 4],
    }
}

/// Fields of the flags of unit `i`.
fn flags(kind: BlockType, i: usize) -> Fields {
    let single = |byte, shift, width| [field(byte, shift, width), NONE];
    match kind {
        BlockType::Iq2Xxs => straddling(2 + i / 4 * 8 + 4, i % 4 * 7, 7),
        BlockType::Iq2Xs => single(3 + 2 * i, 1, 7),
        BlockType::Iq2S => single(34 + i, 0, 8),
        BlockType::Iq3Xxs => straddling(66 + i / 4 * 4, i % 4 * 7, 7),
        BlockType::Iq3S => single(74 + i / 2, i % 2 * 4, 4),
        BlockType::Iq1M => single(32 + i / 2, i % 2 * 4 + 3, 1),
        _ => [NONE; 2],
    }
}
