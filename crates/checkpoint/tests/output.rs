//! Laying out, creating, writing and reopening output folders.

#![allow(clippy::unwrap_used, reason = "a failed test panics")]

use bitmill_checkpoint::{Checkpoint, Dtype, Error, OutputPlan, TensorSpec, ensure_free};
use proptest::prelude::*;
use std::path::Path;

fn specs() -> Vec<TensorSpec> {
    vec![
        TensorSpec::new("embed", Dtype::BF16, [10, 3]),
        TensorSpec::new("a.codes", Dtype::I32, [4, 4]),
        TensorSpec::new("a.odd", Dtype::U8, [3]),
        TensorSpec::new("a.shape", Dtype::I64, [2]),
        TensorSpec::new("empty", Dtype::F32, [0, 5]),
        TensorSpec::new("scalar", Dtype::F16, []),
        TensorSpec::new("big", Dtype::F32, [100]),
    ]
}

fn payload(spec: &TensorSpec) -> Vec<u8> {
    (0..spec.bytes()).map(|i| (i * 7 + spec.name.len()) as u8).collect()
}

fn read_back(dir: &Path, specs: &[TensorSpec]) {
    std::fs::write(dir.join("config.json"), "{}").unwrap();
    let checkpoint = Checkpoint::open(dir).unwrap();
    assert_eq!(checkpoint.names().count(), specs.len());
    for spec in specs {
        assert_eq!(checkpoint.spec(&spec.name), Some(spec));
        let tensor = checkpoint.tensor(&spec.name).unwrap();
        assert_eq!(tensor.bytes, payload(spec), "{}", spec.name);
    }
}

#[test]
fn shards_fill_up_to_the_limit_and_reopen_after_a_crash() {
    for (limit, files) in [(u64::MAX, 1), (500, 2), (100, 3), (1, 6)] {
        let plan = OutputPlan::new(specs(), limit).unwrap();
        assert_eq!(plan.payload_bytes(), 60 + 64 + 3 + 16 + 2 + 400);
        assert_eq!(plan.files().filter(|(f, _)| f.ends_with(".safetensors")).count(), files, "limit {limit}");
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("deep/out");
        let output = plan.create(&out).unwrap();
        let sizes: u64 = std::fs::read_dir(&out).unwrap().map(|e| e.unwrap().metadata().unwrap().len()).sum();
        assert_eq!(sizes, plan.total_bytes());
        for spec in specs().iter().take(3) {
            output.write(&spec.name, &payload(spec)).unwrap();
        }
        drop(output);
        // The same plan finds its files and continues at the same places, in another order.
        let output = OutputPlan::new(specs(), limit).unwrap().reopen(&out).unwrap();
        for spec in specs().iter().rev() {
            output.write(&spec.name, &payload(spec)).unwrap();
        }
        output.sync().unwrap();
        read_back(&out, &specs());
        if files > 1 {
            let index = std::fs::read(out.join("model.safetensors.index.json")).unwrap();
            let index: serde_json::Value = serde_json::from_slice(&index).unwrap();
            assert_eq!(index["metadata"]["total_size"], plan.payload_bytes());
            assert_eq!(index["weight_map"]["embed"], format!("model-00001-of-{files:05}.safetensors"));
        }
        // The container's own reader agrees, and every tensor is aligned to its type.
        for (file, _) in plan.files().filter(|(f, _)| f.ends_with(".safetensors")) {
            let bytes = std::fs::read(out.join(file)).unwrap();
            let (header, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
            assert_eq!(header % 8, 0);
            assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
            for name in metadata.offset_keys() {
                let info = metadata.info(&name).unwrap();
                assert_eq!(info.data_offsets.0 % (info.dtype.bitsize() / 8), 0);
            }
        }
    }
}

#[test]
fn leftovers_of_another_run_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let plan = OutputPlan::new(specs(), 100).unwrap();
    let reason = |plan: &OutputPlan| plan.reopen(dir.path()).unwrap_err().to_string();
    assert!(reason(&plan).contains("model-00001-of-00003.safetensors was not left by this run (missing)"));
    plan.create(dir.path()).unwrap();
    plan.reopen(dir.path()).unwrap();
    let mut other = specs();
    other[0] = TensorSpec::new("embex", Dtype::BF16, [10, 3]);
    assert!(reason(&OutputPlan::new(other.clone(), 100).unwrap()).contains("another header"));
    other[0] = TensorSpec::new("embed", Dtype::BF16, [10, 2]);
    assert!(reason(&OutputPlan::new(other, 100).unwrap()).contains("another size"));
    std::fs::write(dir.path().join("model.safetensors.index.json"), "{}").unwrap();
    assert!(reason(&plan).contains("another index"));
}

#[test]
fn misuse_is_an_error() {
    let twice = vec![TensorSpec::new("t", Dtype::F32, [4]), TensorSpec::new("t", Dtype::F32, [4])];
    for limit in [1, 1000] {
        assert!(matches!(OutputPlan::new(twice.clone(), limit), Err(Error::Layout { tensor, .. }) if tensor == "t"));
    }
    assert!(OutputPlan::new(vec![TensorSpec::new("__metadata__", Dtype::F32, [4])], 1000).is_err());
    assert!(OutputPlan::new(vec![TensorSpec::new("t", Dtype::F32, [usize::MAX, 2])], 1000).is_err());
    let dir = tempfile::tempdir().unwrap();
    let output = OutputPlan::new(specs(), 1000).unwrap().create(dir.path()).unwrap();
    let error = output.write("a.odd", &[1, 2]).unwrap_err().to_string();
    assert_eq!(error, "output tensor a.odd: 2 bytes where the plan has 3");
    assert!(output.write("absent", &[]).is_err());
    // No tensors at all is a valid, if pointless, folder.
    let empty = tempfile::tempdir().unwrap();
    OutputPlan::new(vec![], 1000).unwrap().create(empty.path()).unwrap();
    read_back(empty.path(), &[]);
}

#[test]
fn a_full_disk_is_noticed_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    ensure_free(dir.path(), 1).unwrap();
    ensure_free(&dir.path().join("not/yet/there"), 1).unwrap();
    let error = ensure_free(dir.path(), u64::MAX).unwrap_err();
    assert!(matches!(error, Error::DiskFull { needed: u64::MAX, free, .. } if free > 0));
    let plan = OutputPlan::new(vec![TensorSpec::new("t", Dtype::F32, [1 << 58])], u64::MAX).unwrap();
    let out = dir.path().join("out");
    assert!(matches!(plan.create(&out), Err(Error::DiskFull { .. })));
    assert!(!out.exists());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn any_set_of_tensors_comes_back(dims in prop::collection::vec((0usize..4, 0usize..6, 0usize..9), 0..20), limit in 1u64..300) {
        let types = [Dtype::F32, Dtype::BF16, Dtype::I8, Dtype::I64];
        let specs: Vec<TensorSpec> =
            dims.iter().enumerate().map(|(i, &(t, a, b))| TensorSpec::new(format!("t \"{i}\" é"), types[t], [a, b])).collect();
        let dir = tempfile::tempdir().unwrap();
        let plan = OutputPlan::new(specs.clone(), limit).unwrap();
        let output = plan.create(dir.path()).unwrap();
        for spec in &specs {
            output.write(&spec.name, &payload(spec)).unwrap();
        }
        read_back(dir.path(), &specs);
    }
}
