//! The allocator against enumeration, a plain table over bytes, and the closed form for Gaussian sources.

use super::*;
use crate::sweep::tests::Random;
use proptest::prelude::*;

fn all(options: &[(u64, f64)]) -> Vec<Option<Choice>> {
    options.iter().map(|&(bytes, loss)| Some(Choice { bytes, loss })).collect()
}

fn apart(n: usize) -> Vec<usize> {
    (0..n).collect()
}

/// Least loss within the budget by looking at every allocation.
fn enumerated(tables: &[Vec<Option<Choice>>], ties: &[usize], budget: u64) -> Option<f64> {
    let options = tables[0].len();
    let mut best: Option<f64> = None;
    for mut code in 0..options.pow(tables.len() as u32) {
        let picked: Vec<usize> = (tables.iter())
            .map(|_| {
                let k = code % options;
                code /= options;
                k
            })
            .collect();
        let tied = (0..picked.len()).all(|a| (0..a).all(|b| ties[a] != ties[b] || picked[a] == picked[b]));
        let choices: Option<Vec<Choice>> = tables.iter().zip(&picked).map(|(t, &k)| t[k]).collect();
        let Some(choices) = choices.filter(|_| tied) else { continue };
        if choices.iter().map(|c| c.bytes).sum::<u64>() <= budget {
            let loss = choices.iter().map(|c| c.loss).sum::<f64>();
            best = Some(best.map_or(loss, |b| b.min(loss)));
        }
    }
    best
}

/// Least loss within the budget by the plain dynamic program, one cell per byte.
fn tabulated(tables: &[Vec<Option<Choice>>], budget: u64) -> f64 {
    let mut best = vec![0.0; budget as usize + 1];
    for table in tables {
        let cell = |room: usize| {
            let fits = table.iter().flatten().filter(|c| c.bytes as usize <= room);
            fits.map(|c| c.loss + best[room - c.bytes as usize]).fold(f64::INFINITY, f64::min)
        };
        best = (0..=budget as usize).map(cell).collect();
    }
    best[budget as usize]
}

/// Whether a result is what it says and fits.
fn consistent(result: &Allocation, tables: &[Vec<Option<Choice>>], budget: u64) {
    let choices: Vec<Choice> = tables.iter().zip(&result.options).map(|(t, &k)| t[k].unwrap()).collect();
    assert_eq!(choices.iter().map(|c| c.bytes).sum::<u64>(), result.bytes);
    assert!((choices.iter().map(|c| c.loss).sum::<f64>() - result.loss).abs() <= 1e-9 * result.loss.abs().max(1.0));
    assert!(result.bytes <= budget && result.bound <= result.loss * (1.0 + 1e-9) + 1e-9);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn small_cases_equal_enumeration(
        // Oracle 30. Coarse numbers make ties and dominated options common; a loss of 9 stands for "not allowed".
        raw in prop::collection::vec(prop::collection::vec((1u64..9, 0u32..10), 4), 1..=6),
        ties in prop::collection::vec(0usize..6, 6),
        tied: bool,
        budget in 1u64..40,
    ) {
        let option = |&(bytes, loss): &(u64, u32)| (loss < 9).then(|| Choice { bytes, loss: f64::from(loss) * 0.3 });
        let tables: Vec<Vec<Option<Choice>>> = raw.iter().map(|t| t.iter().map(option).collect()).collect();
        let ties = if tied { ties[..tables.len()].to_vec() } else { apart(tables.len()) };
        match (allocate(&tables, &ties, budget), enumerated(&tables, &ties, budget)) {
            (Ok(result), Some(best)) => {
                consistent(&result, &tables, budget);
                prop_assert!((result.loss - best).abs() < 1e-9, "{} against {best}", result.loss);
                prop_assert!((0..tables.len()).all(|a| (0..a).all(|b| ties[a] != ties[b] || result.options[a] == result.options[b])));
            }
            (Err(_), None) => {}
            (result, best) => prop_assert!(false, "{result:?} against {best:?}"),
        }
    }
}

#[test]
fn eight_tensors_of_four_widths_equal_enumeration() {
    // Oracle 30 at its full size, with tables as rounding makes them: losses fall fourfold per bit, more or less.
    let mut r = Random::new(5);
    for _ in 0..3 {
        let tables: Vec<_> = (0..8)
            .map(|_| {
                let (size, c) = (16 + (r.unit() * 64.0) as u64, r.unit());
                all(&[2, 3, 4, 6].map(|b: u64| (size * b, c * 0.25f64.powi(b as i32) * (0.8 + 0.4 * r.unit()))))
            })
            .collect();
        let size: u64 = tables.iter().map(|t| t[0].unwrap().bytes / 2).sum();
        let result = allocate(&tables, &apart(8), size * 7 / 2).unwrap();
        consistent(&result, &tables, size * 7 / 2);
        let best = enumerated(&tables, &apart(8), size * 7 / 2).unwrap();
        assert!((result.loss - best).abs() <= 1e-12 * best);
    }
}

#[test]
fn middling_cases_equal_a_table_over_bytes() {
    let mut r = Random::new(11);
    for case in 0..40 {
        let tables: Vec<_> = (0..30)
            .map(|_| {
                let options: Vec<(u64, f64)> =
                    (0..6).map(|_| (1 + (r.unit() * 300.0) as u64, (r.unit() * 3.0).exp())).collect();
                all(&options)
            })
            .collect();
        let budget = 1200 + 150 * case;
        let Ok(result) = allocate(&tables, &apart(30), budget) else {
            assert!(tabulated(&tables, budget).is_infinite());
            continue;
        };
        consistent(&result, &tables, budget);
        let best = tabulated(&tables, budget);
        assert!((result.loss - best).abs() <= 1e-9 * best, "case {case}: {} against {best}", result.loss);
    }
}

/// 400 tensors × 20 options with sizes that share no divisor: a large model with everything irregular about it.
fn irregular(seed: u64) -> (Vec<Vec<Option<Choice>>>, u64) {
    let mut r = Random::new(seed);
    let tables: Vec<_> = (0..400)
        .map(|_| {
            let (weights, c) = (4e6 + r.unit() * 6e7, (r.unit() * 8.0).exp());
            let option = |i: usize| {
                let bits = 2.0 + 6.0 * (i as f64 / 19.0);
                ((weights * bits / 8.0 + r.unit() * 5000.0) as u64, c * 0.25f64.powf(bits) * (0.7 + 0.6 * r.unit()))
            };
            all(&(0..20).map(option).collect::<Vec<_>>())
        })
        .collect();
    let size: u64 = tables.iter().map(|t| t[0].unwrap().bytes / 2).sum();
    (tables, size * 7 / 2)
}

#[test]
fn large_irregular_models_take_few_states() {
    for seed in 0..4 {
        let (tables, budget) = irregular(seed);
        let result = allocate(&tables, &apart(400), budget).unwrap();
        consistent(&result, &tables, budget);
        eprintln!("{} states, {} of the bound", result.states, result.loss / result.bound - 1.0);
        // A second is of the order of 50 million sums on any machine in use.
        assert!(result.states < 5_000_000, "{} states", result.states);
        // Within one tensor of the relaxation.
        assert!(result.loss - result.bound < 1e-3 * result.bound);
    }
}

#[test]
fn equal_tensors_get_equal_widths_and_many_ties_stay_cheap() {
    let table = all(&[2, 3, 4, 6, 8].map(|b: u64| (1000 * b, 0.25f64.powi(b as i32))));
    let tables = vec![table; 400];
    for bits in [2u64, 3, 4, 6, 8] {
        let result = allocate(&tables, &apart(400), 400_000 * bits).unwrap();
        assert!(result.options.iter().all(|&k| k == result.options[0]));
        assert_eq!(result.bytes, 400_000 * bits);
    }
    let between = allocate(&tables, &apart(400), 1_400_500).unwrap();
    consistent(&between, &tables, 1_400_500);
    assert_eq!(between.options.iter().filter(|&&k| k == 2).count(), 200, "half 3, half 4 bits; 500 bytes are no step");
    assert!(between.states < 1_000_000, "{}", between.states);
}

#[test]
fn gaussian_tensors_get_the_widths_of_reverse_water_filling() {
    // Oracle 31: with losses c·4^−b and equal sizes, b_l = b̄ + ½·log₂(c_l / geometric mean), here on a grid of 1/64 bit.
    let mut r = Random::new(3);
    let costs: Vec<f64> = (0..24).map(|_| (r.unit() * 4.0 - 2.0).exp()).collect();
    let log_mean = costs.iter().map(|c| c.log2()).sum::<f64>() / 24.0;
    let widths: Vec<f64> = (0..=448).map(|i| 1.0 + f64::from(i) / 64.0).collect();
    let option = |c: f64| move |&b: &f64| ((b * 64.0) as u64, c * 4f64.powf(-b));
    let tables: Vec<_> = costs.iter().map(|&c| all(&widths.iter().map(option(c)).collect::<Vec<_>>())).collect();
    let result = allocate(&tables, &apart(24), (4.0 * 64.0 * 24.0) as u64).unwrap();
    assert_eq!(result.bytes, 4 * 64 * 24, "losses fall with every byte, so every byte is used");
    for (c, &k) in costs.iter().zip(&result.options) {
        let ideal = 4.0 + 0.5 * (c.log2() - log_mean);
        assert!((widths[k] - ideal).abs() <= 1.0 / 64.0, "{} against {ideal}", widths[k]);
    }
}

#[test]
fn the_budget_is_used_up_to_one_step() {
    let (tables, budget) = irregular(9);
    for share in [0.7, 0.9, 1.0, 1.3] {
        let budget = (budget as f64 * share) as u64;
        let result = allocate(&tables, &apart(400), budget).unwrap();
        for (table, &k) in tables.iter().zip(&result.options) {
            let now = table[k].unwrap();
            let better = table.iter().flatten().filter(|c| c.loss < now.loss);
            let fits = better.filter(|c| result.bytes - now.bytes + c.bytes <= budget).count();
            assert_eq!(fits, 0, "a tensor could still be improved");
        }
    }
}

#[test]
fn what_cannot_be_is_said() {
    let tables = [all(&[(5, 1.0), (9, 0.0)]), all(&[(7, 1.0), (9, 0.0)])];
    assert_eq!(allocate(&tables, &[0, 1], 11), Err(Impossible::Budget { least: 12, budget: 11 }));
    let one = |k: usize| (0..2).map(|i| (i == k).then_some(Choice { bytes: 1, loss: 1.0 })).collect::<Vec<_>>();
    assert_eq!(allocate(&[one(0), one(1)], &[3, 3], 9), Err(Impossible::NoOption { tensor: 0 }));
    assert_eq!(allocate(&[one(0), one(1)], &[3, 4], 9).unwrap().options, [0, 1]);
    let nothing = allocate(&[], &[], 0).unwrap();
    assert_eq!((nothing.options.len(), nothing.bytes), (0, 0));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    /// With cross terms: never above the additive optimum, within the budget, and near the best of all allocations.
    #[test]
    fn cross_terms_are_searched(seed in 0u64..1_000_000) {
        let mut r = Random::new(seed);
        let (n, k) = (6, 4);
        let mut tables: Vec<Vec<Option<Choice>>> = Vec::new();
        for _ in 0..n {
            let (size, c) = (20.0 + 80.0 * r.unit(), (1.5 * r.normal()).exp());
            let option = |b: usize| Choice { bytes: (size * (b + 2) as f64) as u64, loss: c * 0.25f64.powi(b as i32) };
            tables.push((0..k).map(|b| Some(option(b))).collect());
        }
        // Half the correlations of random vectors: whole ones could cancel, and a local optimum be any multiple of the best.
        let vectors: Vec<Vec<f64>> = (0..n).map(|_| (0..4).map(|_| r.normal() + 0.3).collect()).collect();
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
        let of = |a: usize, b: usize| dot(&vectors[a], &vectors[b]) / (dot(&vectors[a], &vectors[a]) * dot(&vectors[b], &vectors[b])).sqrt() / 2.0;
        let cross: Vec<f64> = (0..n * n).map(|i| if i / n == i % n { 1.0 } else { of(i / n, i % n) }).collect();
        let value = |picked: &[usize]| -> f64 {
            let d: Vec<f64> = tables.iter().zip(picked).map(|(t, &k)| t[k].unwrap().loss.sqrt()).collect();
            (0..n * n).map(|i| cross[i] * d[i / n] * d[i % n]).sum()
        };
        let budget = tables.iter().map(|t| t[1].unwrap().bytes).sum::<u64>() + 17;
        let plain = allocate(&tables, &apart(n), budget).unwrap();
        let found = allocate_crossed(&tables, &apart(n), budget, Some(&cross)).unwrap();
        prop_assert!(found.bytes <= budget);
        prop_assert!((found.loss - value(&found.options)).abs() < 1e-9 * (1.0 + found.loss));
        prop_assert!(found.loss <= value(&plain.options) * (1.0 + 1e-9));
        let mut best = f64::INFINITY;
        for mut code in 0..k.pow(n as u32) {
            let picked: Vec<usize> = (0..n).map(|_| { let o = code % k; code /= k; o }).collect();
            let bytes: u64 = tables.iter().zip(&picked).map(|(t, &k)| t[k].unwrap().bytes).sum();
            if bytes <= budget { best = best.min(value(&picked)); }
        }
        prop_assert!(found.loss <= 1.5 * best + 1e-12, "{} against {best}", found.loss);
        // Without correlations it is the knapsack.
        let identity: Vec<f64> = (0..n * n).map(|i| f64::from(u8::from(i / n == i % n))).collect();
        let same = allocate_crossed(&tables, &apart(n), budget, Some(&identity)).unwrap();
        prop_assert!((same.loss - plain.loss).abs() < 1e-12 * (1.0 + plain.loss));
    }
}
