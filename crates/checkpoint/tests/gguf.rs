//! GGUF: blocks as gguf-py reads them, a container that comes back as it was written, and hostile bytes.

#![allow(clippy::unwrap_used, reason = "a failed test panics")]

mod support;

use bitmill_checkpoint::gguf::{GgufSpec, Storage, TYPES, Value, ValueType, by_storage, header, parse};
use bitmill_checkpoint::{Checkpoint, Error, FORMATS, GGUF, OutputPlan, Weight};
use bitmill_scheme::{BLOCKS, Bits, BlockForm, BlockType, Granularity, Quantized, Scheme};
use proptest::prelude::*;
use safetensors::Dtype;
use std::path::Path;
use support::Random;

fn golden() -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/blocks.gguf")).unwrap()
}

#[test]
fn gguf_py_agrees_on_every_bit_of_every_type() {
    let bytes = golden();
    let checkpoint = Checkpoint::gguf_in_memory(bytes.clone()).unwrap();
    let gguf = checkpoint.gguf().unwrap();
    assert!(gguf.get("versions").and_then(Value::text).unwrap().contains("gguf"));
    assert_eq!(gguf.get("text").unwrap().items().unwrap().len(), 3);
    assert_eq!(gguf.get("real").and_then(Value::real), Some(0.25));
    for form in BLOCKS {
        let module = by_storage(Storage::Block(form.kind)).unwrap().name;
        let Weight::Quantized(q) = checkpoint.weight(module).unwrap() else { panic!("{module} is dense") };
        let expected = checkpoint.tensor(&format!("{module}.values")).unwrap().to_f32().unwrap();
        let bits = |v: Vec<f32>| v.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        assert_eq!(bits(q.dequantize()), bits(expected), "{module}");
        // What was read is written as the same bytes.
        let stored = checkpoint.tensor(&format!("{module}.weight")).unwrap().bytes;
        assert_eq!(GGUF.encode(module, &q)[0], stored, "{module}");
        assert_eq!(checkpoint.scheme_of(module), Some(Scheme::block(form.kind)));
    }
}

/// Random codes that the type allows.
fn codes(form: &BlockForm, count: usize, random: &mut Random) -> Vec<u8> {
    let Some(book) = form.codebook() else {
        return (0..count).map(|_| random.below(form.levels.len() as u32) as u8).collect();
    };
    let mut codes = vec![0u8; count];
    codes.chunks_mut(book.len).for_each(|v| book.vector(random.below(book.vectors as u32) as usize, v));
    let flags = 1 << book.flags.bits(book.unit);
    codes.chunks_mut(book.unit).for_each(|unit| book.set_flags(random.below(flags) as usize, unit));
    codes
}

/// A matrix that uses every code and every integer.
fn random(kind: BlockType, shape: [usize; 2], random: &mut Random) -> Quantized {
    let (form, scheme) = (kind.form(), Scheme::block(kind));
    let blocks = shape[0] * shape[1] / form.len;
    let q = Quantized {
        scheme,
        shape,
        codes: codes(form, shape[0] * shape[1], random),
        scales: (0..blocks * form.reals())
            .map(|_| scheme.scale.round((random.below(2000) as f32 - 1000.0) * 1e-4))
            .collect(),
        zeros: (0..blocks * form.integers())
            .map(|i| random.below(u32::from(form.max_integer(i % form.integers())) + 1) as u8)
            .collect(),
        group_of: vec![],
        input: None,
    };
    q.validate().unwrap();
    q
}

#[test]
fn what_is_written_is_what_is_read_rows_in_order() {
    let mut r = Random(5);
    for form in BLOCKS {
        for (name, shape) in [("model.layers.0.self_attn.q_proj", [16, 512]), ("model.layers.0.mlp.up_proj", [5, 256])]
        {
            let q = random(form.kind, shape, &mut r);
            GGUF.check(name, &q.scheme, shape).unwrap();
            let layout = GGUF.layout(name, &q.scheme, shape);
            let bytes = GGUF.encode(name, &q).remove(0);
            assert_eq!((layout.len(), layout[0].bytes()), (1, bytes.len()));
            // Invariant 7.
            assert_eq!(q.scheme.bits_per_weight(shape) * (shape[0] * shape[1]) as f64, bytes.len() as f64 * 8.0);

            let dir = tempfile::tempdir().unwrap();
            let kind = by_storage(Storage::Block(form.kind)).unwrap();
            let gguf_name = bitmill_checkpoint::gguf::gguf_name("llama", &format!("{name}.weight")).unwrap();
            let spec = GgufSpec { name: gguf_name, kind, shape: shape.to_vec() };
            let plan =
                OutputPlan::gguf("m", &keys(), &embedding(), &[(format!("{name}.weight"), spec)], u64::MAX).unwrap();
            let output = plan.create(dir.path()).unwrap();
            let heads = bitmill_checkpoint::gguf::interleaved_heads("llama", &format!("{name}.weight"), 4, 2);
            let stored = match heads {
                Some(heads) => bitmill_checkpoint::gguf::interleave(&bytes, shape[0], heads),
                None => bytes,
            };
            output.write(&format!("{name}.weight"), &stored).unwrap();
            output.sync().unwrap();
            let checkpoint = Checkpoint::open(&dir.path().join("m.gguf")).unwrap();
            assert_eq!(std::fs::metadata(dir.path().join("m.gguf")).unwrap().len(), plan.total_bytes());
            let Weight::Quantized(read) = checkpoint.weight(name).unwrap() else { panic!("dense") };
            assert_eq!(read, q, "{} {name}", form.name);
            assert_eq!(heads.is_some(), stored != GGUF.encode(name, &q)[0], "the order of rows was at stake");
        }
    }
}

/// Metadata of a llama with four heads over two.
fn keys() -> Vec<(String, Value)> {
    let mut keys = vec![("general.architecture".to_owned(), Value::Text("llama".into()))];
    for (key, n) in [
        ("context_length", 64),
        ("embedding_length", 512),
        ("block_count", 1),
        ("feed_forward_length", 5),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
    ] {
        keys.push((format!("llama.{key}"), Value::U32(n)));
    }
    keys.push(("llama.attention.layer_norm_rms_epsilon".into(), Value::F32(1e-5)));
    keys
}

/// The tensor that tells the size of the vocabulary.
fn embedding() -> [(GgufSpec, Vec<u8>); 1] {
    let spec = GgufSpec { name: "token_embd.weight".into(), shape: vec![3, 512], ..f32_tensor("", 1) };
    [(spec, vec![0; 3 * 512 * 4])]
}

fn file(metadata: &[(String, Value)], tensors: &[GgufSpec]) -> Vec<u8> {
    let (mut bytes, _, size) = header(metadata, tensors).unwrap();
    bytes.resize(size as usize, 0);
    bytes
}

fn f32_tensor(name: &str, n: usize) -> GgufSpec {
    GgufSpec { name: name.into(), kind: by_storage(Storage::Dense(Dtype::F32)).unwrap(), shape: vec![n] }
}

#[test]
fn every_kind_of_value_comes_back() {
    let values = vec![
        Value::U8(1),
        Value::I8(-1),
        Value::U16(2),
        Value::I16(-2),
        Value::U32(3),
        Value::I32(-3),
        Value::F32(0.5),
        Value::Bool(true),
        Value::Text("é".into()),
        Value::U64(4),
        Value::I64(-4),
        Value::F64(0.25),
        Value::Array(ValueType::F32, vec![Value::F32(1.0), Value::F32(2.0)]),
        Value::Array(ValueType::Text, vec![]),
    ];
    let metadata: Vec<(String, Value)> = values.into_iter().enumerate().map(|(i, v)| (format!("key.{i}"), v)).collect();
    let bytes = file(&metadata, &[f32_tensor("a", 3), f32_tensor("b", 9)]);
    let gguf = parse(&bytes).unwrap();
    assert!(metadata.iter().all(|(k, v)| gguf.get(k) == Some(v)));
    assert_eq!(
        gguf.tensors.iter().map(|t| (t.name.as_str(), t.range.len())).collect::<Vec<_>>(),
        [("a", 12), ("b", 36)]
    );
    assert!(gguf.tensors.iter().all(|t| t.range.start % 32 == 0));
}

#[test]
fn the_loaders_rules_are_ours() {
    let refused = |bytes: &[u8]| parse(bytes).unwrap_err();
    let good = file(&[("a".into(), Value::U32(7))], &[f32_tensor("t", 3), f32_tensor("u", 3)]);
    parse(&good).unwrap();
    let patched = |from: &[u8], to: &[u8]| {
        let at = good.windows(from.len()).position(|w| w == from).unwrap();
        [&good[..at], to, &good[at + from.len()..]].concat()
    };
    let name = |n: &str| [&(n.len() as u64).to_le_bytes()[..], n.as_bytes()].concat();
    for (bytes, words) in [
        (b"GGUF".to_vec(), "ends inside its header"),
        (patched(b"GGUF", b"GGML"), "does not begin with GGUF"),
        (patched(&3u32.to_le_bytes(), &1u32.to_le_bytes()), "version 1"),
        (patched(&3u32.to_le_bytes(), &3u32.to_be_bytes()), "big-endian"),
        (patched(&2u64.to_le_bytes(), &u64::MAX.to_le_bytes()), "tensors in"),
        (patched(&name("u"), &name("t")), "t is there twice"),
        (patched(&32u64.to_le_bytes(), &0u64.to_le_bytes()), "lies at offset 0 where 32 is expected"),
        (patched(&32u64.to_le_bytes(), &64u64.to_le_bytes()), "lies at offset 64"),
        (patched(&name("a"), &name("")), "a metadata key has 0 bytes"),
        (good[..good.len() - 30].to_vec(), "ends at byte"),
    ] {
        let error = refused(&bytes);
        assert!(error.contains(words), "{error} for {words}");
    }
    let q8 = by_storage(Storage::Block(BlockType::Q8_0)).unwrap();
    for (spec, words) in [
        (f32_tensor(&"n".repeat(64), 1), "at most 63 bytes"),
        (GgufSpec { name: "x".into(), kind: q8, shape: vec![2, 33] }, "no multiple of Q8_0's 32"),
        (GgufSpec { name: "x".into(), kind: q8, shape: vec![] }, "no tensors of shape"),
    ] {
        assert!(header(&[], &[spec]).unwrap_err().to_string().contains(words), "{words}");
    }
    let twice = [("k".to_owned(), Value::Bool(true)), ("k".to_owned(), Value::Bool(true))];
    assert!(header(&twice, &[]).unwrap_err().to_string().contains("given twice"));
    let alignment = |v| parse(&file(&[("general.alignment".into(), v)], &[]));
    assert!(
        alignment(Value::U32(64)).is_ok() && alignment(Value::U32(48)).is_err() && alignment(Value::U64(32)).is_err()
    );
}

#[test]
fn schemes_and_formats_go_together() {
    let int = Scheme::int(Bits::new(4).unwrap(), true, Granularity::Group(32));
    let error = GGUF.check("m", &int, [32, 256]).unwrap_err();
    assert!(
        matches!(&error, Error::Unsupported { .. }) && error.to_string().contains("choose one with --scheme"),
        "{error}"
    );
    let q4_k = Scheme::block(BlockType::Q4K);
    assert!(GGUF.check("m", &q4_k, [32, 160]).unwrap_err().to_string().contains("blocks of 32"));
    assert!(FORMATS.iter().all(|format| format.check("m", &q4_k, [32, 256]).is_err()));
    let error = FORMATS[0].check("m", &q4_k, [32, 256]).unwrap_err();
    assert!(error.to_string().contains("type of GGUF"), "{error}");
    assert!(TYPES.iter().all(|t| t.block == 1 || t.bytes > 1));
}

proptest! {
    #[test]
    fn damaged_files_never_panic(at in 0usize..1600, value: u8, cut in 0usize..60_000) {
        let mut bytes = golden();
        bytes.truncate(bytes.len().min(cut.max(at + 1)));
        bytes[at] = value;
        if let Ok(checkpoint) = Checkpoint::gguf_in_memory(bytes) {
            for name in checkpoint.names() {
                if let Some(module) = name.strip_suffix(".weight") && let Ok(w) = checkpoint.weight(module) {
                    let _ = w.to_f32();
                }
            }
        }
    }

    #[test]
    fn any_block_is_read_or_refused(seed in 1u64.., kind in 0..BLOCKS.len()) {
        let form = &BLOCKS[kind];
        let mut random = Random(seed);
        let kind = by_storage(Storage::Block(form.kind)).unwrap();
        let mut bytes = file(&[], &[GgufSpec { name: "m.weight".into(), kind, shape: vec![3, 512] }]);
        let data = bytes.len() - (3 * 512 / form.len * form.bytes).next_multiple_of(32);
        bytes[data..].iter_mut().for_each(|b| *b = random.below(256) as u8);
        let checkpoint = Checkpoint::gguf_in_memory(bytes).unwrap();
        match checkpoint.weight("m") {
            Ok(w) => prop_assert_eq!(w.to_f32().unwrap().len(), 3 * 512),
            Err(e) => prop_assert!(matches!(e, Error::Damaged { .. }), "{}", e),
        }
    }
}
