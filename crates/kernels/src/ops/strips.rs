//! A matrix that several threads write, each its own columns.

use crate::team::each;
use std::marker::PhantomData;
use std::ops::Range;

/// `[tokens, rows]`, cut into strips of columns of a fixed width.
pub(super) struct Strips<'a> {
    out: *mut f32,
    tokens: usize,
    rows: usize,
    width: usize,
    borrowed: PhantomData<&'a mut [f32]>,
}

// SAFETY: what is shared is a pointer that only strips write through, and strips are disjoint.
unsafe impl Sync for Strips<'_> {}

impl<'a> Strips<'a> {
    /// Strips of `width` of the `rows` columns of `out`.
    pub(super) fn new(out: &'a mut [f32], rows: usize, width: usize) -> Self {
        assert!(rows > 0 && out.len().is_multiple_of(rows), "a matrix of whole tokens");
        Strips { out: out.as_mut_ptr(), tokens: out.len() / rows, rows, width, borrowed: PhantomData }
    }

    fn count(&self) -> usize {
        self.rows.div_ceil(self.width)
    }

    fn strip(&self, i: usize) -> Strip<'_> {
        Strip { of: self, rows: i * self.width..((i + 1) * self.width).min(self.rows) }
    }

    /// Has `write` fill every strip of several matrices, each told by its number, on as many threads as `adds` multiply-adds in
    /// all are worth: they are woken once.
    pub(super) fn fill(all: &[Self], adds: usize, write: impl Fn(usize, &mut Strip<'_>) + Sync) {
        let count = all.iter().map(Strips::count).sum();
        each(count, adds, |mut i| {
            for (which, strips) in all.iter().enumerate() {
                if i < strips.count() {
                    return write(which, &mut strips.strip(i));
                }
                i -= strips.count();
            }
        });
    }
}

/// One strip of a matrix.
pub(super) struct Strip<'a> {
    of: &'a Strips<'a>,
    /// Its columns, which are rows of the weight.
    pub(super) rows: Range<usize>,
}

impl Strip<'_> {
    /// Tokens of the matrix.
    pub(super) fn tokens(&self) -> usize {
        self.of.tokens
    }

    /// Its columns before `row`, and the others.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn split(&mut self, row: usize) -> (Strip<'_>, Strip<'_>) {
        let row = row.clamp(self.rows.start, self.rows.end);
        (Strip { of: self.of, rows: self.rows.start..row }, Strip { of: self.of, rows: row..self.rows.end })
    }

    /// Writes `values` at `token` from column `row` on; what lies beyond the strip is dropped.
    pub(super) fn put(&mut self, token: usize, row: usize, values: &[f32]) {
        assert!(token < self.of.tokens && self.rows.contains(&row), "inside of the strip");
        let count = values.len().min(self.rows.end - row);
        // SAFETY: the matrix is borrowed mutably for as long as its strips live, the place was checked to lie in this
        // strip, and no two strips have a column in common.
        unsafe {
            let to = self.of.out.add(token * self.of.rows + row);
            std::ptr::copy_nonoverlapping(values.as_ptr(), to, count);
        }
    }
}
