//! Biases that make up for the mean of the rounding error, in closed form.

/// b + W·E[x] + E[h − ĥ] − Ŵ·E[x̂]: with it the mean of the output is what it was.
pub(crate) fn corrected_bias(
    bias: &[f32],
    w: &[f32],
    rounded: &[f32],
    [mean, drift, residual]: &[Vec<f32>; 3],
) -> Vec<f32> {
    let n = mean.len();
    let full: Vec<f32> = mean.iter().enumerate().map(|(i, m)| m + drift.get(i).copied().unwrap_or(0.0)).collect();
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
    let rows = w.chunks_exact(n).zip(rounded.chunks_exact(n)).enumerate();
    let new = |(i, (w, r)): (usize, (&[f32], &[f32]))| {
        let stream = residual.get(i).copied().map_or(0.0, f64::from);
        (f64::from(bias[i]) + dot(w, &full) + stream - dot(r, mean)) as f32
    };
    rows.map(new).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loss;
    use crate::seen::add_outer;
    use crate::sweep::tests::{Random, random_w};

    #[test]
    fn a_corrected_bias_keeps_the_mean_and_leaves_the_error_about_it() {
        // E‖(Ŵ−W)x + b − b₀‖² with the corrected bias is tr(Δ·(H − μμᵀ)·Δᵀ), and no other bias has less.
        let (n, m, tokens) = (6, 4, 200);
        let mut r = Random::new(8);
        let x: Vec<f32> = (0..tokens * n).map(|i| (r.normal() + (i % n) as f64) as f32).collect();
        let (w, bias) = (random_w(m * n, 1), random_w(m, 2));
        let rounded: Vec<f32> = w.iter().map(|v| (v * 2.0).round() / 2.0).collect();
        let mut stats = bitmill_calibrate::SiteStats::new(n);
        stats.add(&x);
        let mean = stats.mean();
        let new = corrected_bias(&bias, &w, &rounded, &[mean.clone(), Vec::new(), Vec::new()]);
        let error = |b: &[f32]| -> f64 {
            let one = |x: &[f32], i: usize| -> f64 {
                let delta = |j: usize| f64::from(rounded[i * n + j] - w[i * n + j]) * f64::from(x[j]);
                ((0..n).map(delta).sum::<f64>() + f64::from(b[i] - bias[i])).powi(2)
            };
            x.chunks(n).map(|x| (0..m).map(|i| one(x, i)).sum::<f64>()).sum::<f64>() / tokens as f64
        };
        let mut centred = stats.hessian();
        add_outer(-1.0, &mut centred, &mean, &mean);
        let predicted: f64 = loss(&w, &rounded, &centred).iter().sum();
        assert!((error(&new) / predicted - 1.0).abs() < 1e-4, "{} {predicted}", error(&new));
        for i in 0..m {
            for by in [-0.05, 0.05] {
                let mut other = new.clone();
                other[i] += by;
                assert!(error(&other) > error(&new));
            }
        }
        assert!(error(&new) < error(&bias));
    }
}
