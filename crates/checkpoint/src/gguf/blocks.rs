//! The bits of a block: where each code, each integer and each real number of a block lies.
//!
//! A code is one or two bit fields of the block's bytes, and so is an integer of a sub-block; packing and unpacking read
//! one table of fields, so they are inverse by construction. Types with a codebook have fields for the index of each
//! vector and for the flags of each unit instead. TQ1_0 alone packs base-3 digits and is written out below.

mod plain;
mod vectors;

use bitmill_scheme::{BlockForm, BlockType, Quantized, Scheme};
use half::f16;
use rayon::prelude::*;
use std::sync::LazyLock;
use vectors::Vectors;

/// Weights of a task. What a caller holds in its cache is one.
const TASK: usize = 1 << 15;

/// Some bits of a block's bytes.
#[derive(Clone, Copy)]
struct Field {
    byte: usize,
    shift: usize,
    width: usize,
}

/// Low bits first; a second field of width zero is none.
type Fields = [Field; 2];
/// As [`Fields`], for what has more bits.
type Wide = [Field; 4];

const NONE: Field = Field { byte: 0, shift: 0, width: 0 };

const fn one(byte: usize, shift: usize, width: usize) -> Fields {
    [Field { byte, shift, width }, NONE]
}

const fn two(a: (usize, usize, usize), b: (usize, usize, usize)) -> Fields {
    [Field { byte: a.0, shift: a.1, width: a.2 }, Field { byte: b.0, shift: b.1, width: b.2 }]
}

/// The fields of a type, worked out once per call.
struct Layout {
    kind: BlockType,
    bytes: usize,
    reals: Vec<Wide>,
    integers: Vec<Fields>,
    codes: Vec<Fields>,
    /// In place of `codes`, where there is a codebook.
    vectors: Option<Vectors>,
}

impl Layout {
    fn new(form: &BlockForm) -> Self {
        let vectors = form.codebook().map(|book| Vectors::new(form, book));
        Layout {
            kind: form.kind,
            bytes: form.bytes,
            reals: (0..form.reals()).map(|i| real(form.kind, i)).collect(),
            integers: (0..form.integers()).map(|i| integer(form.kind, i)).collect(),
            codes: if vectors.is_some() { vec![] } else { (0..form.len).map(|e| code(form.kind, e)).collect() },
            vectors,
        }
    }

    /// What the format stores in place of a code: 8-bit codes are signed there.
    fn code_mask(&self) -> u8 {
        if self.kind == BlockType::Q8_0 { 0x80 } else { 0 }
    }

    fn integer_mask(&self) -> u8 {
        if self.kind == BlockType::Q6K { 0x80 } else { 0 }
    }

    fn pack(&self, codes: &[u8], reals: &[f32], integers: &[u8], out: &mut [u8]) {
        if let Some(vectors) = &self.vectors {
            vectors.pack(codes, out);
        } else if !pack_lanes(self.kind, codes, out) {
            for (f, &c) in self.codes.iter().zip(codes) {
                put(out, f, u32::from(c ^ self.code_mask()));
            }
        }
        for (f, &i) in self.integers.iter().zip(integers) {
            put(out, f, u32::from(i ^ self.integer_mask()));
        }
        for (f, &r) in self.reals.iter().zip(reals) {
            let [low, high, rest, _] = f;
            match rest.width {
                0 => [out[low.byte], out[high.byte]] = half_bits(r).to_le_bytes(),
                _ => put(out, f, u32::from(half_bits(r))),
            }
        }
    }

    fn unpack(&self, bytes: &[u8], codes: &mut [u8], reals: &mut [f32], integers: &mut [u8]) {
        if self.kind == BlockType::Tq1_0 {
            unpack_ternary(bytes, codes);
        } else if let Some(vectors) = &self.vectors {
            vectors.unpack(bytes, codes);
        } else {
            for (f, c) in self.codes.iter().zip(codes) {
                *c = get(bytes, f) as u8 ^ self.code_mask();
            }
        }
        for (f, i) in self.integers.iter().zip(integers) {
            *i = get(bytes, f) as u8 ^ self.integer_mask();
        }
        for (f, r) in self.reals.iter().zip(reals) {
            *r = f16::from_bits(get(bytes, f) as u16).to_f32();
        }
    }
}

/// The bits of `r` as a half-precision number, which it is.
#[inline]
fn half_bits(r: f32) -> u16 {
    let (sign, size) = ((r.to_bits() >> 16 & 0x8000) as u16, r.abs());
    // The exponents' biases lie 112 apart. What is subnormal counts steps of 2⁻²⁴.
    let normal = (size.to_bits() >> 13).wrapping_sub(112 << 10);
    sign | if size < 1.0 / 16_384.0 { (size * 16_777_216.0) as u16 } else { normal as u16 }
}

#[inline]
fn put(out: &mut [u8], fields: &[Field], value: u32) {
    let mut rest = value;
    for f in fields {
        out[f.byte] |= ((rest & ((1 << f.width) - 1)) << f.shift) as u8;
        rest >>= f.width;
    }
}

#[inline]
fn get(bytes: &[u8], fields: &[Field]) -> u32 {
    let (mut value, mut width) = (0, 0);
    for f in fields {
        value |= ((u32::from(bytes[f.byte]) >> f.shift) & ((1 << f.width) - 1)) << width;
        width += f.width;
    }
    value
}

/// Packs the codes of super-blocks in whole lanes of 32 bytes.
fn pack_lanes(kind: BlockType, codes: &[u8], out: &mut [u8]) -> bool {
    // `parts` of 32 codes go into the same bytes, each `width` bits above the one before.
    let stack = |out: &mut [u8], codes: &[u8], from: u32, width: u32| {
        let mask = ((1u32 << width) - 1) as u8;
        for (part, codes) in codes.chunks_exact(32).enumerate() {
            for (o, &c) in out.iter_mut().zip(codes) {
                *o |= (c >> from & mask) << (part as u32 * width);
            }
        }
    };
    match kind {
        BlockType::Q2K | BlockType::Q3K => {
            let at = if kind == BlockType::Q2K { 16 } else { 32 };
            for (out, codes) in out[at..at + 64].chunks_exact_mut(32).zip(codes.chunks_exact(128)) {
                stack(out, codes, 0, 2);
            }
            if kind == BlockType::Q3K {
                stack(&mut out[..32], codes, 2, 1);
            }
        }
        BlockType::Q4K | BlockType::Q5K => {
            let at = if kind == BlockType::Q4K { 16 } else { 48 };
            for (out, codes) in out[at..at + 128].chunks_exact_mut(32).zip(codes.chunks_exact(64)) {
                stack(out, codes, 0, 4);
            }
            if kind == BlockType::Q5K {
                stack(&mut out[16..48], codes, 4, 1);
            }
        }
        BlockType::Q6K => {
            for (half, codes) in codes.chunks_exact(128).enumerate() {
                for (low, (a, b)) in out[64 * half..64 * half + 64].iter_mut().zip(codes.iter().zip(&codes[64..])) {
                    *low = a & 15 | b << 4;
                }
                stack(&mut out[128 + 32 * half..160 + 32 * half], codes, 4, 2);
            }
        }
        BlockType::Iq4Xs => {
            for (out, codes) in out[8..].chunks_exact_mut(16).zip(codes.chunks_exact(32)) {
                for (o, (a, b)) in out.iter_mut().zip(codes.iter().zip(&codes[16..])) {
                    *o = a & 15 | b << 4;
                }
            }
        }
        _ => return false,
    }
    true
}

/// Fields of d, then of dmin or m.
fn real(kind: BlockType, i: usize) -> Wide {
    let at = match kind {
        BlockType::Q2K => 80,
        BlockType::Q3K => 108,
        BlockType::Q6K => 208,
        BlockType::Tq1_0 => 52,
        BlockType::Tq2_0 => 64,
        // The upper nibbles of four words of scales.
        BlockType::Iq1M => return [49, 51, 53, 55].map(|byte| Field { byte, shift: 4, width: 4 }),
        _ => 0,
    };
    let [low, high] = [0, 1].map(|half| Field { byte: at + 2 * i + half, shift: 0, width: 8 });
    [low, high, NONE, NONE]
}

/// `width` bits, 8 at most, from bit `shift` of the little-endian number at `byte` on.
const fn straddling(byte: usize, shift: usize, width: usize) -> Fields {
    let (byte, shift) = (byte + shift / 8, shift % 8);
    let low = if width < 8 - shift { width } else { 8 - shift };
    two((byte, shift, low), if low < width { (byte + 1, 0, width - low) } else { (0, 0, 0) })
}

/// Fields of integer `i`: those of the scales come first, then those of the offsets.
fn integer(kind: BlockType, i: usize) -> Fields {
    match kind {
        BlockType::Q2K if i < 16 => one(i, 0, 4),
        BlockType::Q2K => one(i - 16, 4, 4),
        BlockType::Q3K => two((96 + i % 8, i / 8 * 4, 4), (104 + i % 4, i / 4 * 2, 2)),
        BlockType::Q4K | BlockType::Q5K => match (i / 8, i % 8) {
            (0, j @ ..4) => one(4 + j, 0, 6),
            (_, j @ ..4) => one(8 + j, 0, 6),
            (0, j) => two((8 + j, 0, 4), (j, 6, 2)),
            (_, j) => two((8 + j, 4, 4), (4 + j, 6, 2)),
        },
        BlockType::Q6K => one(192 + i, 0, 8),
        BlockType::Iq4Xs => two((4 + i / 2, i % 2 * 4, 4), (2 + i / 4, i % 4 * 2, 2)),
        BlockType::Iq2Xxs => one(2 + 8 * i + 7, 4, 4),
        BlockType::Iq2Xs => one(66 + i / 2, i % 2 * 4, 4),
        BlockType::Iq2S => one(74 + i / 2, i % 2 * 4, 4),
        BlockType::Iq3Xxs => one(66 + 4 * i + 3, 4, 4),
        BlockType::Iq3S => one(106 + i / 2, i % 2 * 4, 4),
        BlockType::Iq1S if i < 8 => one(34 + 2 * i + 1, 4, 3),
        BlockType::Iq1S => one(34 + 2 * (i - 8) + 1, 7, 1),
        BlockType::Iq1M => straddling(48 + i / 4 * 2, 3 * (i % 4), 3),
        BlockType::Nvfp4 => one(i, 0, 8),
        _ => one(0, 0, 8),
    }
}

/// Fields of the code of element `e`.
fn code(kind: BlockType, e: usize) -> Fields {
    // Blocks of 32 pair element j with j + 16; super-blocks work in strides of 32.
    let nibble = |from: usize| (from + e % 16, e / 16 % 2 * 4, 4);
    let (half, quarter, lane) = (e / 128, e % 128 / 32, e % 32);
    let two_bits = |from: usize| (from + 32 * half + lane, 2 * quarter, 2);
    let (pair, upper) = (e / 64, e % 64 / 32);
    let paired = |from: usize| (from + 32 * pair + lane, 4 * upper, 4);
    let single = |(byte, shift, width)| one(byte, shift, width);
    match kind {
        BlockType::Q4_0 | BlockType::Iq4Nl => single(nibble(2)),
        BlockType::Q4_1 => single(nibble(4)),
        BlockType::Q5_0 => two(nibble(6), (2 + e / 8, e % 8, 1)),
        BlockType::Q5_1 => two(nibble(8), (4 + e / 8, e % 8, 1)),
        BlockType::Q8_0 => one(2 + e, 0, 8),
        BlockType::Mxfp4 => single(nibble(1)),
        BlockType::Nvfp4 => one(4 + e / 16 * 8 + e % 8, e / 8 % 2 * 4, 4),
        BlockType::Q2K => single(two_bits(16)),
        BlockType::Tq2_0 => single(two_bits(0)),
        BlockType::Q1_0 => one(2 + e / 8, e % 8, 1),
        BlockType::Q2_0 => one(2 + e / 4, e % 4 * 2, 2),
        BlockType::Q3K => two(two_bits(32), (lane, 4 * half + quarter, 1)),
        BlockType::Q4K => single(paired(16)),
        BlockType::Q5K => two(paired(48), (16 + lane, 2 * pair + upper, 1)),
        BlockType::Q6K => {
            let low = (64 * half + lane + 32 * (quarter % 2), quarter / 2 * 4, 4);
            two(low, (128 + 32 * half + lane, 2 * quarter, 2))
        }
        BlockType::Iq4Xs => one(8 + e / 32 * 16 + e % 16, e / 16 % 2 * 4, 4),
        // These have no field per code.
        BlockType::Tq1_0
        | BlockType::Iq2Xxs
        | BlockType::Iq2Xs
        | BlockType::Iq2S
        | BlockType::Iq3Xxs
        | BlockType::Iq3S
        | BlockType::Iq1S
        | BlockType::Iq1M => [NONE; 2],
    }
}

/// The three runs of TQ1_0: first byte, bytes, first element, and digits of a byte.
const TERNARY: [(usize, usize, usize, usize); 3] = [(0, 32, 0, 5), (32, 16, 160, 5), (48, 4, 240, 4)];

fn unpack_ternary(bytes: &[u8], codes: &mut [u8]) {
    for (byte, count, element, digits) in TERNARY {
        for m in 0..count {
            let mut rest = bytes[byte + m];
            for n in 0..digits {
                codes[element + n * count + m] = ((u16::from(rest) * 3) >> 8) as u8;
                rest = rest.wrapping_mul(3);
            }
        }
    }
}

/// The blocks of a matrix, row after row.
pub(crate) fn encode(form: &BlockForm, q: &Quantized) -> Vec<u8> {
    let (layout, blocks) = (LazyLock::new(|| Layout::new(form)), q.codes.len() / form.len);
    let (reals, integers) = (form.reals(), form.integers());
    let mut out = vec![0u8; blocks * form.bytes];
    let task = (TASK / form.len).max(1);
    let tasks = out.par_chunks_mut(task * form.bytes).zip(q.codes.par_chunks(task * form.len));
    tasks.enumerate().for_each(|(i, (out, codes))| {
        let (scales, zeros) = (&q.scales[i * task * reals..], &q.zeros[i * task * integers..]);
        if plain::pack(form.kind, codes, (scales, zeros), out) {
            return;
        }
        for (b, (out, codes)) in out.chunks_exact_mut(form.bytes).zip(codes.chunks_exact(form.len)).enumerate() {
            layout.pack(codes, &scales[b * reals..][..reals], &zeros[b * integers..][..integers], out);
        }
    });
    out
}

/// The matrix `shape` in `bytes`, which hold exactly its blocks. Nothing is checked: a caller validates the result.
pub(crate) fn decode(form: &BlockForm, shape: [usize; 2], bytes: &[u8]) -> Quantized {
    let (layout, blocks) = (Layout::new(form), bytes.len() / form.bytes);
    let (reals, integers) = (form.reals(), form.integers());
    let mut q = Quantized {
        scheme: Scheme::block(form.kind),
        shape,
        codes: vec![0; blocks * form.len],
        scales: vec![0.0; blocks * reals],
        zeros: vec![0; blocks * integers],
        group_of: Vec::new(),
        input: None,
    };
    // Types without integers (or reals) still need one slice per block to walk beside the others.
    let mut scales: Vec<&mut [f32]> = split(&mut q.scales, reals, blocks);
    let mut zeros: Vec<&mut [u8]> = split(&mut q.zeros, integers, blocks);
    (q.codes.par_chunks_mut(form.len))
        .zip(bytes.par_chunks(layout.bytes))
        .zip(scales.par_iter_mut().zip(zeros.par_iter_mut()))
        .for_each(|((codes, bytes), (scales, zeros))| layout.unpack(bytes, codes, scales, zeros));
    q
}

fn split<T>(all: &mut [T], each: usize, count: usize) -> Vec<&mut [T]> {
    if each == 0 { (0..count).map(|_| Default::default()).collect() } else { all.chunks_mut(each).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bitmill_scheme::BLOCKS;

    #[test]
    fn fields_cover_every_bit_once() {
        for form in BLOCKS.iter().filter(|f| f.kind != BlockType::Tq1_0) {
            let layout = Layout::new(form);
            let mut seen = vec![0u8; form.bytes];
            let mut mark = |byte: usize, bits: u8| {
                assert_eq!(seen[byte] & bits, 0, "{}: byte {byte} is used twice", form.name);
                seen[byte] |= bits;
            };
            let vectors = layout.vectors.iter().flat_map(Vectors::fields);
            let fields = layout.codes.iter().chain(&layout.integers).flatten().chain(layout.reals.iter().flatten());
            for f in fields.chain(vectors).filter(|f| f.width > 0) {
                mark(f.byte, (((1u32 << f.width) - 1) << f.shift) as u8);
            }
            assert!(seen.iter().all(|&s| s == 0xff), "{}: a bit is never used", form.name);
        }
    }

    #[test]
    fn whole_lanes_are_packed_as_their_fields_say() {
        // Digits in base 3 are no fields.
        for form in BLOCKS.iter().filter(|f| f.kind != BlockType::Tq1_0) {
            let layout = Layout::new(form);
            let code = |i: usize| (i.wrapping_mul(2_654_435_761) >> 16) % form.levels.len();
            let codes: Vec<u8> = (0..form.len).map(|i| code(i) as u8).collect();
            let reals = [-0.75, 3e-6];
            let (mut fast, mut slow) = (vec![0u8; form.bytes], vec![0u8; form.bytes]);
            let integers = [97];
            let plain = plain::pack(form.kind, &codes, (&reals[..form.reals()], &integers), &mut fast);
            if plain || pack_lanes(form.kind, &codes, &mut fast) {
                for (f, &c) in layout.codes.iter().zip(&codes) {
                    put(&mut slow, f, u32::from(c ^ layout.code_mask()));
                }
                for (f, &r) in layout.reals.iter().zip(&reals).filter(|_| plain) {
                    put(&mut slow, f, u32::from(half_bits(r)));
                }
                for (f, &integer) in layout.integers.iter().zip(&integers).filter(|_| plain) {
                    put(&mut slow, f, u32::from(integer));
                }
                assert_eq!(fast, slow, "{}", form.name);
            }
        }
    }

    #[test]
    fn ternary_digits_survive() {
        for seed in 0..50u32 {
            let codes: Vec<u8> =
                (0..256u32).map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(seed * 77) >> 16) as u8 % 3).collect();
            let (mut bytes, mut back) = (vec![0; 54], vec![9; 256]);
            assert!(plain::pack(BlockType::Tq1_0, &codes, (&[0.5], &[]), &mut bytes));
            unpack_ternary(&bytes, &mut back);
            assert_eq!(codes, back);
        }
    }
}
