//! The same numbers under another scheme: every code is moved, none is rounded.
//!
//! Whatever the grid, a code stands for `scale · (code − zero)`: an integer grid stores the zero point or fixes it, a
//! GGUF type with evenly spaced levels has it in its first level, and one with a minimum in `−minimum / scale`. So a
//! matrix goes from one scheme to another by adding a number to its codes, if the other grid is wide enough, cuts its
//! groups no coarser, and has the scales and zero points among its values. Where it has not, nothing is done.

use crate::{BlockForm, Granularity, GridKind, Quantized, ScaleType, Scheme, Shift, Step};

/// What keeps a scheme from holding the numbers of a matrix.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Loss {
    /// A scale that the type of scales has no value for.
    #[error("the scale {value} of row {row}, group {group} is no value of type {to:?}")]
    Scale {
        /// Output row.
        row: usize,
        /// Group along the input, of the target.
        group: usize,
        /// The scale.
        value: f32,
        /// The type it would be stored in.
        to: ScaleType,
    },
    /// A zero point that is no code of the target, or a minimum that is no whole number of steps or no value of F16.
    #[error("the zero point of row {row}, group {group} cannot be stored")]
    Zero {
        /// Output row.
        row: usize,
        /// Group along the input, of the target.
        group: usize,
    },
    /// A weight beyond the grid.
    #[error("row {row}, input {col} is {level} steps from zero, beyond its codes")]
    Code {
        /// Output row.
        row: usize,
        /// Input.
        col: usize,
        /// Code less zero point.
        level: i32,
    },
    /// Groups of the source that are smaller than those of the target.
    #[error("its scales are per {from} inputs, and scales there are shared by more")]
    Groups {
        /// Inputs that share a scale in the source.
        from: usize,
    },
    /// Groups that are no consecutive columns, for a target whose groups are.
    #[error("its columns are grouped out of order (desc_act), and groups there are consecutive columns")]
    Order,
    /// Inputs rounded by what calibration says, where there is none.
    #[error("its inputs have no scales from calibration")]
    Inputs,
    /// Levels that are not evenly spaced.
    #[error("its levels are not evenly spaced")]
    Levels,
}

/// Scale and zero point of one group of the source; the zero point may lie beyond the codes.
#[derive(Clone, Copy)]
struct Step32 {
    scale: f32,
    zero: i32,
}

impl Quantized {
    /// The same weights under `to`, in all but the rounding of inputs, of which no more than what calibration says is
    /// a matter of numbers stored. It is of the same shape, and valid.
    ///
    /// # Errors
    /// The first number that `to` does not hold.
    pub fn recast(&self, to: Scheme) -> Result<Quantized, Loss> {
        if to.activations.is_calibrated() && to.activations != self.scheme.activations {
            return Err(Loss::Inputs);
        }
        let input = self.input.filter(|_| to.activations.is_calibrated());
        if to.grid == self.scheme.grid && to.granularity == self.scheme.granularity && to.scale == self.scheme.scale {
            return Ok(Quantized { scheme: to, input, ..self.clone() });
        }
        let steps = |scheme: &Scheme| matches!(scheme.grid, GridKind::Int { .. } | GridKind::Block(_));
        if !steps(&self.scheme) || !steps(&to) {
            return Ok(Quantized { input, ..self.recast_floats(to)? });
        }
        let [rows, cols] = self.shape;
        let mapped = !self.group_of.is_empty();
        let (own, theirs) = (self.step_len(), to.group_len(cols));
        let to_map = matches!(to.granularity, Granularity::Mapped(_));
        let whole = to.granularity == Granularity::Tensor;
        if mapped != to_map || (mapped && own != theirs) {
            return Err(Loss::Order);
        }
        if !own.is_multiple_of(theirs) || (whole && self.scheme.granularity != Granularity::Tensor) {
            return Err(Loss::Groups { from: own });
        }
        let groups = to.groups(cols);
        let mut out = Quantized {
            scheme: to,
            shape: self.shape,
            codes: Vec::with_capacity(self.codes.len()),
            scales: Vec::new(),
            zeros: Vec::new(),
            group_of: self.group_of.clone(),
            input,
        };
        let mut moves = vec![0i32; groups];
        let mut zeros = vec![0i32; groups];
        let highest = to.form().map_or(i32::from(to.bits().max_code()), |f| f.levels.len() as i32 - 1);
        for row in 0..rows {
            for group in 0..groups {
                let source = self.step(row, if mapped { group } else { group * theirs / own });
                let source = source.map_err(|wrong| wrong.unwrap_or(Loss::Zero { row, group }))?;
                let zero = self.zero_under(&to, source.zero);
                (moves[group], zeros[group]) = (zero - source.zero, source.zero);
                if row == 0 || !whole {
                    out.push_parameters(Step32 { zero, ..source }, (row, group))?;
                }
            }
            for (col, &code) in self.codes[row * cols..][..cols].iter().enumerate() {
                let group = if mapped { self.group_of[col] as usize } else { col / theirs };
                let moved = i32::from(code) + moves[group];
                if !(0..=highest).contains(&moved) {
                    return Err(Loss::Code { row, col, level: i32::from(code) - zeros[group] });
                }
                out.codes.push(moved as u8);
            }
        }
        Ok(out)
    }

    /// The same for a scheme of floats or binary numbers on either side: codes stay, and scales go to another type.
    fn recast_floats(&self, to: Scheme) -> Result<Quantized, Loss> {
        if to.grid != self.scheme.grid {
            return Err(Loss::Levels);
        }
        if to.granularity != self.scheme.granularity {
            return Err(Loss::Groups { from: self.step_len() });
        }
        let groups = self.scheme.groups(self.shape[1]);
        let out = Quantized { scheme: to, ..self.clone() };
        match self.scales.iter().position(|&s| to.scale.round(s) != s) {
            _ if to.has_divisor() != self.scheme.has_divisor() => Err(Loss::Levels),
            Some(i) => Err(Loss::Scale { row: i / groups, group: i % groups, value: self.scales[i], to: to.scale }),
            None => Ok(out),
        }
    }

    /// Inputs that share a step.
    fn step_len(&self) -> usize {
        self.scheme.form().map_or(self.scheme.group_len(self.shape[1]), |form| form.sub)
    }

    /// Scale and zero point of the inputs that share step `group` of `row`; without a reason where a minimum is no whole
    /// number of steps.
    fn step(&self, row: usize, group: usize) -> Result<Step32, Option<Loss>> {
        let Some(form) = self.scheme.form() else {
            let p = self.params(row, group);
            return Ok(Step32 { scale: p.scale, zero: i32::from(p.zero) });
        };
        let lowest = evenly_spaced(form).ok_or(Some(Loss::Levels))?;
        let a = form.affine(&self.block(form, row, group / form.subs()), group % form.subs());
        if form.shift == Shift::None {
            return Ok(Step32 { scale: a.scale, zero: -lowest });
        }
        // Exact in f64: the scale has at most 24 bits and the number of steps, if it is one, 9.
        let (scale, offset) = (f64::from(a.scale), f64::from(a.offset));
        let steps = if scale == 0.0 { 0.0 } else { (-offset / scale).round() };
        match steps.abs() <= 255.0 && steps * scale == -offset {
            true => Ok(Step32 { scale: a.scale, zero: steps as i32 - lowest }),
            false => Err(None),
        }
    }

    /// The zero point of a group under `to`, whose own is `zero`.
    fn zero_under(&self, to: &Scheme, zero: i32) -> i32 {
        let fixed = match to.form() {
            Some(form) => form.shift == Shift::None,
            None => to.symmetric(),
        };
        match to.form().and_then(evenly_spaced) {
            Some(lowest) if fixed => -lowest,
            // A minimum can be any number of steps; one that a source without minima has is that of its middle.
            Some(_) => zero,
            None if fixed || self.scheme.symmetric() => i32::from(to.bits().middle()),
            None => zero,
        }
    }

    /// Appends the parameters of one group.
    fn push_parameters(&mut self, step: Step32, (row, group): (usize, usize)) -> Result<(), Loss> {
        let to = self.scheme.scale;
        let held = |value: f32| to.round(value) == value;
        if !held(step.scale) {
            return Err(Loss::Scale { row, group, value: step.scale, to });
        }
        let Some(form) = self.scheme.form() else {
            self.scales.push(step.scale);
            if !self.scheme.symmetric() {
                let zero = u8::try_from(step.zero).ok().filter(|&z| z <= self.scheme.bits().max_code());
                self.zeros.push(zero.ok_or(Loss::Zero { row, group })?);
            }
            return Ok(());
        };
        if evenly_spaced(form).is_none() || form.step != Step::Real {
            return Err(Loss::Levels);
        }
        self.scales.push(step.scale);
        if form.shift == Shift::Real {
            let minimum = -(step.scale * step.zero as f32);
            if !held(minimum) {
                return Err(Loss::Zero { row, group });
            }
            self.scales.push(minimum);
        }
        Ok(())
    }
}

/// The lowest level of a GGUF type whose levels are consecutive whole numbers.
fn evenly_spaced(form: &BlockForm) -> Option<i32> {
    let even = form.levels.windows(2).all(|pair| i32::from(pair[1]) == i32::from(pair[0]) + 1);
    (even && form.codebook().is_none() && form.shift != Shift::Sign).then(|| i32::from(form.levels[0]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Bits, BlockType};

    fn int(bits: u32, symmetric: bool, granularity: Granularity) -> Scheme {
        Scheme::int(Bits::new(bits).unwrap(), symmetric, granularity).with_scale(ScaleType::F16)
    }

    /// `[2, 64]` with every code, scales that are no powers of two, and zero points all over the grid.
    fn sample(scheme: Scheme) -> Quantized {
        let n = u32::from(scheme.bits().max_code()) + 1;
        let scales = scheme.scales([2, 64]);
        let q = Quantized {
            scheme,
            shape: [2, 64],
            codes: (0..128u32).map(|i| (i * 37 % n) as u8).collect(),
            scales: (0..scales).map(|i| ScaleType::F16.round(0.013 * (i as f32 - 1.7))).collect(),
            zeros: (0..if scheme.symmetric() { 0 } else { scales as u32 }).map(|i| (i * 5 % n) as u8).collect(),
            group_of: Vec::new(),
            input: None,
        };
        q.validate().unwrap();
        q
    }

    #[test]
    fn numbers_survive_wherever_a_scheme_holds_them() {
        let group = Granularity::Group;
        let block = Scheme::block;
        for (from, to) in [
            (int(4, true, group(32)), block(BlockType::Q4_0)),
            (int(4, true, group(64)), block(BlockType::Q4_0)),
            (int(4, true, Granularity::Channel), block(BlockType::Q4_0)),
            (int(4, true, Granularity::Tensor), block(BlockType::Q4_0)),
            (int(3, true, group(32)), block(BlockType::Q4_0)),
            (int(5, true, group(32)), block(BlockType::Q5_0)),
            (int(8, true, group(32)), block(BlockType::Q8_0)),
            // Up to 15 steps below zero and above: one bit more.
            (int(4, false, group(32)), block(BlockType::Q5_0)),
            // A fixed zero point has a minimum of 8 steps, which is exact.
            (int(4, true, group(32)), block(BlockType::Q4_1)),
            (int(4, true, group(32)), int(4, false, group(32))),
            (int(4, false, group(32)), int(5, false, group(16))),
            (int(4, true, group(32)), int(4, true, group(32)).with_scale(ScaleType::F32)),
            (int(4, true, Granularity::Tensor), int(4, true, Granularity::Channel)),
        ] {
            let q = sample(from);
            let there = q.recast(to).unwrap_or_else(|e| panic!("{from} to {to}: {e}"));
            there.validate().unwrap();
            assert_eq!(there.dequantize(), q.dequantize(), "{from} to {to}");
            let same = Scheme { scale: q.scheme.scale, ..from };
            let kept = from.symmetric() && from.bits() == to.bits() && there.step_len() == q.step_len();
            if kept && from.granularity != Granularity::Tensor {
                assert_eq!(there.recast(same).unwrap(), q, "{to} back to {from}");
            }
        }
    }

    #[test]
    fn blocks_of_super_blocks_become_integers_with_single_precision_scales() {
        let form = BlockType::Q6K.form();
        let q = Quantized {
            scheme: Scheme::block(BlockType::Q6K),
            shape: [1, 256],
            codes: (0..256).map(|i| (i * 7 % 64) as u8).collect(),
            scales: vec![ScaleType::F16.round(0.0017)],
            zeros: (0..16).map(|i| (i * 16 + 3) as u8).collect(),
            group_of: Vec::new(),
            input: None,
        };
        let to = int(6, true, Granularity::Group(form.sub));
        assert!(matches!(q.recast(to), Err(Loss::Scale { to: ScaleType::F16, .. })));
        let there = q.recast(to.with_scale(ScaleType::F32)).unwrap();
        assert_eq!(there.dequantize(), q.dequantize());
        let uneven = Quantized {
            scheme: Scheme::block(BlockType::Iq4Nl),
            shape: [1, 32],
            ..sample(int(4, true, Granularity::Channel))
        };
        assert_eq!(uneven.recast(int(4, true, Granularity::Group(32))), Err(Loss::Levels));
    }

    #[test]
    fn what_is_not_held_is_named() {
        let group = Granularity::Group;
        let sym = sample(int(4, true, group(32)));
        let asym = sample(int(4, false, group(32)));
        let message = |q: &Quantized, to: Scheme| q.recast(to).unwrap_err().to_string();
        assert_eq!(message(&sym, int(3, true, group(32))), "row 0, input 0 is -8 steps from zero, beyond its codes");
        assert_eq!(
            message(&sym, int(4, true, group(32)).with_scale(ScaleType::Bf16)),
            format!("the scale {} of row 0, group 1 is no value of type Bf16", sym.scales[1])
        );
        assert!(matches!(sym.recast(int(4, true, Granularity::Channel)), Err(Loss::Groups { from: 32 })));
        assert!(matches!(sym.recast(int(4, true, Granularity::Tensor)), Err(Loss::Groups { from: 32 })));
        assert!(matches!(asym.recast(int(4, true, group(32))), Err(Loss::Code { row: 0, .. })));
        // A minimum of 5 steps of an 11-bit scale is 13 bits or so.
        assert_eq!(message(&asym, Scheme::block(BlockType::Q4_1)), "the zero point of row 0, group 1 cannot be stored");
        let mut mapped = Quantized { group_of: (0..64).map(|i| i % 2).collect(), ..asym.clone() };
        mapped.scheme.granularity = Granularity::Mapped(32);
        mapped.validate().unwrap();
        assert!(matches!(mapped.recast(asym.scheme), Err(Loss::Order)));
        let wider = Scheme { grid: int(5, false, group(1)).grid, ..mapped.scheme };
        assert_eq!(mapped.recast(wider).unwrap().dequantize(), mapped.dequantize());
        // Steps between neighbouring levels are what makes a minimum whole.
        let minimum = |m: f32| Quantized {
            scheme: Scheme::block(BlockType::Q4_1),
            shape: [1, 32],
            codes: (0..32).map(|i| i % 16).collect(),
            scales: vec![0.25, m],
            zeros: vec![],
            group_of: vec![],
            input: None,
        };
        let to = int(4, false, group(32));
        assert_eq!(minimum(-1.25).recast(to).unwrap().zeros, [5]);
        assert_eq!(minimum(-1.25).recast(to).unwrap().recast(Scheme::block(BlockType::Q4_1)).unwrap(), minimum(-1.25));
        for m in [-1.3, 0.25, -4.0] {
            assert_eq!(minimum(m).recast(to), Err(Loss::Zero { row: 0, group: 0 }), "{m}");
        }
    }
}
