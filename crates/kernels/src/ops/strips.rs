//! A matrix that several threads write, each its own columns.

use rayon::prelude::*;
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

    /// Has `write` fill every strip, on all threads where `parallel` asks for it.
    pub(super) fn fill(self, parallel: bool, write: impl Fn(&mut Strip<'_>) + Sync) {
        let all = self.rows.div_ceil(self.width);
        let strip = |i: usize| {
            let rows = i * self.width..((i + 1) * self.width).min(self.rows);
            write(&mut Strip { of: &self, rows });
        };
        if parallel { (0..all).into_par_iter().for_each(strip) } else { (0..all).for_each(strip) }
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
