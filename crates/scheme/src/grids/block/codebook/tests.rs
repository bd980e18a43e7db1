//! Searches against brute force, tables against searches, and the rules of codes.

use super::*;
use crate::miri::{FEW, times};

struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % n
    }

    fn real(&mut self) -> f32 {
        self.below(1 << 20) as f32 / (1 << 19) as f32 - 1.0
    }
}

static BOOKS: [(&Codebook, &[i8]); 7] = [
    (&IQ2_XXS, &super::super::IQ2),
    (&IQ2_XS, &super::super::IQ2),
    (&IQ2_S, &super::super::IQ2),
    (&IQ3_XXS, &super::super::IQ3_XXS),
    (&IQ3_S, &super::super::IQ3_S),
    (&IQ1_S, &super::super::IQ1_S),
    (&IQ1_M, &super::super::IQ1_M),
];

/// The codebooks whose tables Miri has the time to make, and natively all.
fn with_tables() -> impl Iterator<Item = (&'static Codebook, &'static [i8])> {
    BOOKS.into_iter().filter(|(book, _)| !FEW || std::ptr::eq(*book, &IQ3_S))
}

/// Calls `each` with every point of a codebook.
fn every_point(book: &Codebook, mut each: impl FnMut(&[u8])) {
    let (parts, mut codes) = (book.unit / book.len, [0u8; UNIT]);
    let codes = &mut codes[..book.unit];
    for which in 0..book.vectors.pow(parts as u32) {
        for flags in 0..1 << book.flags.bits(book.unit) {
            let mut rest = which;
            for vector in codes.chunks_mut(book.len) {
                book.vector(rest % book.vectors, vector);
                rest /= book.vectors;
            }
            book.set_flags(flags, codes);
            each(codes);
        }
    }
}

/// The cost by its definition; stops where it has reached `best`.
fn cost(levels: &[i8], codes: &[u8], centre: &[f32], metric: &Metric, best: f32) -> f32 {
    let (mut total, mut errors) = (0.0, [0.0f32; UNIT]);
    for (k, &c) in codes.iter().enumerate() {
        errors[k] = f32::from(levels[usize::from(c)]) - centre[k];
        let e: f32 = errors[k] + (0..k).map(|j| errors[j] * metric.u[j][k]).sum::<f32>();
        total += metric.d[k] * e * e;
        if total >= best {
            break;
        }
    }
    total
}

#[test]
fn the_search_finds_what_brute_force_finds() {
    let mut r = Random(3);
    for (book, levels) in with_tables() {
        let top = f32::from(levels.iter().copied().max().unwrap());
        let trials = if book.unit > book.len { 2 } else { 4 };
        for trial in 0..trials {
            let centre: Vec<f32> = (0..book.unit).map(|_| 1.2 * top * r.real() * r.real().abs().sqrt()).collect();
            let costs: Vec<f32> = (0..book.unit).map(|_| (2.0 * r.real()).exp()).collect();
            let mut metric = Metric::diagonal(&costs);
            if trial % 2 == 1 {
                metric.u.iter_mut().flatten().for_each(|u| *u = 0.6 * r.real());
            }
            let mut best = f32::INFINITY;
            every_point(book, |codes| best = best.min(cost(levels, codes, &centre, &metric, best)));
            let mut found = vec![0u8; book.unit];
            let said = book.nearest(&centre, &metric, f32::INFINITY, &mut found).unwrap();
            let is = cost(levels, &found, &centre, &metric, f32::INFINITY);
            assert!(book.holds(&found) && (said - is).abs() <= 1e-4 * is, "{said} {is}");
            assert!(is <= best * (1.0 + 1e-5), "{is} where {best} is possible");
            if trial % 2 == 0 {
                book.near(&centre, &costs, &mut found);
                let near = cost(levels, &found, &centre, &metric, f32::INFINITY);
                assert!(book.holds(&found) && near >= best * (1.0 - 1e-5), "{near} where {best} is the least");
                book.nearest_apart(&centre, &costs, &mut found);
                let is = cost(levels, &found, &centre, &metric, f32::INFINITY);
                assert!(book.holds(&found) && is <= best * (1.0 + 1e-5), "{is} where {best} is possible");
            }
            // No point is nearer than the nearest, and it is found again under any bound above its cost.
            assert!(book.nearest(&centre, &metric, is * 0.999, &mut found).is_none());
            assert!(book.nearest(&centre, &metric, is * 1.001, &mut found).is_some());
        }
    }
}

#[test]
fn points_by_table_are_near() {
    let mut r = Random(11);
    for (book, levels) in with_tables() {
        let top = f32::from(levels.iter().copied().max().unwrap());
        let (mut near, mut nearest) = (0.0, 0.0);
        for _ in 0..times(400) {
            let centre: Vec<f32> = (0..book.unit).map(|_| top * r.real() * r.real().abs().sqrt()).collect();
            let costs = vec![1.0; book.unit];
            let metric = Metric::diagonal(&costs);
            let mut found = vec![0u8; book.unit];
            book.near(&centre, &costs, &mut found);
            assert!(book.holds(&found));
            near += cost(levels, &found, &centre, &metric, f32::INFINITY);
            book.nearest_apart(&centre, &costs, &mut found);
            nearest += cost(levels, &found, &centre, &metric, f32::INFINITY);
        }
        assert!(FEW || near < 1.25 * nearest, "{near} where {nearest} is possible");
    }
}

#[test]
fn what_is_stored_comes_back() {
    let mut r = Random(5);
    for (book, levels) in BOOKS {
        assert!(book.vectors.is_power_of_two() && book.codes() == levels.len());
        for _ in 0..times(500) {
            let mut codes = vec![0u8; book.unit];
            let indices: Vec<usize> = (0..book.unit / book.len).map(|_| r.below(book.vectors)).collect();
            codes.chunks_mut(book.len).zip(&indices).for_each(|(v, &i)| book.vector(i, v));
            let flags = r.below(1 << book.flags.bits(book.unit));
            book.set_flags(flags, &mut codes);
            assert!(book.holds(&codes));
            assert_eq!(book.stored_flags(&codes), Some(flags));
            assert!(codes.chunks(book.len).zip(&indices).all(|(v, &i)| book.index(v) == Some(i)));
            // One flag of eight turned breaks the rule, where there is one.
            if matches!(book.flags, Flags::Even | Flags::Alike) {
                let at = r.below(book.unit);
                let digits = book.digits as u8;
                codes[at] = if codes[at] < digits { codes[at] + digits } else { codes[at] - digits };
                assert!(!book.holds(&codes));
            }
        }
        assert!(!book.holds(&vec![levels.len() as u8; book.unit]));
        let all = times(2000);
        let listed = (0..all).filter(|_| {
            let codes: Vec<u8> = (0..book.len).map(|_| r.below(book.digits) as u8).collect();
            book.index(&codes).is_some()
        });
        assert!(listed.count() < all / 2, "most vectors are not in the book");
    }
}

#[test]
fn a_metric_is_its_matrix() {
    let mut r = Random(7);
    let x: Vec<[f32; 8]> = (0..20).map(|_| std::array::from_fn(|_| r.real())).collect();
    let m = |i: usize, j: usize| x.iter().map(|x| x[i] * x[j]).sum::<f32>();
    let metric = Metric::of(8, m);
    let e: [f32; 8] = std::array::from_fn(|_| r.real());
    let product = |v: &[f32; 8], i: usize| (0..8).map(|j| m(i, j) * v[j]).sum::<f32>();
    let direct: f32 = (0..8).map(|i| e[i] * product(&e, i)).sum();
    let split: f32 =
        (0..8).map(|k| metric.d[k] * (e[k] + (0..k).map(|j| e[j] * metric.u[j][k]).sum::<f32>()).powi(2)).sum();
    assert!((direct - split).abs() < 1e-4 * direct);
    let mut y = e;
    metric.solve(&mut y);
    assert!((0..8).all(|i| (product(&y, i) - e[i]).abs() < 1e-4));
}
