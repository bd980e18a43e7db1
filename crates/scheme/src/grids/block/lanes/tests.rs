//! Tests of the fits side by side.

use super::super::BlockParams;
use super::super::fit::tests::sample;
use super::*;
use crate::miri::{FEW, blocks, small_blocks};

fn loss(form: &BlockForm, params: &[BlockParams], codes: &[u8], w: &[f32], h: &[f32]) -> f64 {
    let value = |i: usize| {
        let a = form.affine(&params[i / form.len], i % form.len / form.sub);
        f64::from(h[i]) * f64::from(w[i] - form.value(codes[i], a)).powi(2)
    };
    (0..w.len()).map(value).sum()
}

fn fitted(form: &BlockForm, w: &[f32], h: Option<&[f32]>) -> (Vec<BlockParams>, Vec<u8>) {
    let blocks = w.len() / form.len;
    let (mut reals, mut integers) = (vec![0.0; blocks * form.reals()], vec![0; blocks * form.integers()]);
    let mut codes = vec![0; w.len()];
    form.fit_lanes(w, h, Fitted { reals: &mut reals, integers: &mut integers, codes: &mut codes });
    let params = |block: usize| {
        let mut p = BlockParams::zero();
        let (reals, integers) =
            (reals.chunks(form.reals().max(1)).nth(block), integers.chunks(form.integers().max(1)).nth(block));
        p.reals.iter_mut().zip(reals.into_iter().flatten()).for_each(|(to, &real)| *to = real);
        p.integers.iter_mut().zip(integers.into_iter().flatten()).for_each(|(to, &integer)| *to = integer);
        p
    };
    ((0..blocks).map(params).collect(), codes)
}

#[test]
#[cfg_attr(miri, ignore = "compares many fits; each runs in the other tests")]
fn fewer_starting_points_cost_little() {
    for form in blocks().filter(|f| f.has_lanes()) {
        let (mut ours, mut full) = (0.0, 0.0);
        for seed in 0..20 {
            let (w, h) = sample(LANES * form.lane(), seed);
            for h in [&h, &vec![1.0; w.len()]] {
                let (params, codes) = fitted(form, &w, Some(h));
                ours += loss(form, &params, &codes, &w, h);
                let params: Vec<BlockParams> =
                    w.chunks(form.len).zip(h.chunks(form.len)).map(|(w, h)| form.fit(w, h)).collect();
                let code = |(i, &x): (usize, &f32)| {
                    form.nearest(x, form.affine(&params[i / form.len], i % form.len / form.sub))
                };
                let codes: Vec<u8> = w.iter().enumerate().map(code).collect();
                full += loss(form, &params, &codes, &w, h);
            }
        }
        assert!(ours < 1.06 * full, "{}: {ours} against {full}", form.name);
    }
}

#[test]
fn what_is_stored_is_what_was_rounded_to() {
    for form in small_blocks().filter(|f| f.has_lanes()) {
        let (w, h) = sample(LANES * form.lane(), 77);
        let same = |x: f32| vec![x; LANES * form.lane()];
        for w in [w, same(0.0), same(3e4), same(1e-9)].into_iter().take(if FEW { 1 } else { 4 }) {
            let (params, codes) = fitted(form, &w, Some(&h));
            for (i, (&x, &code)) in w.iter().zip(&codes).enumerate() {
                let p = &params[i / form.len];
                assert!(p.reals.iter().all(|&r| r.is_finite() && half(r) == r));
                let a = form.affine(p, i % form.len / form.sub);
                let (own, nearest) = (form.value(code, a), form.value(form.nearest(x, a), a));
                let slack = 1e-5 * (a.scale.abs() * 128.0 + x.abs());
                assert!((x - own).abs() <= (x - nearest).abs() + slack, "{}: {own} {nearest} for {x}", form.name);
                assert!(x != 0.0 || w[0] != 0.0 || own == 0.0, "{}: zeros stay zero", form.name);
            }
        }
    }
}

#[test]
fn a_block_is_fitted_alike_in_any_company() {
    for form in blocks().filter(|f| f.has_lanes()) {
        let (w, h) = sample(LANES * form.lane(), 5);
        let (params, codes) = fitted(form, &w, Some(&h));
        let at = w.len() - form.len;
        let (alone, own) = fitted(form, &w[at..], Some(&h[at..]));
        assert_eq!((alone[0], &own[..]), (params[params.len() - 1], &codes[at..]), "{}", form.name);
    }
}

#[test]
fn without_costs_every_error_costs_one_or_by_size() {
    for form in small_blocks().filter(|f| f.has_lanes()) {
        let (w, _) = sample(LANES * form.lane(), 6);
        let costs: Vec<f32> = if !form.weighs_by_size() {
            vec![1.0; w.len()]
        } else {
            let sigma = |w: &[f32]| (w.iter().fold(0.0, |sum, x| x.mul_add(*x, sum)) / w.len() as f32).sqrt();
            w.chunks(form.sub).flat_map(|w| w.iter().map(move |x| sigma(w) + x.abs())).collect()
        };
        assert_eq!(fitted(form, &w, Some(&costs)), fitted(form, &w, None), "{}", form.name);
    }
}
