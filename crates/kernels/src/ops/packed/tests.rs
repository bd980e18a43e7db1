//! Every level equals the definition bit by bit, and the definition equals dequantized weights.

use super::*;

fn number(i: usize) -> f32 {
    ((i * 7919 + 13) % 1009) as f32 / 505.0 - 1.0
}

/// Codes, scales and zero points of a matrix.
struct Case {
    form: PackedForm,
    codes: Vec<u8>,
    packed: Vec<u8>,
    scales: Vec<f32>,
    zeros: Vec<u8>,
}

impl Case {
    fn new(bits: u32, shape: [usize; 2], group: usize, symmetric: bool) -> Self {
        let form = PackedForm::new(bits, shape, group).unwrap();
        let most = (1u32 << bits) - 1;
        let code = |i: usize| (((i * 2_654_435_761) >> 7) as u32 % (most + 1)) as u8;
        let codes: Vec<u8> = (0..shape[0] * shape[1]).map(code).collect();
        let mut packed = vec![0; form.code_bytes()];
        form.pack(&codes, &mut packed);
        let (mut scales, mut zeros) = (vec![0.0; form.params()], vec![0; form.params()]);
        for row in 0..shape[0] {
            for group in 0..form.groups() {
                // A value of either 16-bit type.
                scales[form.param(row, group)] = bf16::from_f32(number(row * 31 + group) / 8.0).to_f32();
                zeros[form.param(row, group)] = code(row * 17 + group);
            }
        }
        if symmetric {
            zeros.clear();
        }
        Case { form, codes, packed, scales, zeros }
    }

    fn packed(&self) -> Packed<'_> {
        Packed { form: self.form, codes: &self.packed, scales: Scales::F32(&self.scales), zeros: &self.zeros }
    }

    fn dense(&self) -> Vec<f32> {
        let [_, cols] = self.form.shape();
        let value = |(i, &code): (usize, &u8)| {
            let at = self.form.param(i / cols, i % cols / self.form.group);
            let zero = self.zeros.get(at).map_or((1u32 << (self.form.bits - 1)) as f32, |&z| f32::from(z));
            self.scales[at] * (f32::from(code) - zero)
        };
        self.codes.iter().enumerate().map(value).collect()
    }
}

/// Rounded activations.
#[derive(PartialEq)]
struct Inputs {
    values: Vec<i8>,
    scales: Vec<f32>,
    sums: Vec<i32>,
}

impl Inputs {
    fn new(level: Level, x: &[f32], cols: usize) -> Self {
        let (tokens, chunks) = (x.len() / cols, cols.div_ceil(CHUNK));
        let (mut values, mut sums) = (vec![1; tokens * chunks * CHUNK], vec![1; tokens * chunks]);
        let mut scales = vec![1.0; tokens * cols.div_ceil(SPAN)];
        let out = RoundedMut { values: &mut values, scales: &mut scales, sums: &mut sums };
        round_activations(level, x, cols, out);
        Inputs { values, scales, sums }
    }

    fn rounded(&self) -> Rounded<'_> {
        Rounded { values: &self.values, scales: &self.scales, sums: &self.sums }
    }
}

#[test]
fn pieces_part_a_row_at_the_ends_of_groups_and_of_spans() {
    for (cols, group) in (1..40).flat_map(|i| [32, 64, 96, 128, 160, 256, 512].map(|group| (i * 31, group))) {
        let form = PackedForm::new(4, [8, cols], group).unwrap();
        let pieces: Vec<Range<usize>> = (0..form.spans()).flat_map(|span| form.pieces_of(span)).collect();
        assert_eq!(pieces.len(), form.pieces(), "{cols} {group}");
        assert!(pieces.windows(2).all(|two| two[0].end == two[1].start) && pieces[0].start == 0);
        assert_eq!(pieces[pieces.len() - 1].end, form.chunks());
        let chunks_apart = |i: usize| [form.group_chunks(), SPAN_CHUNKS].iter().any(|n| i.is_multiple_of(*n));
        for piece in pieces {
            assert!(piece.start < piece.end && (piece.start + 1..piece.end).all(|i| !chunks_apart(i)));
            assert!(chunks_apart(piece.start));
        }
    }
}

#[test]
fn codes_are_found_where_they_were_put() {
    for bits in 1..=8 {
        let case = Case::new(bits, [13, 70], 64, true);
        assert_eq!(case.packed.len() * 8, 16 * 96 * bits as usize, "bits per weight of a padded matrix");
        for (i, &code) in case.codes.iter().enumerate() {
            assert_eq!(case.form.code(&case.packed, i / 70, i % 70), code, "bits {bits}, {i}");
        }
    }
}

#[test]
fn every_level_equals_the_definition_and_the_dequantized_product() {
    for bits in 1..=8 {
        for (shape, group, symmetric) in [
            ([8, 32], 32, true),
            ([13, 70], 64, false),
            ([70, 200], 200, true),
            ([136, 256], 128, false),
            ([40, 350], 96, false),
            ([33, 480], 160, true),
            ([80, 300], 32, false),
        ] {
            let case = Case::new(bits, shape, group, symmetric);
            let [rows, cols] = shape;
            let (f16s, bf16s): (Vec<u16>, Vec<u16>) =
                case.scales.iter().map(|&s| (f16::from_f32(s).to_bits(), bf16::from_f32(s).to_bits())).unzip();
            for tokens in [1, 6, 45] {
                let x: Vec<f32> = (0..tokens * cols).map(number).collect();
                let (width, spans) = (case.form.chunks() * CHUNK, case.form.spans());
                let inputs = Inputs::new(Level::best(), &x, cols);
                let rounded = inputs.rounded();
                let seen: Vec<f32> = (0..tokens * cols)
                    .map(|i| {
                        let (token, col) = (i / cols, i % cols);
                        f32::from(inputs.values[token * width + col]) * inputs.scales[token * spans + col / SPAN]
                    })
                    .collect();
                for stored in [Scales::F32(&case.scales), Scales::Bf16(&bf16s), Scales::F16(&f16s)] {
                    let w = Packed { form: case.form, codes: &case.packed, scales: stored, zeros: &case.zeros };
                    let run = |level| {
                        let (mut full, mut int8) = (vec![0.0; tokens * rows], vec![0.0; tokens * rows]);
                        packed_product(level, &w, &x, &mut full);
                        packed_product_int8(level, &w, &rounded, &mut int8);
                        (full, int8)
                    };
                    let (full, int8) = run(Level::Scalar);
                    assert!(Level::all().into_iter().all(|level| run(level) == (full.clone(), int8.clone())));
                    let exact = matches!(stored, Scales::F16(_));
                    for (found, x) in [(&full, &x), (&int8, &seen)].into_iter().filter(|_| !exact) {
                        let dense = case.dense();
                        for (i, &found) in found.iter().enumerate() {
                            let (x, w) = (&x[i / rows * cols..][..cols], &dense[i % rows * cols..][..cols]);
                            let sum: f64 = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                            let size: f64 = x.iter().zip(w).map(|(x, w)| f64::from(x * w).abs()).sum();
                            assert!(
                                (f64::from(found) - sum).abs() < 1e-5 * (1.0 + size),
                                "{bits} {shape:?} {found} {sum}"
                            );
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn several_matrices_together_are_each_by_itself() {
    // More work than one thread is left alone with, in groups of two lengths and of three widths.
    let cases = [(4, 900, 64), (4, 136, 64), (3, 520, 128), (8, 9, 128)];
    let cases = cases.map(|(bits, rows, group)| Case::new(bits, [rows, 1000], group, bits != 3));
    for (level, tokens) in Level::all().into_iter().flat_map(|level| [1, 3].map(|tokens| (level, tokens))) {
        let x: Vec<f32> = (0..tokens * 1000).map(number).collect();
        let inputs = Inputs::new(level, &x, 1000);
        let rounded = inputs.rounded();
        let together = |product: &dyn Fn(&mut [Meeting<'_>])| {
            let mut outs = cases.each_ref().map(|case| vec![f32::NAN; tokens * case.form.shape()[0]]);
            let mut all: Vec<_> =
                cases.iter().zip(&mut outs).map(|(case, out)| Meeting { weight: case.packed(), out }).collect();
            product(&mut all);
            outs
        };
        let alone = |product: &dyn Fn(&Packed<'_>, &mut [f32])| {
            cases.each_ref().map(|case| {
                let mut out = vec![f32::NAN; tokens * case.form.shape()[0]];
                product(&case.packed(), &mut out);
                out
            })
        };
        let int8 = together(&|all| packed_products_int8(level, all, &rounded));
        assert_eq!(int8, alone(&|w, out| packed_product_int8(level, w, &rounded, out)));
        let full = together(&|all| packed_products(level, all, &x));
        assert_eq!(full, alone(&|w, out| packed_product(level, w, &x, out)));
    }
}

#[test]
fn rounding_is_to_nearest_even_of_what_it_says() {
    let x: Vec<f32> = (0..150).map(|i| number(i) * 3.0).collect();
    let found = Inputs::new(Level::Scalar, &x, 150);
    assert!(Level::all().into_iter().all(|level| Inputs::new(level, &x, 150) == found));
    for (s, x) in x.chunks(SPAN).enumerate() {
        let most = x.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        assert_eq!(found.scales[s], most / 127.0);
        for (i, x) in x.iter().enumerate() {
            assert_eq!(f32::from(found.values[s * SPAN + i]), (x * (127.0 / most)).round_ties_even());
        }
    }
    assert!(found.values[150..].iter().all(|&v| v == 0) && found.values.len() == 160);
    let sum = |values: &[i8]| values.iter().map(|&v| i32::from(v)).sum::<i32>();
    assert_eq!(found.sums, found.values.chunks(CHUNK).map(sum).collect::<Vec<_>>());
    let nothing = Inputs::new(Level::best(), &[0.0; 5], 5);
    assert!(nothing.values == [0; 32] && nothing.scales == [0.0] && nothing.sums == [0]);
}

#[test]
fn every_level_rounds_every_token_alike() {
    for (tokens, cols) in [(1, 1), (3, 31), (2, 32), (5, 33), (3, 129), (40, 300)] {
        let mut x: Vec<f32> = (0..tokens * cols).map(|i| number(i) * (i % 7) as f32).collect();
        x[0] = f32::NAN;
        let found = Inputs::new(Level::Scalar, &x, cols);
        assert!(Level::all().into_iter().all(|level| Inputs::new(level, &x, cols) == found), "{tokens} {cols}");
    }
}

#[test]
fn what_cannot_be_laid_out_is_not() {
    assert!(PackedForm::new(4, [8, 64], 16).is_none() && PackedForm::new(9, [8, 64], 32).is_none());
    assert!(PackedForm::new(4, [8, 0], 32).is_none() && PackedForm::new(0, [8, 64], 32).is_none());
    assert_eq!(PackedForm::new(4, [8, 70], 70).unwrap().groups(), 1);
}
