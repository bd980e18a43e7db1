//! One calibration pass, many outputs: statistics as a file give what separate passes give, and refuse what is not theirs.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use bitmill::calibrate::{
    Error, Pass, Replacement, Statistics, Tokenizer, Windows, model_fingerprint, probe, read_texts, splitmix,
};
use bitmill::checkpoint::Checkpoint;
use bitmill::models::{Block, Embedding, Head, Role, RopeTable, SITES};
use candle_core::Tensor;
use safetensors::SafeTensors;
use std::path::{Path, PathBuf};
use support::{QUICK, assert_same, bitmill, books, copy_of_books, edit, failure, json, success};

/// Two blocks of eight, rounded without refinements.
const FEW: [&str; 6] = ["--descent-sweeps", "0", "--scale-refits", "0", "--ignore", r"model\.layers\.[2-7]\."];

fn calibrated(dir: &Path, name: &str, extra: &[&str]) -> PathBuf {
    let file = dir.join(name);
    success(bitmill(["calibrate"]).arg(books()).arg("-o").arg(&file).args(QUICK).args(extra));
    file
}

fn quantized(model: &Path, dir: &Path, name: &str, extra: &[&str]) -> PathBuf {
    let out = dir.join(name);
    success(bitmill(["quantize"]).arg(model).arg("-o").arg(&out).args(FEW).args(extra));
    out
}

fn tensor(folder: &Path, name: &str) -> Vec<u8> {
    let bytes = std::fs::read(folder.join("model.safetensors")).unwrap();
    SafeTensors::deserialize(&bytes).unwrap().tensor(name).unwrap().data().to_vec()
}

#[test]
fn one_pass_makes_the_outputs_that_separate_passes_make() {
    let dir = tempfile::tempdir().unwrap();
    let shared = calibrated(dir.path(), "shared", &["--threads", "1"]);
    let own = calibrated(dir.path(), "own", &["--stream-memory", "0"]);
    assert!(std::fs::read(&shared).unwrap() == std::fs::read(&own).unwrap(), "threads and memory decide nothing");
    let mixture = ["--bits", "3.5", "--options", "2,4", "--method", "rtn"];
    let outputs = [&["--bits", "4"][..], &["--bits", "3", "--group-size", "64"], &["--format", "gptq"], &mixture];
    for (i, flags) in outputs.iter().enumerate() {
        let out = |name: &str, stats: &Path| {
            let stats = stats.to_str().unwrap();
            quantized(&books(), dir.path(), &format!("{name}-{i}"), &[&["--stats", stats], *flags].concat())
        };
        assert_same(&out("from-shared", &shared), &out("from-own", &own));
    }
    // The first site has no rounded linears before it, so there text and statistics of it say the same, in the arithmetic of
    // statistics.
    let text =
        quantized(&books(), dir.path(), "text", &[&QUICK[..], &["--arithmetic", "f32", "--written", "0"]].concat());
    for role in ["q_proj", "k_proj", "v_proj"] {
        let name = format!("model.layers.0.self_attn.{role}.weight_packed");
        assert_eq!(tensor(&text, &name), tensor(&dir.path().join("from-shared-0"), &name));
    }
}

#[test]
fn texts_are_mixed_by_weight() {
    let dir = tempfile::tempdir().unwrap();
    let evaluation = books().join("evaluation.txt");
    let a = calibrated(dir.path(), "a", &["--no-sensitivity"]);
    let b = calibrated(dir.path(), "b", &["--no-sensitivity", "--calibration", evaluation.to_str().unwrap()]);
    let input = Checkpoint::open(&books()).unwrap();
    let spec = bitmill::models::spec(input.config()).unwrap();
    let model = model_fingerprint(&input).unwrap();
    let open = |files: &[(&PathBuf, f64)]| {
        let files: Vec<(PathBuf, f64)> = files.iter().map(|(p, w)| ((*p).clone(), *w)).collect();
        Statistics::open(&files, &spec, &model).unwrap()
    };
    let (one, other, mixed) = (open(&[(&a, 1.0)]), open(&[(&b, 5.0)]), open(&[(&a, 1.5), (&b, 0.5)]));
    let (one_h, other_h) = (one.hessian(3, &SITES[2]).unwrap(), other.hessian(3, &SITES[2]).unwrap());
    assert!(one_h != other_h);
    let each = mixed.hessian(3, &SITES[2]).unwrap().into_iter().zip(one_h.iter().zip(&other_h));
    assert!({ each }.all(|(m, (a, b))| (m - (0.75 * a + 0.25 * b)).abs() <= 1e-6 * (1.0 + a.abs())));
    let max = mixed.abs_max(3, &SITES[2]).unwrap();
    let (one_max, other_max) = (one.abs_max(3, &SITES[2]).unwrap(), other.abs_max(3, &SITES[2]).unwrap());
    assert!(max.iter().zip(one_max.iter().zip(&other_max)).all(|(m, (a, b))| *m == a.max(*b)));
    // Halves of the same are the same.
    let twice = format!("{}:0.5", a.display());
    let same = quantized(&books(), dir.path(), "twice", &["--stats", &twice, "--stats", &twice]);
    let once = quantized(&books(), dir.path(), "once", &["--stats", a.to_str().unwrap()]);
    let name = "model.layers.1.mlp.down_proj.weight_packed";
    assert_eq!(tensor(&same, name), tensor(&once, name));
}

#[test]
fn what_is_not_usable_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let stats = calibrated(dir.path(), "stats", &["--no-sensitivity"]);
    let refusal = |model: &Path, stats: &str, extra: &[&str]| {
        let out = dir.path().join("refused");
        let said =
            failure(bitmill(["quantize"]).arg(model).arg("-o").arg(&out).args(["--stats", stats]).args(extra), 1);
        assert!(!out.exists(), "{said}");
        said
    };
    let path = stats.to_str().unwrap();
    // A mixture needs sensitivities.
    let said = refusal(&books(), path, &["--bits", "3.5"]);
    assert!(said.contains("hold no sensitivities") && said.contains("bitmill calibrate"), "{said}");
    // Text and statistics exclude each other.
    let said = refusal(&books(), path, &["--calibration", books().join("calibration.txt").to_str().unwrap()]);
    assert!(said.contains("leave out either --stats or --calibration"), "{said}");
    // Another model: one number of its config is different.
    let other = copy_of_books(dir.path());
    edit(&other.join("config.json"), |c| c["rope_theta"] = 10001.0.into());
    let said = refusal(&other, path, &[]);
    assert!(said.contains("other weights or another config.json") && said.contains("bitmill calibrate"), "{said}");
    // Another architecture, another kind of file, no file.
    edit(&other.join("config.json"), |c| c["num_hidden_layers"] = 7.into());
    assert!(refusal(&other, path, &[]).contains("config.json"));
    let weights = books().join("model.safetensors");
    assert!(refusal(&books(), weights.to_str().unwrap(), &[]).contains("no tensor `about`"));
    assert!(refusal(&books(), "nowhere", &[]).contains("nowhere"));
    // Cut off, and with a number that is none.
    let whole = std::fs::read(&stats).unwrap();
    let damaged = dir.path().join("damaged");
    std::fs::write(&damaged, &whole[..whole.len() - 1000]).unwrap();
    assert!(refusal(&books(), damaged.to_str().unwrap(), &[]).contains("damaged"));
    let mut poisoned = whole.clone();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let entries: serde_json::Value = serde_json::from_slice(&whole[8..header]).unwrap();
    let at = header + entries["1.mlp_in.hessian"]["data_offsets"][0].as_u64().unwrap() as usize;
    poisoned[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&damaged, &poisoned).unwrap();
    let said = refusal(&books(), damaged.to_str().unwrap(), &["--force"]);
    assert!(said.contains("1.mlp_in.hessian: entry 0 is NaN"), "{said}");
    let said = failure(bitmill(["calibrate"]).arg(books()).arg("-o").arg(&stats), 1);
    assert!(said.contains("exists"), "{said}");
    assert!(json(bitmill(["inspect"]).arg(&stats))["kinds"].is_array(), "a statistics file is a safetensors file");
}

/// Numbers from −1 to 1.
fn noise(seed: u64, count: usize) -> Vec<f32> {
    let unit = |i: u64| (splitmix(seed << 32 | i) >> 40) as f32 / (1u64 << 24) as f32;
    (0..count as u64).map(|i| 2.0 * unit(i) - 1.0).collect()
}

fn predictions(head: &Head, h: &Tensor) -> Vec<Vec<f32>> {
    let softmax = |row: Vec<f32>| -> Vec<f32> {
        let max = row.iter().fold(f32::MIN, |a, &b| a.max(b));
        let sum: f32 = row.iter().map(|v| (v - max).exp()).sum();
        row.iter().map(|v| (v - max).exp() / sum).collect()
    };
    head.logits(h).unwrap().to_vec2::<f32>().unwrap().into_iter().map(softmax).collect()
}

/// The gradient, at the logits, of the log-probability of tokens drawn at every position but the first.
fn drawn(predictions: &[Vec<f32>], seed: u64) -> Vec<f32> {
    let chances = noise(seed, predictions.len());
    let at = |(t, p): (usize, &Vec<f32>)| {
        let mut left = (chances[t] + 1.0) / 2.0;
        let token = p.iter().position(|v| {
            left -= v;
            left < 0.0
        });
        let token = token.unwrap_or(p.len() - 1);
        let one = |v| f32::from(u8::from(v == token));
        p.iter().enumerate().map(|(v, p)| if t == 0 { 0.0 } else { one(v) - p }).collect::<Vec<f32>>()
    };
    predictions.iter().enumerate().flat_map(at).collect()
}

#[test]
fn cross_terms_are_those_of_per_sample_gradients() {
    // Methods part 2.11: S_ab = E[⟨g, δ_a⟩·⟨g, δ_b⟩] over tokens that the model itself would say, with g from the backward
    // pass. Probes take the same from differences of logits.
    let input = Checkpoint::open(&books()).unwrap();
    let spec = bitmill::models::spec(input.config()).unwrap();
    let tokenizer = Tokenizer::open(&books(), spec.bos).unwrap();
    let texts = read_texts(&[books().join("evaluation.txt")]).unwrap();
    let windows = Windows::from_texts(&texts, &tokenizer, spec.vocab, 24, 1, 0).unwrap();
    // Two errors of one linear that share a part, and one of the block before.
    let blocks = [spec.layers - 2, spec.layers - 1];
    let shape = |role| spec.linear_shape(role).iter().product::<usize>();
    let small = |v: Vec<f32>| v.into_iter().map(|x| 3e-3 * x).collect::<Vec<f32>>();
    let (down, up) = (small(noise(1, shape(Role::Down))), small(noise(2, shape(Role::Up))));
    let mixed: Vec<f32> = down.iter().zip(small(noise(3, down.len()))).map(|(a, b)| 0.7 * a + 0.7 * b).collect();
    let errors: [(usize, Role, &[f32]); 3] =
        [(blocks[0], Role::Up, &up), (blocks[1], Role::Down, &down), (blocks[1], Role::Down, &mixed)];
    let weight = |block: &Block, role| block.linear(role).flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let pass = Pass { model: &input, spec: &spec, stream_memory: u64::MAX, spill_dir: &std::env::temp_dir() };
    let mut replace = |index: usize, block: &Block, _: &[_; 4]| -> Result<Vec<Replacement>, Error> {
        let own = errors.iter().filter(|e| e.0 == index);
        let added = |(role, delta): (Role, &[f32])| {
            let changed = weight(block, role).iter().zip(delta).map(|(w, d)| w + d).collect();
            vec![(role, changed)]
        };
        Ok(own.map(|e| added((e.1, e.2))).collect())
    };
    let probes = probe(pass, &windows, &mut replace, &mut |_, _| {}).unwrap();

    let rope = RopeTable::new(&spec.ropes, windows.length).unwrap();
    let head = Head::load(&spec, &input).unwrap();
    let mut h = Embedding::load(&spec, &input).unwrap().embed(windows.tokens(0)).unwrap();
    let mut traced = Vec::new();
    for index in 0..spec.layers {
        let block = Block::load(&spec, index, &input).unwrap();
        let (out, trace) = block.forward_traced(&h, &rope).unwrap();
        h = out;
        if blocks.contains(&index) {
            traced.push((block, trace));
        }
    }
    let predictions = predictions(&head, &h);
    const SAMPLES: u64 = 300;
    let mut gram = [[0.0f64; 3]; 3];
    for sample in 0..SAMPLES {
        let grad = drawn(&predictions, 1000 + sample);
        let mut back = head.backward(&h, &grad, None).unwrap();
        let mut along = [0.0f64; 3];
        for ((block, trace), index) in traced.iter().zip(blocks).rev() {
            let mut gradients = block.no_gradients();
            back = block.backward(trace, &rope, back, Some(&mut gradients)).unwrap();
            for (a, (_, role, delta)) in along.iter_mut().zip(&errors).filter(|(_, e)| e.0 == index) {
                let g = &gradients.linears[role];
                *a = g.iter().zip(*delta).map(|(g, d)| f64::from(g * d)).sum();
            }
        }
        for (row, a) in gram.iter_mut().zip(along) {
            row.iter_mut().zip(along).for_each(|(s, b)| *s += a * b / SAMPLES as f64);
        }
    }
    let positions = (windows.length - 1) as f64;
    let kl: Vec<f64> = probes.kl.concat();
    assert_eq!(kl.len(), 3);
    for a in 0..3 {
        let expected = 0.5 * gram[a][a] / positions;
        assert!((kl[a] / expected - 1.0).abs() < 0.3, "{a}: {} and {expected}", kl[a]);
        for b in 0..3 {
            let expected = gram[a][b] / (gram[a][a] * gram[b][b]).sqrt();
            let found = probes.cross[3 * a + b];
            assert!((found - expected).abs() < 0.2, "{a}, {b}: {found} and {expected}");
        }
    }
    assert!(probes.cross[5] > 0.5, "the shared part shows: {:?}", probes.cross);
}
