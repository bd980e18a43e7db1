//! Inputs of quantized linears: how they are rounded at run time, and the definition of the numbers they become.
//!
//! Integers and 8-bit floats have scales per token that the run makes up itself, and so have the MX types, per 32 inputs. What a
//! tensor-wide scale is, or the divisor of NVFP4's scales, is stored with the weight: calibration says it beforehand.

use crate::grids::int::round_small;
use crate::{Fit, FloatGrid, FloatType, Grid, ScaleType};
use serde::{Deserialize, Serialize};

/// How the input of a quantized linear is rounded at run time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activations {
    /// Left in the model's own type: weight-only quantization.
    Full,
    /// Symmetric 8-bit integers, one scale per token computed from that token's largest magnitude.
    DynamicInt8,
    /// E4M3 numbers, one scale per token computed likewise.
    DynamicFp8,
    /// E4M3 numbers, one scale per token and 128 inputs.
    DynamicFp8Groups,
    /// E4M3 numbers, one scale for all tokens, from calibration.
    StaticFp8,
    /// E2M1 numbers, one E4M3 scale per token and 16 inputs, over a divisor of all scales from calibration.
    Nvfp4,
    /// E2M1 numbers, one power of two per token and 32 inputs.
    Mxfp4,
    /// E4M3 numbers, one power of two per token and 32 inputs.
    Mxfp8,
}

impl Activations {
    /// All but those that round nothing.
    pub const ROUNDING: [Activations; 7] = [
        Activations::DynamicInt8,
        Activations::DynamicFp8,
        Activations::DynamicFp8Groups,
        Activations::StaticFp8,
        Activations::Nvfp4,
        Activations::Mxfp4,
        Activations::Mxfp8,
    ];

    /// Whether a number of calibration's is stored for it.
    #[must_use]
    pub const fn is_calibrated(self) -> bool {
        matches!(self, Activations::StaticFp8 | Activations::Nvfp4)
    }

    /// That number, for inputs whose largest magnitude is `amax`: the scale of [`Activations::StaticFp8`], a value of type
    /// `scale`, or the divisor of [`Activations::Nvfp4`], a power of two that leaves room for inputs up to twice as large.
    #[must_use]
    pub fn calibrated(self, amax: f32, scale: ScaleType) -> Option<f32> {
        match self {
            Activations::StaticFp8 => {
                let wide = if scale.is_wide() { scale } else { ScaleType::F32 };
                Some(FloatGrid { float: FloatType::E4m3, scale: wide, divisor: 1.0 }.fit(&[amax], Fit::MinMax).scale)
            }
            Activations::Nvfp4 => Some(FloatGrid::divisor_for(FloatType::E2m1, amax)),
            _ => None,
        }
    }

    /// Inputs that share a scale in a row of `width`.
    #[must_use]
    pub const fn group(self, width: usize) -> usize {
        match self {
            Activations::Nvfp4 => 16,
            Activations::Mxfp4 | Activations::Mxfp8 => 32,
            Activations::DynamicFp8Groups => 128,
            _ => width,
        }
    }
}

/// How the input of one linear is rounded.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Inputs {
    /// The kind.
    pub activations: Activations,
    /// What calibration stored for it; 1 where that is nothing.
    pub stored: f32,
}

impl Inputs {
    /// Inputs as they are.
    pub const FULL: Inputs = Inputs { activations: Activations::Full, stored: 1.0 };

    /// Rounds `row`, the inputs of one token, by the rules of compressed-tensors.
    pub fn round(self, row: &mut [f32]) {
        if row.is_empty() || self.activations == Activations::Full {
            return;
        }
        for group in row.chunks_mut(self.activations.group(row.len())) {
            let scale = self.scale(group);
            match self.float() {
                Some(float) => group.iter_mut().for_each(|v| *v = float.value(float.nearest(*v / scale)) * scale),
                None => group.iter_mut().for_each(|v| *v = round_small((*v / scale).clamp(-128.0, 127.0)) * scale),
            }
        }
    }

    fn float(self) -> Option<FloatType> {
        match self.activations {
            Activations::Full | Activations::DynamicInt8 => None,
            Activations::Nvfp4 | Activations::Mxfp4 => Some(FloatType::E2m1),
            _ => Some(FloatType::E4m3),
        }
    }

    /// The scale of a group.
    fn scale(self, group: &[f32]) -> f32 {
        // Lanes, which compilers turn into vectors; no order changes a maximum.
        let mut most = [0.0f32; 8];
        let (lanes, rest) = group.as_chunks::<8>();
        lanes.iter().for_each(|lane| most.iter_mut().zip(lane).for_each(|(m, v)| *m = m.max(v.abs())));
        let amax = most.iter().chain(rest).fold(0.0f32, |a, v| a.max(v.abs()));
        match (self.activations, self.float()) {
            (Activations::StaticFp8, _) => self.stored,
            (Activations::Nvfp4, _) => {
                let float = FloatType::E4m3;
                let local = float.value(float.nearest(amax / FloatType::E2m1.max() * self.stored));
                // The library's guard for scales that round to zero.
                (if local == 0.0 { 0.125 } else { local }) / self.stored
            }
            (Activations::Mxfp4 | Activations::Mxfp8, Some(float)) => {
                FloatGrid { float, scale: ScaleType::E8m0, divisor: 1.0 }.fit(&[amax], Fit::MinMax).scale
            }
            (_, float) => match amax / float.map_or(127.5, FloatType::max) {
                // Its guard for zeros alone.
                0.0 => f32::EPSILON,
                scale => scale,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rounded(activations: Activations, stored: f32, row: &[f32]) -> Vec<f32> {
        let mut row = row.to_vec();
        Inputs { activations, stored }.round(&mut row);
        row
    }

    #[test]
    fn every_kind_by_hand() {
        // A largest magnitude of 127.5 makes steps of 1: ties go to even, and what lies beyond the codes is clamped.
        let int8 = rounded(Activations::DynamicInt8, 1.0, &[127.5, 0.5, -2.5, 12.75, -127.5]);
        assert_eq!(int8, [127.0, 0.0, -2.0, 13.0, -128.0]);
        // Beside 448 E4M3 numbers lie 32 apart, and what calibration did not see is clamped.
        assert_eq!(rounded(Activations::DynamicFp8, 1.0, &[448.0, 430.0, -17.5]), [448.0, 416.0, -18.0]);
        assert_eq!(rounded(Activations::StaticFp8, 0.5, &[224.0, 300.0, 1.0]), [224.0, 224.0, 1.0]);
        // 6 over a divisor of 1 is a scale of 1; 3.4 goes to 3, and a group of small numbers has a scale of its own.
        let mut row = [0.0f32; 32];
        (row[0], row[1], row[16], row[17]) = (6.0, 3.4, 0.75, -0.3);
        let out = rounded(Activations::Nvfp4, 1.0, &row);
        assert_eq!([out[0], out[1], out[16], out[17]], [6.0, 3.0, 0.75, -0.25]);
        // Powers of two: the largest, 7, has the mantissa 1.75 and counts as 8; 1.2 is 0.6 of its 2, which goes to 0.5.
        let mut row = [0.0f32; 32];
        (row[0], row[1]) = (7.0, 1.2);
        let out = rounded(Activations::Mxfp4, 1.0, &row);
        assert_eq!([out[0], out[1]], [8.0, 1.0]);
        assert_eq!(rounded(Activations::Mxfp8, 1.0, &row)[..2], [7.0, 1.25]);
    }

    #[test]
    fn zeros_stay_zeros_and_rounding_twice_is_rounding_once() {
        for activations in Activations::ROUNDING {
            let stored = activations.calibrated(3.0, ScaleType::Bf16).unwrap_or(1.0);
            assert_eq!(rounded(activations, stored, &[0.0; 128]), [0.0; 128], "{activations:?}");
            let row: Vec<f32> = (0..128).map(|i| ((i * 37 % 101) as f32 - 50.0) / 16.0).collect();
            let once = rounded(activations, stored, &row);
            let error: f32 = once.iter().zip(&row).map(|(a, b)| (a - b).powi(2)).sum();
            let energy: f32 = row.iter().map(|v| v * v).sum();
            assert!(error > 0.0 && error < 0.03 * energy, "{activations:?}: {error} of {energy}");
            if activations.is_calibrated() {
                assert_eq!(rounded(activations, stored, &once), once, "{activations:?}");
            }
        }
    }

    #[test]
    fn calibration_covers_what_it_saw() {
        assert_eq!(Activations::StaticFp8.calibrated(896.0, ScaleType::Bf16), Some(2.0));
        assert_eq!(Activations::StaticFp8.calibrated(0.0, ScaleType::Bf16), Some(1.0));
        // 2688 / 3 is 896, and the power of two below it 512.
        assert_eq!(Activations::Nvfp4.calibrated(3.0, ScaleType::E4m3), Some(512.0));
        assert_eq!(Activations::Mxfp4.calibrated(3.0, ScaleType::E8m0), None);
    }
}
