//! Oracle 15 of the methods, and the original program's own results.

use super::*;
use crate::loss;
use crate::sweep::tests::{gptq_factor, random_h, random_w};
use bitmill_checkpoint::Checkpoint;
use serde_json::json;

const N: usize = 256;

fn factor(h: &[f32], damping: f32) -> Factor {
    let n = h.len().isqrt();
    Factor::new(h, &Order::natural(n).columns, damping).unwrap()
}

fn identity(n: usize) -> Vec<f32> {
    (0..n * n).map(|i| f32::from(u8::from(i % (n + 1) == 0))).collect()
}

/// Nothing salient, nothing below the threshold: every weight in one part.
fn whole(block: &Block<'_>) -> Choice {
    Choice { salient: vec![false; block.cost.len()], threshold: 0.0 }
}

fn total(w: &[f32], q: &Quantized, h: &[f32]) -> f64 {
    loss(w, &q.dequantize(), h).iter().sum()
}

#[test]
fn without_salient_columns_and_split_it_is_plain_binarization() {
    // Oracle 15, bit for bit.
    let w = random_w(10 * N, 1);
    let linear = Linear::new("x", &w, [10, N], Scheme::binary(128));
    let factor = factor(&identity(N), 0.0);
    let q = swept(&linear, &factor, whole);
    let plain: Vec<f32> = w
        .chunks(128)
        .flat_map(|group| {
            let fit = Binary::fit(group.iter().copied()).rounded();
            group.iter().map(move |&x| fit.value(fit.plus(x)))
        })
        .collect();
    assert_eq!(q.dequantize(), plain);
    assert!(q.salient().iter().all(|s| !s));
    q.validate().unwrap();
}

#[test]
fn every_part_of_it_lowers_the_loss() {
    for seed in 0..4 {
        let (h, w) = (random_h(N, 10 + seed), random_w(48 * N, 20 + seed));
        let linear = Linear::new("x", &w, [48, N], Scheme::binary(128));
        // Where H is the identity, nothing is fed back.
        let (deaf, factor) = (factor(&identity(N), 0.0), factor(&h, 0.01));
        let plain = total(&w, &swept(&linear, &deaf, whole), &h);
        let alone = total(&w, &swept(&linear, &deaf, |block| block.choose()), &h);
        let fed_back = total(&w, &swept(&linear, &factor, whole), &h);
        let all = Billm.solve(&[linear], Some(&h), &SolverOptions::default()).unwrap().remove(0);
        let all = total(&w, &all.quantized, &h);
        assert!(all < alone && alone < plain, "{all} {alone} {plain}");
        assert!(all < fed_back && fed_back < plain, "{all} {fed_back} {plain}");
        assert!(all < 0.5 * plain, "half of it, and more: {all} {plain}");
    }
}

#[test]
fn inside_a_block_errors_are_fed_back_as_gptq_does() {
    // The definition, column by column: of the values of its part, each has the nearest to what is left for it.
    let (h, w) = (random_h(N, 51), random_w(6 * N, 52));
    let factor = factor(&h, 0.01);
    let linear = Linear::new("x", &w, [6, N], Scheme::binary(128));
    let q = swept(&linear, &factor, |block| block.choose());
    let value = q.dequantize();
    for (row, (value, w)) in value.chunks(N).zip(w.chunks(N)).enumerate() {
        for k in 0..N {
            let fed = (0..k).map(|j| f64::from(value[j] - w[j]) * f64::from(factor.unit()[j * N + k])).sum::<f64>();
            let wanted = (f64::from(w[k]) - fed) as f32;
            let (code, params) = (q.codes[row * N + k], q.binary(row, k / 128));
            let mine = if code & 4 == 0 { code & 2..(code & 2) + 2 } else { 4..8 };
            let least = mine.map(|c| (params.value(c) - wanted).abs()).fold(f32::INFINITY, f32::min);
            assert!((value[k] - wanted).abs() <= least + 1e-4, "{row} {k}: {} {wanted} {least}", value[k]);
        }
    }
}

#[test]
fn columns_that_cost_most_are_salient_and_some_always_are() {
    let (mut h, w) = (identity(N), random_w(32 * N, 31));
    for col in [3, 77, 200] {
        h[col * (N + 1)] = 400.0;
    }
    let linear = Linear::new("x", &w, [32, N], Scheme::binary(128));
    let q = Billm.solve(&[linear], Some(&h), &SolverOptions::default()).unwrap().remove(0).quantized;
    let salient = q.salient();
    assert!([3, 77, 200].iter().all(|&col| salient[col]));
    for half in salient.chunks(128) {
        let count = half.iter().filter(|s| **s).count();
        assert!((1..=49).contains(&count), "{count}");
    }
}

#[test]
fn parts_and_numbers_are_the_original_programs() {
    // The golden file of tools/reference/billm.py. The original finds columns and threshold among saliencies or among weights, rounds a
    // block at once, and feeds errors back by rows of U over their diagonal.
    let bytes = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/billm.safetensors")).unwrap();
    let golden = Checkpoint::in_memory(json!({}), bytes).unwrap();
    let read = |name: &str| golden.tensor(name).unwrap().to_f32().unwrap();
    let (weight, h) = (read("weight"), read("hessian"));
    let factor = factor(&h, 0.01);
    let u = gptq_factor(&crate::factor::damped(&h, N, 0.01), N);
    let (rows, len) = (weight.len() / N, 128);
    for metric in ["hessian", "magnitude"] {
        let (theirs, parts) = (read(&format!("{metric}.rounded")), read(&format!("{metric}.parts")));
        let mut w = weight.clone();
        for start in (0..N).step_by(len) {
            let cost = &factor.diagonal()[start..start + len];
            let target: Vec<f32> = w.chunks(N).flat_map(|row| &row[start..start + len]).copied().collect();
            let each = target.iter().zip(cost.iter().cycle());
            let values =
                if metric == "hessian" { each.map(|(w, cost)| w * w * cost).collect() } else { target.clone() };
            let choice = Block { target: &values, cost }.choose_by(|value, _| value.abs());
            for row in 0..rows {
                let (_, own) = fitted(&values[row * len..][..len], &choice);
                let target = &target[row * len..][..len];
                let of = |part| target.iter().zip(&own).filter(move |(_, p)| **p == part).map(|(&w, _)| w);
                let once = [Part::Concentrated, Part::Sparse]
                    .map(|part| Binary::fit(of(part).collect::<Vec<_>>().into_iter()));
                let twice = Residual::fit(of(Part::Salient).collect::<Vec<_>>().into_iter());
                for k in 0..len {
                    let at = row * N + start + k;
                    let (code, value) = match own[k] {
                        Part::Salient => (2.0, twice.value(twice.plus(target[k]))),
                        part => {
                            let fit = once[usize::from(part == Part::Sparse)];
                            (f32::from(u8::from(part == Part::Sparse)), fit.value(fit.plus(target[k])))
                        }
                    };
                    assert_eq!(code, parts[at], "{metric} {at}");
                    assert!(
                        (value - theirs[at]).abs() <= 1e-4 * value.abs() + 1e-6,
                        "{metric} {at}: {value} {}",
                        theirs[at]
                    );
                    let j = start + k;
                    for later in start + len..N {
                        let share = u[j * N + later] / u[j * (N + 1)];
                        w[row * N + later] += ((f64::from(value) - f64::from(target[k])) * share) as f32;
                    }
                }
            }
        }
    }
}
