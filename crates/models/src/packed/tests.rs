//! Products with weights as they are stored are those of the dequantized ones.

use super::*;
use bitmill_scheme::{Bits, Scheme};

fn number(i: usize) -> f32 {
    ((i * 7919 + 13) % 1009) as f32 / 505.0 - 1.0
}

/// Rounded weights `[rows, cols]`, as a method would leave them.
fn quantized(bits: usize, symmetric: bool, granularity: Granularity, [rows, cols]: [usize; 2]) -> Quantized {
    let scheme = Scheme::int(Bits::ALL[bits - 1], symmetric, granularity);
    let groups = scheme.groups(cols);
    let scales = match granularity {
        Granularity::Tensor => 1,
        _ => rows * groups,
    };
    let code = |i: usize| (i * 7 % (1 << bits)) as u8;
    Quantized {
        scheme,
        shape: [rows, cols],
        codes: (0..rows * cols).map(code).collect(),
        scales: (0..scales).map(|i| scheme.scale.round(number(i).abs() + 0.1)).collect(),
        zeros: if symmetric { Vec::new() } else { (0..scales).map(code).collect() },
        group_of: match granularity {
            Granularity::Mapped(_) => (0..cols).map(|i| (i % groups) as u32).collect(),
            _ => Vec::new(),
        },
        input: None,
    }
}

#[test]
fn products_are_those_of_the_dequantized_weights() {
    let shape @ [rows, cols] = [20, 128];
    for (bits, symmetric, granularity) in [
        (4, true, Granularity::Group(64)),
        (3, false, Granularity::Group(32)),
        (8, true, Granularity::Channel),
        (5, false, Granularity::Tensor),
        (4, false, Granularity::Mapped(32)),
    ] {
        let q = quantized(bits, symmetric, granularity, shape);
        q.validate().unwrap();
        let dense = q.dequantize();
        let x: Vec<f32> = (0..3 * cols).map(number).collect();
        for (precision, bound) in [(Precision::Full, 1e-5), (Precision::Int8, 0.01)] {
            let weight = PackedWeight::new(&Weight::Quantized(q.clone()), precision).unwrap().unwrap();
            let mut y = vec![0.0; 3 * rows];
            weight.forward(&x, &mut y);
            for (i, y) in y.iter().enumerate() {
                let (x, w) = (&x[i / rows * cols..][..cols], &dense[i % rows * cols..][..cols]);
                let sum: f32 = x.iter().zip(w).map(|(x, w)| x * w).sum();
                let size: f32 = x.iter().zip(w).map(|(x, w)| (x * w).abs()).sum();
                assert!((y - sum).abs() < bound * size, "{granularity:?} {precision:?}: {y} {sum}");
            }
        }
    }
}

#[test]
fn memory_is_what_the_folder_takes() {
    let q = quantized(4, true, Granularity::Group(128), [64, 256]);
    let weight = PackedWeight::new(&Weight::Quantized(q.clone()), Precision::Int8).unwrap().unwrap();
    assert_eq!(weight.bytes() as f64 * 8.0, q.scheme.bits_per_weight(q.shape) * (64 * 256) as f64);
}

#[test]
fn what_no_kernel_reads_is_told() {
    let narrow = quantized(4, true, Granularity::Group(16), [8, 64]);
    assert!(PackedWeight::new(&Weight::Quantized(narrow), Precision::Int8).unwrap().is_none());
    let mut uneven = quantized(4, true, Granularity::Mapped(32), [8, 64]);
    uneven.group_of[0] = 1;
    assert!(PackedWeight::new(&Weight::Quantized(uneven), Precision::Int8).unwrap().is_none());
}
