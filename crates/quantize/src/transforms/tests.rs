//! The promises of transforms, on every architecture there is a golden checkpoint of.

use super::*;
use crate::journal::StageRecord;
use crate::tiny::{self, settings, windows};
use crate::{Plan, calibrate};
use bitmill_calibrate::{Pass, Windows, model_fingerprint};
use bitmill_models::{Block, Embedding, Head, NormKind, NormRole, RopeTable, SITES, spec_of};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

fn goldens() -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> = std::fs::read_dir(tiny::folder()).unwrap().map(|e| e.unwrap().path()).collect();
    all.retain(|f| f.join("config.json").exists() && !f.ends_with("int8-activations"));
    all.sort();
    all
}

/// Logits of the first window, or hidden states where there is no head.
fn output(model: &Checkpoint, windows: &Windows) -> Vec<f32> {
    let spec = spec_of(model).unwrap();
    let rope = RopeTable::new(&spec.ropes, windows.length).unwrap();
    let mut h = Embedding::load(&spec, model).unwrap().embed(windows.get(0).unwrap()).unwrap();
    for index in 0..spec.layers {
        h = Block::load(&spec, index, model).unwrap().forward(&h, &rope).unwrap();
    }
    let out = if spec.head().is_some() { Head::load(&spec, model).unwrap().logits(&h).unwrap() } else { h };
    out.flatten_all().unwrap().to_vec1().unwrap()
}

fn applied(input: &Checkpoint, plan: &Plan, windows: &Windows, work: &Path) -> (Checkpoint, Vec<StageRecord>) {
    let place = (work, 1 << 30, &AtomicBool::new(false));
    transformed(input, plan, Some(windows), place, &mut |_, _| {}).unwrap().unwrap()
}

#[test]
fn logits_do_not_change() {
    // Oracle 22: every transform alone, and all that go together, on every architecture that does not refuse them.
    let (mut applications, mut untied) = (0, 0);
    for folder in goldens() {
        let input = Checkpoint::open(&folder).unwrap();
        let windows = windows(&spec_of(&input).unwrap(), 4, 32);
        let before = output(&input, &windows);
        let scale = before.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let together = [&["smoothquant", "rotate", "rotate-heads", "awq"][..], &["womi", "awq"]];
        let alone = TRANSFORMS.iter().map(|t| vec![t.name()]);
        for names in alone.chain(together.map(<[_]>::to_vec)) {
            let plan = match Plan::new(&input, &settings(&names)) {
                Ok(plan) => plan,
                Err(Error::Transform { name, .. }) => {
                    let spec = plan_spec(&input);
                    let turns = spec.norm == NormKind::Rms && !spec.has_norm(NormRole::AttnOutput);
                    assert!(!turns && (name == "rotate" || name == "womi"), "{name} refused: {}", folder.display());
                    continue;
                }
                Err(Error::Experts { .. }) => {
                    assert!(plan_spec(&input).routing.is_some(), "{names:?} refused: {}", folder.display());
                    continue;
                }
                Err(e) => panic!("{e}"),
            };
            let dir = tempfile::tempdir().unwrap();
            let (model, _) = applied(&input, &plan, &windows, dir.path());
            let after = output(&model, &windows);
            let worst = before.iter().zip(&after).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / scale;
            assert!(worst < 1e-4, "{}: {names:?} changes the output by {worst}", folder.display());
            applications += 1;
            untied += u32::from(plan.untied.is_some());
        }
    }
    assert!(applications > 60 && untied > 0, "{applications} {untied}");
}

fn plan_spec(input: &Checkpoint) -> ModelSpec {
    spec_of(input).unwrap()
}

#[test]
fn moments_follow_the_weights() {
    // Oracle 23: T·H·Tᵀ is what a pass of the rewritten model sees. The streams are bf16, so both sides carry its rounding.
    for (case, names) in [
        ("llama-gqa", &["rotate", "rotate-heads", "awq"][..]),
        ("llama-biases-tied", &["womi", "awq"]),
        ("qwen3-tied", &["smoothquant", "awq", "rotate-heads"]),
        ("gemma2", &["smoothquant", "awq", "rotate-heads"]),
        ("phi3", &["rotate", "rotate-heads", "awq"]),
        ("gpt-neox", &["rotate-heads", "awq"]),
    ] {
        let input = Checkpoint::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tests/golden").join(case));
        let input = input.unwrap();
        let original = plan_spec(&input);
        let (windows, dir) = (windows(&original, 4, 32), tempfile::tempdir().unwrap());
        let plan = Plan::new(&input, &settings(names)).unwrap();
        let (after, _) = applied(&input, &plan, &windows, dir.path());
        let see = |model: &Checkpoint, spec: &ModelSpec, name: &str| {
            let file = dir.path().join(name);
            let pass = Pass { model, spec, stream_memory: 1 << 30, spill_dir: dir.path() };
            calibrate(pass, &windows, &file, false, &mut |_, _| {}).unwrap();
            Statistics::open(&[(file, 1.0)], spec, &model_fingerprint(model).unwrap()).unwrap()
        };
        let spec = plan.spec.clone().unwrap();
        let (seen, of_original) = (see(&after, &spec, "after"), see(&input, &original, "before"));
        let schemes = plan.quantized().map(|(m, s, _)| (m.clone(), *s)).collect();
        let (needs, statistics) = (Needs::Hessian, Some(&of_original));
        let model = Model { input: &input, spec: &spec, statistics, schemes: &schemes, needs, seed: 0 };
        let rewrites: Vec<_> = plan.transforms.iter().map(|t| t.prepare(&model).unwrap()).collect();
        for index in 0..spec.layers {
            let mut block = model.block(index).unwrap();
            rewrites.iter().for_each(|r| r.block(&mut block).unwrap());
            for (at, site) in SITES.iter().zip(&block.sites) {
                let expected = seen.hessian(index, at).unwrap();
                let norm = |v: &mut dyn Iterator<Item = f32>| v.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
                let error =
                    norm(&mut site.h.iter().zip(&expected).map(|(a, b)| a - b)) / norm(&mut expected.iter().copied());
                assert!(error < 0.02, "{case} {names:?} block {index} {}: {error}", at.name);
            }
        }
    }
}

#[test]
fn names_are_checked_and_ordered() {
    let names = |list: &[&str]| -> Result<Vec<&str>, Error> {
        let list: Vec<String> = list.iter().map(ToString::to_string).collect();
        Ok(transforms(&list)?.iter().map(|t| t.name()).collect())
    };
    assert_eq!(names(&["awq", "rotate"]).unwrap(), ["rotate", "awq"]);
    let error = names(&["rotat"]).unwrap_err().to_string();
    assert!(error.contains("`rotat` does not exist") && error.contains("rotate-heads"), "{error}");
    let input = Checkpoint::open(&goldens()[0]).unwrap();
    let error = Plan::new(&input, &settings(&["rotate"])).err().unwrap().to_string();
    assert!(error.contains("rotate") && error.contains("--transforms"), "{error}");
}
