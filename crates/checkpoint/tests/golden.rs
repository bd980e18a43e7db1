//! Files written by the real libraries decode to the weights those libraries see, and encode to the same bytes.
//! `tools/reference/golden_formats.py` makes them and records the library versions inside.

#![allow(clippy::unwrap_used, reason = "a failed test panics")]

use bitmill_checkpoint::{Checkpoint, Weight, format};
use bitmill_scheme::{Fit, Grid, Quantized};
use serde_json::Value;
use std::path::Path;

#[test]
fn libraries_agree_on_every_byte() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut files: Vec<_> = std::fs::read_dir(&dir).unwrap().map(|e| e.unwrap().path()).collect();
    files.retain(|p| p.extension().is_some_and(|e| e == "safetensors"));
    files.sort();
    assert!(files.len() >= 3, "golden files are missing");
    for file in files {
        let bytes = std::fs::read(&file).unwrap();
        let (_, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        let metadata = metadata.metadata().clone().unwrap();
        let config: Value = serde_json::from_str(&metadata["config"]).unwrap();
        assert!(metadata.contains_key("versions"), "{} records its source", file.display());
        let checkpoint = Checkpoint::in_memory(config, bytes).unwrap();

        let modules: Vec<&str> = checkpoint.names().filter_map(|n| n.strip_suffix(".dequantized")).collect();
        assert!(!modules.is_empty());
        for module in modules {
            let Weight::Quantized(q) = checkpoint.weight(module).unwrap() else { panic!("{module} is dense") };
            let expected = checkpoint.tensor(&format!("{module}.dequantized")).unwrap().to_f32().unwrap();
            assert_eq!(checkpoint.matrix_shape(module).unwrap(), q.shape, "headers say what is decoded");
            assert_eq!(q.dequantize(), expected, "{} {module} {}", file.display(), q.scheme);

            if let Ok(original) = checkpoint.tensor(&format!("{module}.original")) {
                rounds_alike(&q, &original.to_f32().unwrap());
            }
            // What is only read (zero points of 0 in version 1 of GPTQ, scales that are rounded themselves) is not encoded.
            let format = checkpoint.dialect().unwrap().format_of(module).unwrap();
            let nested = checkpoint.contains(&format!("{module}.weight.nested_absmax"));
            if !nested && format.holds(module, &q).is_ok() {
                for (spec, payload) in format.layout(module, &q.scheme, q.shape).iter().zip(format.encode(module, &q)) {
                    let tensor = checkpoint.tensor(&spec.name).unwrap();
                    assert_eq!((tensor.dtype, tensor.shape), (spec.dtype, &spec.shape[..]), "{}", spec.name);
                    assert_eq!(tensor.bytes, payload, "{} of {}", spec.name, file.display());
                }
            }
        }
    }
    assert!(format("gptq").is_some());
}

/// The library's codes are those of our grid under its scale, which is that of the range.
fn rounds_alike(q: &Quantized, original: &[f32]) {
    let grid = q.scheme.float_grid(1.0).unwrap();
    let len = q.scheme.group_len(q.shape[1]);
    for (i, (w, codes)) in original.chunks(len).zip(q.codes.chunks(len)).enumerate() {
        let params = grid.fit(w, Fit::MinMax);
        // Of nothing but zeros any scale will do; the library has 0.
        assert!(
            params.scale == q.scales[i] || w.iter().all(|&w| w == 0.0),
            "block {i}: {} {}",
            params.scale,
            q.scales[i]
        );
        assert!(w.iter().zip(codes).all(|(&w, &code)| grid.nearest(w, params) == code), "block {i}");
    }
}
