//! f32 to bfloat16 and back, a slice at a time.
//!
//! What becomes bfloat16 goes past the caches: it is activations that are read again when those of all other tokens were
//! written. Written through the caches, every line would be read from memory first, and take the place of one that is in use.

use crate::Level;
use crate::level::at_level;
use half::bf16;
use std::mem::MaybeUninit;

/// Numbers of a line of the cache.
const LINE: usize = 32;

/// A line of the cache.
#[repr(C, align(64))]
struct Line([MaybeUninit<bf16>; LINE]);

/// `values` rounded to the nearest bfloat16, ties to even; NaN stays NaN.
///
/// # Panics
/// When the lengths differ: a caller's bug.
pub fn to_bfloat16(level: Level, values: &[f32], out: &mut [bf16]) {
    // SAFETY: the type is laid out as the number in it, and nothing but numbers is put there.
    let out: &mut [MaybeUninit<bf16>] = unsafe { std::slice::from_raw_parts_mut(out.as_mut_ptr().cast(), out.len()) };
    narrowed(level, values, out);
}

/// The same behind what `out` holds.
pub fn append_bfloat16(level: Level, values: &[f32], out: &mut Vec<bf16>) {
    out.reserve(values.len());
    narrowed(level, values, &mut out.spare_capacity_mut()[..values.len()]);
    // SAFETY: as many more were just put there.
    unsafe { out.set_len(out.len() + values.len()) };
}

fn narrowed(level: Level, values: &[f32], out: &mut [MaybeUninit<bf16>]) {
    assert_eq!(values.len(), out.len(), "a number for each");
    // SAFETY: a line is so many numbers that may not be there, and nothing else.
    let (head, lines, tail) = unsafe { out.align_to_mut::<Line>() };
    let (first, rest) = values.split_at(head.len());
    let (whole, last) = rest.split_at(LINE * lines.len());
    let whole = whole.as_chunks().0;
    at_level!(level, narrow, (first: &[f32], head: &mut [MaybeUninit<bf16>]));
    at_level!(level, narrow_lines, (whole: &[[f32; LINE]], lines: &mut [Line]));
    at_level!(level, narrow, (last: &[f32], tail: &mut [MaybeUninit<bf16>]));
    let_others_see();
}

/// Who is told that lines were written sees them all.
fn let_others_see() {
    // SAFETY: every x86-64 has SSE2.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

/// Rows of bfloat16 behind what a vector holds, whose columns come some at a time, from the left to the right. The vector has them
/// once they are [finished](ByColumns::finish).
#[derive(Debug)]
pub struct ByColumns<'a> {
    out: &'a mut Vec<bf16>,
    rows: usize,
    width: usize,
    /// Columns that are there.
    done: usize,
}

impl<'a> ByColumns<'a> {
    /// None of `rows` of `width` yet.
    pub fn new(out: &'a mut Vec<bf16>, rows: usize, width: usize) -> Self {
        out.reserve(rows * width);
        ByColumns { out, rows, width, done: 0 }
    }

    /// The next columns, `values: [rows, columns]`, rounded as [`append_bfloat16`] does.
    ///
    /// # Panics
    /// When there are more than are left, or rows of other lengths: a caller's bug.
    pub fn push(&mut self, level: Level, values: &[f32]) {
        let columns = values.len() / self.rows.max(1);
        assert!(values.len() == self.rows * columns && self.done + columns <= self.width, "columns that are left");
        let out = &mut self.out.spare_capacity_mut()[..self.rows * self.width];
        let place = (self.done, self.width);
        let lines = [self.done, self.width, columns].iter().all(|at| at.is_multiple_of(LINE));
        // SAFETY: a line is so many numbers that may not be there, and nothing else.
        match unsafe { out.align_to_mut::<Line>() } {
            ([], out, _) if lines => {
                let (values, place) = (values.as_chunks().0, (self.done / LINE, self.width / LINE));
                at_level!(level, narrow_some, (values: &[[f32; LINE]], columns: usize, place: (usize, usize), out: &mut [Line]));
            }
            _ => {
                at_level!(level, narrow_rows, (values: &[f32], columns: usize, place: (usize, usize), out: &mut [MaybeUninit<bf16>]))
            }
        }
        self.done += columns;
    }

    /// Leaves the rows in the vector.
    ///
    /// # Panics
    /// When columns are missing: a caller's bug.
    pub fn finish(self) {
        assert_eq!(self.done, self.width, "all columns");
        let_others_see();
        let count = self.out.len() + self.rows * self.width;
        // SAFETY: all columns of all rows were put there.
        unsafe { self.out.set_len(count) };
    }
}

/// What `values` stand for, exactly, behind what `out` holds.
pub fn append_f32(level: Level, values: &[bf16], out: &mut Vec<f32>) {
    out.reserve(values.len());
    let room = &mut out.spare_capacity_mut()[..values.len()];
    at_level!(level, widen, (values: &[bf16], room: &mut [MaybeUninit<f32>]));
    // SAFETY: as many more were just put there.
    unsafe { out.set_len(out.len() + values.len()) };
}

#[inline(always)]
fn narrow(values: &[f32], out: &mut [MaybeUninit<bf16>]) {
    for (out, value) in out.iter_mut().zip(values) {
        out.write(nearest(*value));
    }
}

#[inline(always)]
fn narrow_lines(values: &[[f32; LINE]], out: &mut [Line]) {
    for (out, values) in out.iter_mut().zip(values) {
        let mut line = Line([MaybeUninit::new(bf16::ZERO); LINE]);
        for (out, &value) in line.0.iter_mut().zip(values) {
            out.write(nearest(value));
        }
        past_caches(out, &line);
    }
}

/// Lines of some columns, which begin at line `at` of rows of `width`.
#[inline(always)]
fn narrow_some(values: &[[f32; LINE]], columns: usize, (at, width): (usize, usize), out: &mut [Line]) {
    let each = columns / LINE;
    for (values, out) in values.chunks_exact(each.max(1)).zip(out.chunks_mut(width.max(1))) {
        narrow_lines(values, &mut out[at..at + each]);
    }
}

/// The same of any.
#[inline(always)]
fn narrow_rows(values: &[f32], columns: usize, (at, width): (usize, usize), out: &mut [MaybeUninit<bf16>]) {
    for (values, out) in values.chunks_exact(columns.max(1)).zip(out.chunks_mut(width.max(1))) {
        narrow(values, &mut out[at..at + columns]);
    }
}

#[inline(always)]
fn nearest(value: f32) -> bf16 {
    let bits = value.to_bits();
    // Half of the last place that stays, less one where that is even: a tie is carried up to an even number alone.
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    let quiet = bits >> 16 | 0x40;
    let nan = bits & 0x7fff_ffff > 0x7f80_0000;
    bf16::from_bits(if nan { quiet } else { rounded } as u16)
}

/// Puts a line into memory.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn past_caches(out: &mut Line, line: &Line) {
    use std::arch::x86_64::{__m128i, _mm_load_si128, _mm_stream_si128};
    let (from, to): (*const __m128i, *mut __m128i) = ((&raw const *line).cast(), (&raw mut *out).cast());
    for i in 0..size_of::<Line>() / size_of::<__m128i>() {
        // SAFETY: every x86-64 has SSE2; both are lines, which begin at multiples of 64 bytes, and have so many parts.
        unsafe { _mm_stream_si128(to.add(i), _mm_load_si128(from.add(i))) };
    }
}

#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
fn past_caches(out: &mut Line, line: &Line) {
    out.0 = line.0;
}

#[inline(always)]
fn widen(values: &[bf16], out: &mut [MaybeUninit<f32>]) {
    for (out, value) in out.iter_mut().zip(values) {
        out.write(f32::from_bits(u32::from(value.to_bits()) << 16));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_by_columns() {
        for (rows, width, columns) in [(1, 1, 1), (5, 96, 32), (5, 96, 64), (3, 70, 32), (2, 64, 20)] {
            let values: Vec<f32> = (0..rows * width).map(|i| (i as f32 * 0.7).sin() * 3.0).collect();
            for (level, before) in Level::all().into_iter().flat_map(|level| [(level, 0), (level, 7)]) {
                let mut expected = vec![bf16::ONE; before];
                let mut found = expected.clone();
                append_bfloat16(level, &values, &mut expected);
                let mut rest = ByColumns::new(&mut found, rows, width);
                for from in (0..width).step_by(columns) {
                    let some = from..width.min(from + columns);
                    let strip = values.chunks(width).flat_map(|row| row[some.clone()].to_vec());
                    rest.push(level, &strip.collect::<Vec<_>>());
                }
                rest.finish();
                assert_eq!(found, expected);
            }
        }
    }

    #[test]
    #[should_panic(expected = "all columns")]
    fn rows_without_all_columns_are_none() {
        let mut out = Vec::new();
        let mut rows = ByColumns::new(&mut out, 2, 3);
        rows.push(Level::best(), &[1.0; 4]);
        rows.finish();
    }

    #[test]
    fn every_level_rounds_as_half_does() {
        // All upper halves, with lower halves about a tie and at the ends.
        let lower = [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff];
        let values: Vec<f32> =
            (0..=0xffffu32).flat_map(|upper| lower.map(|low| f32::from_bits(upper << 16 | low))).collect();
        let expected: Vec<u16> = values.iter().map(|&v| bf16::from_f32(v).to_bits()).collect();
        for level in Level::all() {
            let mut narrow = vec![bf16::ZERO; values.len()];
            to_bfloat16(level, &values, &mut narrow);
            assert!(narrow.iter().map(|v| v.to_bits()).eq(expected.iter().copied()));
            let (mut again, mut wide) = (vec![bf16::ONE], vec![1.0]);
            append_bfloat16(level, &values, &mut again);
            assert!(again[0] == bf16::ONE && again[1..].iter().map(|v| v.to_bits()).eq(expected.iter().copied()));
            append_f32(level, &narrow, &mut wide);
            let wide = &wide[1..];
            assert!(wide.len() == narrow.len());
            assert!(wide.iter().zip(&narrow).all(|(w, n)| w.to_bits() == u32::from(n.to_bits()) << 16));
        }
    }
}
