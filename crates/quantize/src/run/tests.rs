//! Runs with every stage on tiny models: complete, the same at any thread count, and the same when stopped and taken up.

use super::*;
use crate::{Observation, Settings, SoftKind, SoftRounding, TargetShift, TokenWeights, tiny};
use bitmill_models::spec_of;

fn model(case: &str) -> Checkpoint {
    Checkpoint::open(&tiny::folder().join(case)).unwrap()
}

fn settings(transforms: &[&str], observation: Observation) -> Settings {
    let soft = Some(SoftRounding { kind: SoftKind::Sign, steps: 5 });
    Settings { solver: SolverOptions { soft, ..SolverOptions::default() }, observation, ..tiny::settings(transforms) }
}

fn everything(shift: TargetShift) -> Observation {
    let tokens = TokenWeights::Attention;
    Observation { shift, tokens, full_share: 0.2, biases: true, damping_search: true }
}

/// Runs to `out` on `threads` threads; stops at the `stop`-th site, if that is given.
fn go(case: &str, settings: &Settings, out: &Path, threads: usize, stop: Option<usize>) -> Result<Finished, Error> {
    let input = model(case);
    let windows = tiny::windows(&spec_of(&input).unwrap(), 10, 24);
    let plan = Plan::new(&input, settings).unwrap();
    let flag = AtomicBool::new(false);
    let options = RunOptions { force: false, stream_memory: 1 << 30, stop: &flag };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    pool.install(|| {
        let mut sites = 0;
        run(&input, &plan, Some(Calibration::Text(&windows)), out, options, &mut |event| {
            if let Event::Site { .. } = event {
                sites += 1;
                flag.store(stop == Some(sites), Ordering::Relaxed);
            }
        })
    })
}

fn weights(out: &Path) -> Vec<u8> {
    std::fs::read(out.join("model.safetensors")).unwrap()
}

#[test]
fn every_stage_at_once_is_reported_and_ends_in_the_same_bytes() {
    for (case, transforms, shift) in [
        ("llama-biases-tied", &["rotate", "rotate-heads", "awq"][..], TargetShift::Outputs),
        ("bert", &["rotate-heads", "awq"], TargetShift::Outputs),
        ("qwen3-tied", &[], TargetShift::Inputs),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let settings = settings(transforms, everything(shift));
        let (one, three) = (dir.path().join("one"), dir.path().join("three"));
        let finished = go(case, &settings, &one, 1, None).unwrap();
        go(case, &settings, &three, 3, None).unwrap();
        assert!(weights(&one) == weights(&three), "{case}: threads");
        for tensor in &finished.tensors {
            assert!(tensor.relative_error > 0.0 && tensor.relative_error < 1.0, "{case}: {tensor:?}");
            let names: Vec<&str> = tensor.stages.iter().map(|s| s.stage.as_str()).collect();
            for stage in ["soft rounding", "damping", "target shift"] {
                assert!(names.contains(&stage), "{case}: {stage} is missing in {names:?}");
            }
            assert!(tensor.stages.iter().all(|s| s.change <= 1e-4), "{case}: a stage that lost was kept: {tensor:?}");
        }
        assert_eq!(finished.stages.len(), transforms.iter().filter(|t| **t != "rotate-heads").count(), "{case}");
        // The site after the first of the second block: what is stopped there goes on from the first block.
        let stopped = dir.path().join("stopped");
        assert!(matches!(go(case, &settings, &stopped, 2, Some(6)), Err(Error::Stopped { .. })), "{case}");
        go(case, &settings, &stopped, 2, None).unwrap();
        assert!(weights(&one) == weights(&stopped), "{case}: taken up");
        let back = Checkpoint::open(&one).unwrap();
        let spec = spec_of(&back).unwrap();
        assert_eq!(spec.tied, settings.transforms.is_empty() && spec_of(&model(case)).unwrap().tied, "{case}");
        (0..spec.layers).for_each(|index| drop(Block::load(&spec, index, &back).unwrap()));
    }
}

#[test]
fn statistics_do_not_do_where_text_is_needed() {
    let input = model("llama-gqa");
    let plan = Plan::new(&input, &settings(&["awq"], Observation::default())).unwrap();
    assert!(plan.calibrated && plan.untied.is_none());
    let plan = Plan::new(&input, &settings(&["rotate", "womi"], Observation::default()));
    assert!(plan.err().unwrap().to_string().contains("one of these transforms is enough"));
}
