//! Codes and parameters of one matrix, and the weights they stand for.

use crate::grids::binary::SALIENT;
use crate::{BinaryParams, BlockForm, BlockParams, Error, Granularity, Grid, GridKind, GroupParams, Inputs, Scheme};

/// A weight matrix `[out, in]` under a [`Scheme`]: the only thing that passes from a method to a format.
#[derive(Debug, Clone, PartialEq)]
pub struct Quantized {
    /// How the numbers are to be read.
    pub scheme: Scheme,
    /// `[out, in]`.
    pub shape: [usize; 2],
    /// Codes `0..2^b`, row-major `[out, in]`; of a float grid, bit patterns.
    pub codes: Vec<u8>,
    /// Scales, row-major `[out, groups]` (one entry for [`Granularity::Tensor`]), each a value of the scheme's type.
    /// They may be negative. Those of [`Granularity::Tile`] are `[row tiles, groups]`, and those of
    /// [`crate::ScaleType::E4m3`] have what all are divided by behind them. For a GGUF type, the real numbers of every block, `[out, blocks, form.reals()]`;
    /// for binary numbers `[out, groups, 7]`, [`BinaryParams::reals`] of each group.
    pub scales: Vec<f32>,
    /// Zero points in code units, laid out as the scales; empty for a symmetric grid. For a GGUF type, the integers of
    /// every block as they are stored, `[out, blocks, form.integers()]`.
    pub zeros: Vec<u8>,
    /// The group of every input column where they are [`Granularity::Mapped`], else empty.
    pub group_of: Vec<u32>,
    /// What calibration stored for the rounding of inputs, where it does (see [`crate::Activations::calibrated`]).
    pub input: Option<f32>,
}

impl Quantized {
    /// Checks every length and range, so that later arithmetic cannot fail.
    ///
    /// # Errors
    /// The first contradiction found.
    pub fn validate(&self) -> Result<(), Error> {
        let [rows, cols] = self.shape;
        let bits = self.scheme.bits();
        if let Granularity::Group(0) | Granularity::Mapped(0) = self.scheme.granularity {
            return Err(Error::Group { group: 0, cols });
        }
        let groups_in_all = self.scheme.scales(self.shape);
        let (scales, zeros) = match self.scheme.form() {
            Some(form) => (groups_in_all * form.reals(), groups_in_all * form.integers()),
            None => {
                let divisor = usize::from(self.scheme.has_divisor());
                (groups_in_all + divisor, if self.scheme.symmetric() { 0 } else { groups_in_all })
            }
        };
        if !matches!(self.scheme.grid, GridKind::Int { .. }) {
            self.scheme.check(cols)?;
        }
        let length =
            |what, expected, got| if expected == got { Ok(()) } else { Err(Error::Length { what, expected, got }) };
        length("codes", rows * cols, self.codes.len())?;
        length("scales", scales, self.scales.len())?;
        length("zero points", zeros, self.zeros.len())?;
        let mapped = matches!(self.scheme.granularity, Granularity::Mapped(_));
        length("group map", if mapped { cols } else { 0 }, self.group_of.len())?;
        let range = |what, got: u32, max: u32| {
            if got <= max { Ok(()) } else { Err(Error::Range { what, got, bits: bits.get() }) }
        };
        let max_code = self.scheme.form().map_or(bits.max_code(), |f| (f.levels.len() - 1) as u8);
        if let Some(&c) = self.codes.iter().max() {
            range("code", u32::from(c), u32::from(max_code))?;
        }
        if let GridKind::Float(float) = self.scheme.grid {
            if let Some(i) = self.codes.iter().position(|&c| !float.is_number(c)) {
                return Err(Error::NaN { row: i / cols, col: i % cols });
            }
            let divisor = self.divisor();
            if !(divisor.is_finite() && divisor > 0.0) {
                return Err(Error::Divisor(divisor));
            }
        }
        if let (GridKind::Binary, Some((first, rest))) = (self.scheme.grid, self.codes.split_at_checked(cols)) {
            let other = |(i, code): (usize, &u8)| (code ^ first[i % cols]) & SALIENT != 0;
            if let Some(i) = rest.iter().enumerate().position(other) {
                return Err(Error::Salient { row: i / cols + 1, col: i % cols });
            }
        }
        if let Some(book) = self.scheme.form().and_then(BlockForm::codebook)
            && let Some(i) = self.codes.chunks(book.unit).position(|unit| !book.holds(unit))
        {
            return Err(Error::Codebook { row: i * book.unit / cols, col: i * book.unit % cols });
        }
        if let Some(form) = self.scheme.form() {
            let n = form.integers();
            if let Some((i, &got)) = self.zeros.iter().enumerate().find(|(i, z)| **z > form.max_integer(i % n)) {
                let (group, groups) = (i / n, self.scheme.groups(cols));
                return Err(Error::Integer { row: group / groups, group: group % groups, got });
            }
        } else if let Some(&z) = self.zeros.iter().max() {
            range("zero point", u32::from(z), u32::from(bits.max_code()))?;
        }
        match self.input {
            Some(input) if !(input.is_finite() && input > 0.0) => return Err(Error::Input(Some(input))),
            None if self.scheme.activations.is_calibrated() => return Err(Error::Input(None)),
            _ => {}
        }
        let groups = self.scheme.groups(cols);
        if let Some(&g) = self.group_of.iter().max() {
            range("group", g, groups as u32 - 1)?;
        }
        match self.scales.iter().position(|s| !s.is_finite()) {
            Some(i) => {
                let binary = if self.scheme.grid == GridKind::Binary { BinaryParams::REALS } else { 1 };
                let group = i / self.scheme.form().map_or(binary, BlockForm::reals);
                Err(Error::Scale { row: group / groups, group: group % groups, value: self.scales[i] })
            }
            None => Ok(()),
        }
    }

    /// Group of input column `col`.
    #[must_use]
    pub fn group(&self, col: usize) -> usize {
        match self.group_of.get(col) {
            Some(&g) => g as usize,
            None => col / self.scheme.group_len(self.shape[1]),
        }
    }

    /// Scale and zero point of output `row`, group `group`.
    #[must_use]
    pub fn params(&self, row: usize, group: usize) -> GroupParams {
        let i = match self.scheme.granularity {
            Granularity::Tensor => 0,
            Granularity::Tile(side) => row / side * self.scheme.groups(self.shape[1]) + group,
            _ => row * self.scheme.groups(self.shape[1]) + group,
        };
        let scale = if self.scheme.has_divisor() { self.scales[i] / self.divisor() } else { self.scales[i] };
        GroupParams { scale, zero: self.zeros.get(i).copied().unwrap_or(self.scheme.bits().middle()) }
    }

    /// What every stored scale is divided by.
    #[must_use]
    pub fn divisor(&self) -> f32 {
        if self.scheme.has_divisor() { self.scales.last().copied().unwrap_or(1.0) } else { 1.0 }
    }

    /// How the input of the matrix is rounded.
    #[must_use]
    pub fn inputs(&self) -> Inputs {
        Inputs { activations: self.scheme.activations, stored: self.input.unwrap_or(1.0) }
    }

    /// Parameters of block `group` of output `row`, under a GGUF type of form `form`.
    #[must_use]
    pub fn block(&self, form: &BlockForm, row: usize, group: usize) -> BlockParams {
        let i = row * self.scheme.groups(self.shape[1]) + group;
        let (reals, integers) = (form.reals(), form.integers());
        let mut p = BlockParams::zero();
        p.reals[..reals].copy_from_slice(&self.scales[i * reals..][..reals]);
        p.integers[..integers].copy_from_slice(&self.zeros[i * integers..][..integers]);
        p
    }

    /// Parameters of group `group` of output `row`, under a scheme of binary numbers.
    #[must_use]
    pub fn binary(&self, row: usize, group: usize) -> BinaryParams {
        let i = row * self.scheme.groups(self.shape[1]) + group;
        let (all, _) = self.scales.as_chunks::<{ BinaryParams::REALS }>();
        BinaryParams::from_reals(all[i])
    }

    /// Whether each input column is salient, under a scheme of binary numbers.
    #[must_use]
    pub fn salient(&self) -> Vec<bool> {
        self.codes.iter().take(self.shape[1]).map(|code| code & SALIENT != 0).collect()
    }

    /// The weights the codes stand for, row-major `[out, in]`: `scale · (code − zero)` in f32, for a float grid
    /// `float(code) · (scale / divisor)`, for binary numbers [`BinaryParams::value`], or for a GGUF type
    /// `scale · level(code) + offset` of its sub-block. This is the definition that every reader, kernel and loader is
    /// held to.
    #[must_use]
    pub fn dequantize(&self) -> Vec<f32> {
        if let Some(form) = self.scheme.form() {
            return self.dequantize_blocks(form);
        }
        if self.scheme.grid == GridKind::Binary {
            return self.dequantize_binary();
        }
        match self.scheme.float_grid(self.divisor()) {
            Some(grid) => self.values(grid),
            None => self.values(self.scheme.grid()),
        }
    }

    fn values(&self, grid: impl Grid) -> Vec<f32> {
        let [rows, cols] = self.shape;
        let mut out = Vec::with_capacity(rows * cols);
        for row in 0..rows {
            let codes = &self.codes[row * cols..][..cols];
            if self.group_of.is_empty() {
                for (group, codes) in codes.chunks(self.scheme.group_len(cols)).enumerate() {
                    let params = self.params(row, group);
                    out.extend(codes.iter().map(|&code| grid.value(code, params)));
                }
            } else {
                let params = |col| self.params(row, self.group(col));
                out.extend(codes.iter().enumerate().map(|(col, &code)| grid.value(code, params(col))));
            }
        }
        out
    }

    fn dequantize_binary(&self) -> Vec<f32> {
        let (cols, len) = (self.shape[1], self.scheme.group_len(self.shape[1]));
        let mut out = Vec::with_capacity(self.codes.len());
        for (row, codes) in self.codes.chunks(cols.max(1)).enumerate() {
            for (group, codes) in codes.chunks(len).enumerate() {
                let params = self.binary(row, group);
                out.extend(codes.iter().map(|&code| params.value(code)));
            }
        }
        out
    }

    fn dequantize_blocks(&self, form: &BlockForm) -> Vec<f32> {
        let groups = self.scheme.groups(self.shape[1]);
        let mut out = vec![0.0; self.codes.len()];
        for (b, (out, codes)) in out.chunks_mut(form.len).zip(self.codes.chunks(form.len)).enumerate() {
            let p = self.block(form, b / groups, b % groups);
            for (sub, (out, codes)) in out.chunks_mut(form.sub).zip(codes.chunks(form.sub)).enumerate() {
                form.values(codes, form.affine(&p, sub), out);
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Bits;

    fn sample() -> Quantized {
        let scheme = Scheme::int(Bits::ALL[3], false, Granularity::Group(2));
        Quantized {
            scheme,
            shape: [2, 4],
            codes: vec![0, 15, 7, 8, 1, 2, 3, 4],
            scales: vec![0.5, 1.0, 2.0, -0.25],
            zeros: vec![0, 7, 15, 4],
            group_of: vec![],
            input: None,
        }
    }

    #[test]
    fn dequantize_is_scale_times_code_minus_zero() {
        let mut q = sample();
        q.validate().unwrap();
        assert_eq!(q.dequantize(), [0.0, 7.5, 0.0, 1.0, -28.0, -26.0, 0.25, -0.0]);
        q.group_of = vec![1, 0, 1, 0];
        q.scheme.granularity = Granularity::Mapped(2);
        q.validate().unwrap();
        assert_eq!(q.dequantize(), [-7.0, 7.5, 0.0, 4.0, 0.75, -26.0, 0.25, -22.0]);
    }

    #[test]
    fn binary_numbers_are_means_and_magnitudes() {
        let mut q = Quantized {
            scheme: Scheme::binary(2),
            shape: [2, 4],
            codes: vec![0, 7, 3, 2, 1, 4, 0, 3],
            scales: (0..28).map(|i| i as f32).collect(),
            zeros: vec![],
            group_of: vec![],
            input: None,
        };
        q.validate().unwrap();
        // 0 − 1, 4 + 5 + 6, 9 + 10, 9 − 10; then from 14 and from 21 on.
        assert_eq!(q.dequantize(), [-1.0, 15.0, 19.0, -1.0, 29.0, -21.0, -1.0, 47.0]);
        assert_eq!(q.salient(), [false, true, false, false]);
        q.codes[5] = 3;
        let said = "the code of row 1, input 1 is of the other kind than those above it: a column is salient or not";
        assert_eq!(q.validate().unwrap_err().to_string(), said);
        (q.codes[5], q.scales[8]) = (6, f32::NAN);
        assert_eq!(q.validate().unwrap_err().to_string(), "the scale of row 0, group 1 is NaN");
        q.scheme.granularity = Granularity::Group(3);
        assert!(q.validate().is_err());
    }

    #[test]
    fn contradictions_are_named() {
        type Breakage = fn(&mut Quantized);
        let broken: [(Breakage, &str); 8] = [
            (|q| q.codes.truncate(7), "codes: 7 entries where the shape asks for 8"),
            (|q| q.codes[0] = 16, "code 16 lies beyond a 4-bit grid"),
            (|q| q.zeros[1] = 200, "zero point 200 lies beyond a 4-bit grid"),
            (
                |q| q.scheme.activations = crate::Activations::StaticFp8,
                "the scale of its inputs is missing, where a number above zero is needed",
            ),
            (|q| q.scales[3] = f32::NAN, "the scale of row 1, group 1 is NaN"),
            (
                |q| (q.group_of, q.scheme.granularity) = (vec![0, 0, 0, 2], Granularity::Mapped(2)),
                "group 2 lies beyond a 4-bit grid",
            ),
            (|q| q.group_of = vec![0; 4], "group map: 4 entries where the shape asks for 0"),
            (|q| q.scheme.granularity = Granularity::Group(0), "group size 0 does not divide the input width 4"),
        ];
        for (breakage, message) in broken {
            let mut q = sample();
            breakage(&mut q);
            assert_eq!(q.validate().unwrap_err().to_string(), message);
        }
    }
}
