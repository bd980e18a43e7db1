//! Runs with every stage on tiny models: complete, the same at any thread count, and the same when stopped and taken up.

use super::*;
use crate::{
    Arithmetic, Conversion, Observation, Reconstruction, Settings, SoftKind, SoftRounding, Target, TargetShift,
    TokenWeights, Tuning, tiny,
};
use bitmill_calibrate::{Comparison, Pooling, compare_embeddings, evaluate};
use bitmill_checkpoint::Dtype;
use bitmill_models::{Embedding, Role, RopeTable, spec_of};
use bitmill_scheme::{Activations, BLOCKS, Bits, Granularity, Scheme};

fn model(case: &str) -> Checkpoint {
    Checkpoint::open(&tiny::folder().join(case)).unwrap()
}

fn settings(transforms: &[&str], observation: Observation) -> Settings {
    let soft = Some(SoftRounding { kind: SoftKind::Sign, steps: 5 });
    Settings { solver: SolverOptions { soft, ..SolverOptions::default() }, observation, ..tiny::settings(transforms) }
}

fn everything(shift: TargetShift) -> Observation {
    let tokens = TokenWeights::Attention;
    Observation { shift, tokens, full_share: 0.2, biases: true, damping_search: true, arithmetic: Arithmetic::best() }
}

/// Runs to `out` on `threads` threads; stops at the `stop`-th site, if that is given.
fn go(case: &str, settings: &Settings, out: &Path, threads: usize, stop: Option<usize>) -> Result<Finished, Error> {
    let input = model(case);
    let windows = tiny::windows(&spec_of(&input).unwrap(), 10, 24);
    let plan = Plan::new(&input, settings).unwrap();
    let flag = AtomicBool::new(false);
    let options = RunOptions { commit_every: Duration::ZERO, ..RunOptions::new(&flag) };
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
        ("phi3", &["rotate", "rotate-heads", "awq"], TargetShift::Outputs),
        ("gpt2", &["awq"], TargetShift::Outputs),
        ("mixtral", &[], TargetShift::Outputs),
        ("qwen2-moe", &[], TargetShift::Outputs),
        ("llama4", &[], TargetShift::Outputs),
        ("modernbert", &["rotate-heads", "awq"], TargetShift::Outputs),
        ("vit", &["rotate-heads", "awq"], TargetShift::Outputs),
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
        let parted = transforms.contains(&"rotate");
        assert_eq!(spec.tied, !parted && spec_of(&model(case)).unwrap().tied, "{case}");
        (0..spec.layers).for_each(|index| drop(Block::load(&spec, index, &back).unwrap()));
    }
}

#[test]
fn every_arithmetic_of_this_cpu_loses_alike_and_ends_in_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let run = |arithmetic: Arithmetic, threads: usize| {
        let observation = Observation { shift: TargetShift::Outputs, arithmetic, ..Observation::default() };
        let out = dir.path().join(format!("{arithmetic:?}-{threads}"));
        let finished = go("llama-biases-tied", &Settings { observation, ..tiny::settings(&[]) }, &out, threads, None)?;
        let errors = finished.tensors.iter().map(|tensor| tensor.relative_error);
        Ok((weights(&out), errors.sum::<f64>() / finished.tensors.len() as f64))
    };
    let (_, full) = run(Arithmetic::F32, 2).unwrap();
    for arithmetic in [Arithmetic::Bf16, Arithmetic::Int8] {
        let (bytes, error) = match run(arithmetic, 1) {
            Ok(found) => found,
            Err(Error::Arithmetic { asked, .. }) => {
                println!("this CPU does not multiply {asked}: it was not tested");
                continue;
            }
            Err(error) => panic!("{error}"),
        };
        assert!((error / full - 1.0).abs() < 0.02, "{arithmetic:?}: {error}, f32 {full}");
        assert!(run(arithmetic, 3).unwrap().0 == bytes, "{arithmetic:?}: threads");
    }
}

/// Rounds `model` to nearest into `out`; stops when `stop` units are finished.
fn nearest(model: &Path, out: &Path, force: bool, stop: usize) -> Result<Finished, Error> {
    let input = Checkpoint::open(model).unwrap();
    let settings = Settings { shard_bytes: u64::MAX, ..tiny::settings(&[]) };
    let plan = Plan::new(&input, &Settings { method: "rtn".into(), ..settings }).unwrap();
    let flag = AtomicBool::new(false);
    let options = RunOptions { force, commit_every: Duration::ZERO, ..RunOptions::new(&flag) };
    run(&input, &plan, None, out, options, &mut |event| {
        if let Event::Committed { done, .. } = event {
            flag.store(done == stop, Ordering::Relaxed);
        }
    })
}

#[test]
fn a_run_that_needs_no_data_looks_again_at_what_it_was_made_of() {
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("model");
    std::fs::create_dir(&copy).unwrap();
    let golden = tiny::folder().join("llama-gqa");
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(golden.join(file), copy.join(file)).unwrap();
    }
    let change = |name: &str, to: fn(u8) -> u8| {
        let file = copy.join("model.safetensors");
        let at = {
            let input = Checkpoint::open(&copy).unwrap();
            let whole = std::fs::read(&file).unwrap();
            let bytes = input.tensor(name).unwrap().bytes;
            whole.windows(bytes.len()).position(|part| part == bytes).unwrap()
        };
        let mut bytes = std::fs::read(&file).unwrap();
        bytes[at..at + 4].iter_mut().for_each(|b| *b = to(*b));
        std::fs::write(&file, bytes).unwrap();
    };
    let (whole, out) = (dir.path().join("whole"), dir.path().join("out"));
    let stopped = || assert!(matches!(nearest(&copy, &out, true, 4), Err(Error::Stopped { done: 4, .. })));
    let finished = nearest(&copy, &whole, false, 0).unwrap();
    let full = Checkpoint::open(&copy).unwrap();
    let full = fingerprints(&full.survey(&|_| false).collect::<Vec<_>>(), &BTreeMap::new());
    assert_eq!(finished.manifest["run"]["weights"], full, "read before or on the way, files have one fingerprint");

    stopped();
    nearest(&copy, &out, false, 0).unwrap();
    assert!(weights(&whole) == weights(&out), "taken up");

    // The last block is not finished, so it may be another one; the first is.
    let last = "model.layers.1.mlp.down_proj.weight";
    stopped();
    change(last, |b| b ^ 1);
    nearest(&copy, &out, true, 0).unwrap();
    nearest(&copy, &whole, true, 0).unwrap();
    assert!(weights(&whole) == weights(&out), "taken up with another last block");
    let first = "model.layers.0.mlp.down_proj.weight";
    stopped();
    change(first, |b| b ^ 1);
    std::fs::remove_dir_all(&out).unwrap();
    match nearest(&copy, &out, false, 0).unwrap_err() {
        Error::Leftover { what, .. } => assert_eq!(what, format!("weights.{first}")),
        other => panic!("{other}"),
    }
    nearest(&copy, &out, true, 0).unwrap();
    nearest(&copy, &whole, true, 0).unwrap();
    assert!(weights(&whole) == weights(&out), "started over");

    // NaN where nothing was looked at before the run began.
    change(last, |_| 0xff);
    std::fs::remove_dir_all(&out).unwrap();
    match nearest(&copy, &out, false, 0) {
        Err(Error::NonFinite { tensor, index: 0, .. }) => assert_eq!(tensor, last),
        other => panic!("{other:?}"),
    }
    assert!(!out.exists() && !Journal::folder(&out).exists(), "nothing is left");
}

#[test]
fn reconstruction_lowers_the_error_of_blocks_and_ends_in_the_same_bytes() {
    for (case, depth, together, codes) in [
        ("llama-gqa", 1, false, 0.03),
        ("bert", 2, false, 0.01),
        ("gemma2", 2, true, 0.03),
        ("phi3", 1, false, 0.03),
        ("gpt2", 2, false, 0.01),
        ("llama-gqa", 2, true, 0.03),
        ("qwen3-moe", 2, true, 0.03),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let plain = tiny::settings(&[]);
        let biases = Observation { biases: true, ..Observation::default() };
        let rebuilt = Settings {
            reconstruction: Some(Reconstruction { codes, together, ..Reconstruction::new(4, depth, 3) }),
            observation: biases,
            ..plain.clone()
        };
        let [without, one, three] = ["without", "one", "three"].map(|name| dir.path().join(name));
        go(case, &plain, &without, 2, None).unwrap();
        let finished = go(case, &rebuilt, &one, 1, None).unwrap();
        go(case, &rebuilt, &three, 3, None).unwrap();
        assert!(weights(&one) == weights(&three), "{case}: threads");
        assert!(weights(&one) != weights(&without), "{case}: nothing changed");
        let brought = |t: &TensorRecord| t.stages.iter().find(|s| s.stage == "reconstruction").unwrap().change;
        let changes: Vec<f64> = finished.tensors.iter().map(brought).collect();
        assert!(changes.iter().all(|&c| c <= 0.0), "{case}: {changes:?}");
        // Nine sentences of random tokens teach an encoder nothing that holds for the tenth.
        assert!(case == "bert" || changes.iter().any(|&c| c < -0.002), "{case}: {changes:?}");
        // A kill in the second block goes on from the first.
        let stopped = dir.path().join("stopped");
        assert!(matches!(go(case, &rebuilt, &stopped, 2, Some(6)), Err(Error::Stopped { .. })), "{case}");
        go(case, &rebuilt, &stopped, 2, None).unwrap();
        assert!(weights(&one) == weights(&stopped), "{case}: taken up");
        // Tuning goes on from what reconstruction wrote: with rates of nothing it changes nothing. (Adding and taking away
        // the 1 of Gemma's norms may round the last bit of a small one.)
        if case == "gemma2" {
            continue;
        }
        let still = Tuning { codes: 0.0, scales: 0.0, norms: 0.0, head: 0.0, ..Tuning::new(1, 3) };
        let after = dir.path().join("after");
        go(case, &Settings { tuning: Some(still), ..rebuilt }, &after, 2, None).unwrap();
        assert!(weights(&one) == weights(&after), "{case}: tuning without steps");
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

#[test]
fn every_architecture_is_quantized_tuned_and_measured() {
    let mut cases: Vec<_> = std::fs::read_dir(tiny::folder()).unwrap().map(|e| e.unwrap().path()).collect();
    cases.retain(|folder| folder.join("config.json").exists());
    cases.sort();
    for folder in cases {
        let (case, dir) = (folder.file_name().unwrap().to_string_lossy().into_owned(), tempfile::tempdir().unwrap());
        let (input, out) = (model(&case), dir.path().join("out"));
        let spec = spec_of(&input).unwrap();
        let four_bits = Scheme::int(Bits::ALL[3], true, Granularity::Channel);
        let settings = Settings { scheme: four_bits, tuning: Some(Tuning::new(1, 4)), ..tiny::settings(&[]) };
        let finished = go(&case, &settings, &out, 2, None).unwrap();
        assert_eq!(finished.stages.len(), 1, "{case}: tuning is told of");
        // Every linear of every block, in the shape it is used in, is quantized.
        let quantized = Checkpoint::open(&out).unwrap();
        for (role, module) in (0..spec.layers).flat_map(|block| spec.block_linears(block)) {
            assert!(quantized.scheme_of(&module).is_some(), "{case}: {module}");
            assert_eq!(quantized.weight(&module).unwrap().shape(), spec.linear_shape(role), "{case}: {module}");
        }
        // What other readers may make of it when it is dense again.
        let dense = Conversion::new(&quantized, Target::Dense(Dtype::F32), false, u64::MAX).unwrap();
        let stacked = dense.notes.iter().any(|note| note.contains("stacked alone"));
        assert_eq!(stacked, spec.model_type.starts_with("llama4"), "{case}: {:?}", dense.notes);
        let what =
            Comparison { model: &quantized, reference: Some(&input), stream_memory: 1 << 30, spill_dir: dir.path() };
        let windows = tiny::windows(&spec, 3, 20);
        if spec.head().is_some() {
            let measured = evaluate(what, &windows, &mut |_, _| {}, None).unwrap();
            let kl = measured.divergence.unwrap().kl.mean;
            assert!(kl > 0.0 && kl < 0.3, "{case}: KL divergence of {kl} at four bits");
        } else {
            let (similarity, _) = compare_embeddings(what, &windows, Pooling::Mean, &mut |_, _| {}).unwrap();
            let cosine = similarity.cosine.unwrap().mean;
            assert!(cosine > 0.95 && cosine < 1.0, "{case}: cosine similarity of {cosine} at four bits");
        }
    }
}

#[test]
fn what_an_architecture_does_not_allow_is_refused_before_work_starts() {
    for case in ["gemma2", "olmo2", "granite"] {
        let shifted = settings(&[], everything(TargetShift::Outputs));
        let error = Plan::new(&model(case), &shifted).err().unwrap().to_string();
        assert!(error.contains("--target-shift outputs") && error.contains("use inputs or off"), "{error}");
        let gguf = Settings { format: "gguf".into(), scheme: Scheme::block(BLOCKS[0].kind), ..tiny::settings(&[]) };
        let error = Plan::new(&model(case), &gguf).err().unwrap().to_string();
        let reason = if case == "gemma2" {
            "query_pre_attn_scalar is 24"
        } else {
            "are not written as GGUF; those that are: llama"
        };
        assert!(error.contains(reason), "{error}");
    }
    let error = Plan::new(&model("opt"), &settings(&["rotate"], Observation::default())).err().unwrap().to_string();
    assert!(error.contains("it has layer norms"), "{error}");
}

#[test]
fn inputs_are_rounded_by_what_calibration_saw() {
    for (case, method) in [("llama-gqa", "gptq"), ("llama-gqa", "rtn"), ("qwen2-moe", "rtn")] {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let scheme = bitmill_scheme::scheme("fp8").unwrap();
        let fp8 = Settings { method: method.into(), format: "float-quantized".into(), scheme, ..tiny::settings(&[]) };
        go(case, &fp8, &out, 2, None).unwrap();
        let (input, back) = (model(case), Checkpoint::open(&out).unwrap());
        let spec = spec_of(&back).unwrap();
        let read = |role| match back.weight(&spec.module(0, role)).unwrap() {
            Weight::Quantized(q) => q,
            Weight::Dense(_) => panic!("{role:?} is dense"),
        };
        // One scale for what loaders hold as one matrix, that of its largest weight.
        let roles = [Role::Q, Role::K, Role::V];
        let amax = |role| {
            let weight = input.weight(&spec.module(0, role)).unwrap().to_f32().unwrap();
            weight.into_iter().fold(0.0f32, |most, w| most.max(w.abs()))
        };
        let scale = scheme
            .with_scale(read(Role::Q).scheme.scale)
            .scale
            .round(roles.map(amax).into_iter().fold(0.0, f32::max) / 448.0);
        assert!(roles.iter().all(|&r| read(r).scales == [scale]), "{case}: {scale}");
        // The first site sees what the model as it is computes, in the 16 bits that the stream has.
        let windows = tiny::windows(&spec, 10, 24);
        let (embedding, block) = (Embedding::load(&spec, &input).unwrap(), Block::load(&spec, 0, &input).unwrap());
        let most = (0..windows.count()).map(|w| windows.tokens(w)).fold(0.0f32, |most, tokens| {
            let x = block.attn_in(&embedding.embed(tokens).unwrap()).unwrap();
            x.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().fold(most, |most, v| most.max(v.abs()))
        });
        let stored: Vec<f32> = roles.iter().map(|&r| read(r).input.unwrap()).collect();
        assert!(stored.iter().all(|&s| s == stored[0] && (s * 448.0 / most - 1.0).abs() < 0.02), "{case}: {stored:?}");
        // Every linear has its own, experts that few tokens went to included, and the model runs with them.
        for (_, module) in (0..spec.layers).flat_map(|b| spec.block_linears(b)) {
            let inputs = back.inputs(&module).unwrap();
            assert!(inputs.activations == Activations::StaticFp8 && inputs.stored != 1.0, "{module}: {inputs:?}");
        }
        let rope = RopeTable::new(&spec.ropes, windows.length).unwrap();
        let h = embedding.embed(windows.get(0).unwrap()).unwrap();
        let run = |checkpoint: &Checkpoint| {
            let block = Block::load(&spec, 0, checkpoint).unwrap();
            block.forward(&h, &rope).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        let (rounded, full) = (run(&back), run(&input));
        let error: f32 = rounded.iter().zip(&full).map(|(a, b)| (a - b).powi(2)).sum();
        let energy: f32 = full.iter().map(|v| v * v).sum();
        assert!(error > 0.0 && error < 0.03 * energy, "{case}: {error} of {energy}");
    }
    let unknown = Settings { scheme: bitmill_scheme::scheme("fp8").unwrap(), ..tiny::settings(&[]) };
    let mut config = model("llama-gqa").config().clone();
    config["model_type"] = "unheard-of".into();
    let bytes = std::fs::read(tiny::folder().join("llama-gqa/model.safetensors")).unwrap();
    let input = Checkpoint::in_memory(config, bytes).unwrap();
    let said = Plan::new(&input, &Settings { method: "rtn".into(), ..unknown }).err().unwrap().to_string();
    assert!(said.contains("rounds inputs by what calibration says"), "{said}");
}

#[test]
fn scales_of_keys_and_values_come_from_calibration() {
    let dir = tempfile::tempdir().unwrap();
    let [one, three, stopped] = ["one", "three", "stopped"].map(|name| dir.path().join(name));
    let kept = Settings { kv_cache: true, observation: everything(TargetShift::Outputs), ..tiny::settings(&[]) };
    go("phi3", &kept, &one, 1, None).unwrap();
    go("phi3", &kept, &three, 3, None).unwrap();
    assert!(go("phi3", &kept, &stopped, 2, Some(6)).is_err());
    go("phi3", &kept, &stopped, 2, None).unwrap();
    assert!(weights(&one) == weights(&three) && weights(&one) == weights(&stopped));
    let back = Checkpoint::open(&one).unwrap();
    let spec = spec_of(&back).unwrap();
    let windows = tiny::windows(&spec, 10, 24);
    let (embedding, rope) =
        (Embedding::load(&spec, &back).unwrap(), RopeTable::new(&spec.ropes, windows.length).unwrap());
    // Of the first block's rounded weights, on the text itself.
    let mut block = Block::load(&spec, 0, &back).unwrap();
    let [k, v] = back.cache_scales("model.layers.0.self_attn").unwrap().unwrap();
    block.set_cache(None);
    let [mut most_k, mut most_v] = [0.0f32; 2];
    for w in 0..windows.count() {
        let x = block.attn_in(&embedding.embed(windows.tokens(w)).unwrap()).unwrap();
        let [k, v] = block.cache_range(&x, &rope).unwrap();
        (most_k, most_v) = (most_k.max(k), most_v.max(v));
    }
    assert!((k * 448.0 / most_k - 1.0).abs() < 0.02 && (v * 448.0 / most_v - 1.0).abs() < 0.02, "{k} {v}");
    assert_eq!(back.names().filter(|n| n.ends_with(".k_scale") || n.ends_with(".v_scale")).count(), 2 * spec.layers);
    for (format, case) in [("gptq", "llama-gqa"), ("gguf", "llama-gqa"), ("pack-quantized", "bert")] {
        let refused = Settings { format: format.into(), ..kept.clone() };
        assert!(matches!(Plan::new(&model(case), &refused), Err(Error::Cache { .. })), "{format} {case}");
    }
}
