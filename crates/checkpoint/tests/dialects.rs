//! Reading `quantization_config`: targets, precedence, presets, and clear refusals.

#![allow(clippy::unwrap_used, reason = "a failed test panics")]

use bitmill_checkpoint::{Dialect, Error, format};
use bitmill_scheme::{Activations, Bits, Granularity, ScaleType, Scheme};
use serde_json::{Value, json};
use std::collections::BTreeMap;

fn read(block: Value) -> Result<Option<Dialect>, Error> {
    Dialect::of(&json!({"torch_dtype": "bfloat16", "quantization_config": block}))
}

fn int(bits: u32, symmetric: bool, granularity: Granularity) -> Scheme {
    Scheme::int(Bits::new(bits).unwrap(), symmetric, granularity)
}

fn group(targets: Value, bits: u32) -> Value {
    json!({"targets": targets, "weights": {"num_bits": bits, "type": "int", "symmetric": true, "strategy": "group", "group_size": 64}})
}

#[test]
fn exact_names_come_before_patterns_before_classes() {
    let dialect = read(json!({
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head", "re:.*mlp.gate$"],
        "config_groups": {
            "a": group(json!(["Linear"]), 4),
            "b": group(json!(["re:.*down_proj", "re:model\\.layers\\.(?!0\\.).*o_proj$"]), 8),
            "c": group(json!(["model.layers.0.mlp.down_proj"]), 2),
        }
    }));
    let dialect = dialect.unwrap().unwrap();
    let bits = |m: &str| dialect.scheme_of(m).map(|s| s.bits().get());
    assert_eq!(bits("model.layers.0.self_attn.q_proj"), Some(4));
    assert_eq!(bits("model.layers.0.mlp.down_proj"), Some(2));
    // Anchored at the start, open at the end.
    assert_eq!(bits("model.layers.1.mlp.down_proj.inner"), Some(8));
    assert_eq!(bits("model.layers.1.self_attn.o_proj"), Some(8));
    assert_eq!(bits("model.layers.0.self_attn.o_proj"), Some(4));
    assert_eq!(bits("x.model.layers.1.self_attn.o_proj"), Some(4));
    assert_eq!(bits("lm_head"), None);
    assert_eq!(bits("model.layers.3.mlp.gate"), None);
    assert_eq!(bits("model.layers.3.mlp.gate_proj"), Some(4));
    assert_eq!(dialect.format().name(), "pack-quantized");
}

#[test]
fn presets_defaults_and_mixed_formats() {
    let dialect = read(json!({
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"W4A16": ["Linear"], "w4a16_asym": ["re:.*v_proj"]}
    }));
    let dialect = dialect.unwrap().unwrap();
    assert_eq!(dialect.scheme_of("q_proj"), Some(int(4, true, Granularity::Group(128))));
    assert_eq!(dialect.scheme_of("v_proj"), Some(int(4, false, Granularity::Group(128))));

    let activations = json!({"num_bits": 8, "type": "int", "symmetric": true, "strategy": "token", "dynamic": true, "observer": null});
    let dialect = read(json!({
        "quant_method": "compressed-tensors", "format": "mixed-precision",
        "config_groups": {
            "a": {"targets": ["re:.*mlp"], "weights": {"num_bits": 8, "group_size": -1}, "input_activations": activations, "format": "int-quantized"},
            "b": {"targets": ["re:.*attn"], "weights": {}, "format": "naive-quantized"},
        }
    }));
    let dialect = dialect.unwrap().unwrap();
    assert_eq!(dialect.format().name(), "mixed-precision");
    let mlp = Scheme { activations: Activations::DynamicInt8, ..int(8, true, Granularity::Channel) };
    assert_eq!(dialect.scheme_of("mlp"), Some(mlp));
    assert_eq!(dialect.scheme_of("attn"), Some(int(8, true, Granularity::Tensor)));
    assert_eq!(dialect.format_of("attn").unwrap().name(), "naive-quantized");
    assert_eq!(dialect.scheme_of("other"), None);
}

#[test]
fn dynamic_rules_of_gptq_apply_in_order() {
    let dialect = read(json!({
        "quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": false, "sym": true, "lm_head": false,
        "dynamic": {"-:.*mlp\\.gate$": {}, "+:.*down_proj$": {"bits": 8, "group_size": 32}, ".*proj": {"group_size": -1}}
    }));
    let dialect = dialect.unwrap().unwrap();
    let f16 = |s: Scheme| Some(Scheme { scale: dialect.scheme_of("x").unwrap().scale, ..s });
    assert_eq!(dialect.scheme_of("a.mlp.gate"), None);
    assert_eq!(dialect.scheme_of("a.down_proj"), f16(int(8, true, Granularity::Group(32))));
    assert_eq!(dialect.scheme_of("a.up_proj"), f16(int(4, true, Granularity::Channel)));
    assert_eq!(dialect.scheme_of("a.x"), f16(int(4, true, Granularity::Group(128))));
    assert_eq!(dialect.scheme_of("lm_head"), None);
}

#[test]
fn packings_of_auto_round_are_those_of_other_formats() {
    for (packing, name) in [
        ("auto_round:auto_gptq", "gptq"),
        ("auto_round", "gptq_v2"),
        ("auto_round:gptqmodel", "gptq_v2"),
        ("auto_round:auto_awq", "awq"),
    ] {
        let dialect = read(json!({
            "quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": true, "data_type": "int",
            "packing_format": packing, "extra_config": {"model.layers.1.mlp.up_proj": {"bits": 16}},
        }));
        let dialect = dialect.unwrap().unwrap();
        assert_eq!(dialect.format().name(), name);
        let found = dialect.scheme_of("model.layers.0.mlp.up_proj").unwrap();
        assert_eq!((found.bits().get(), found.granularity), (4, Granularity::Group(32)));
        assert_eq!(dialect.scheme_of("model.layers.1.mlp.up_proj"), None, "{packing}");
    }
    let wide = read(json!({
        "quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": true, "packing_format": "auto_round:auto_gptq",
        "extra_config": {"m.x": {"bits": 8, "group_size": 32}, ".*y": {"bits": 2}},
    }));
    let wide = wide.unwrap().unwrap();
    let of = |module: &str| wide.scheme_of(module).map(|s| (s.bits().get(), s.granularity));
    assert_eq!(of("m.x"), Some((8, Granularity::Group(32))));
    assert_eq!(of("a.y"), Some((2, Granularity::Group(128))));
    assert_eq!(of("mxx"), Some((4, Granularity::Group(128))));
}

#[test]
fn exceptions_of_awq_are_parts_of_names() {
    let dialect = read(json!({
        "quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": true, "version": "GEMM",
        "modules_to_not_convert": ["visual", "mlp.gate."]
    }));
    let dialect = dialect.unwrap().unwrap();
    let f16 = int(4, false, Granularity::Group(64)).with_scale(dialect.scheme_of("x").unwrap().scale);
    assert_eq!(dialect.format().name(), "awq");
    assert_eq!(dialect.scheme_of("model.layers.0.mlp.gate_proj"), Some(f16));
    for left in ["model.visual.blocks.0.qkv", "model.layers.0.mlp.gate.x", "lm_head"] {
        assert_eq!(dialect.scheme_of(left), None, "{left}");
    }
}

#[test]
fn presets_and_arguments_say_how_inputs_are_rounded() {
    for (preset, name) in [("FP8", "fp8"), ("NVFP4", "nvfp4"), ("MXFP4", "mxfp4"), ("MXFP8", "mxfp8")] {
        let scheme = bitmill_scheme::scheme(name).unwrap();
        let own = bitmill_checkpoint::format(bitmill_checkpoint::default_format(&scheme)).unwrap();
        let config = own.config(&[("x".to_owned(), scheme)].into(), &[]).unwrap();
        assert_eq!(read(config.clone()).unwrap().unwrap().scheme_of("x"), Some(scheme), "{name}");
        let short =
            json!({"quant_method": "compressed-tensors", "format": own.name(), "config_groups": {preset: ["Linear"]}});
        assert_eq!(read(short).unwrap().unwrap().scheme_of("x"), Some(scheme), "{preset}");
        // As the library writes it out, with what it leaves at its defaults.
        let mut full = config.clone();
        let inputs = &mut full["config_groups"]["group_0"]["input_activations"];
        inputs["observer"] = json!("static_minmax");
        inputs["zp_dtype"] = json!(null);
        inputs["actorder"] = json!(null);
        assert_eq!(read(full.clone()).unwrap().unwrap().scheme_of("x"), Some(scheme), "{name}");
        full["config_groups"]["group_0"]["input_activations"]["num_bits"] = json!(3);
        let refused = read(full).unwrap_err().to_string();
        assert!(refused.contains("config_groups.group_0.input_activations"), "{refused}");
    }
    let modelopt = json!({"quant_method": "modelopt", "quant_algo": "NVFP4"});
    assert_eq!(read(modelopt).unwrap().unwrap().scheme_of("x"), bitmill_scheme::scheme("nvfp4"));
}

#[test]
fn exceptions_of_modelopt_and_fine_grained_fp8() {
    let modelopt =
        json!({"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4", "ignore": ["lm_head", "*self_attn*"]});
    let dialect = read(modelopt).unwrap().unwrap();
    assert_eq!(dialect.scheme_of("model.layers.0.mlp.up_proj"), bitmill_scheme::scheme("nvfp4a16"));
    assert!(["lm_head", "model.layers.0.self_attn.q_proj"].iter().all(|m| dialect.scheme_of(m).is_none()));
    assert!(dialect.scheme_of("model.lm_head").is_some());
    let fp8 = json!({
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", "mlp.gate"],
    });
    let dialect = read(fp8).unwrap().unwrap();
    assert_eq!(dialect.scheme_of("model.layers.0.mlp.gate_proj"), bitmill_scheme::scheme("fp8_block"));
    assert!(["lm_head", "model.layers.0.mlp.gate"].iter().all(|m| dialect.scheme_of(m).is_none()));
}

#[test]
fn configurations_written_are_read_back() {
    let layers: BTreeMap<String, Scheme> = [
        ("model.layers.0.q_proj", int(4, true, Granularity::Group(128))),
        ("model.layers.0.v_proj", int(8, true, Granularity::Channel)),
        ("model.layers.1.q_proj", int(4, true, Granularity::Group(128))),
    ]
    .map(|(m, s)| (m.to_owned(), s.with_scale(ScaleType::F16)))
    .into();
    let ignored = ["lm_head".to_owned(), "model.layers.0.gate".to_owned()];
    for name in ["pack-quantized", "naive-quantized", "gptq", "gptq_v2"] {
        let block = format(name).unwrap().config(&layers, &ignored).unwrap();
        let dialect = Dialect::of(&json!({"dtype": "float16", "quantization_config": block})).unwrap().unwrap();
        assert_eq!(dialect.format().name(), name);
        for (module, scheme) in &layers {
            assert_eq!(dialect.scheme_of(module), Some(*scheme), "{name} {module}");
        }
        assert!(ignored.iter().all(|m| dialect.scheme_of(m).is_none()), "{name}");
    }
    // Groups of a mixture say each what they are stored in.
    let named = |name: &str| bitmill_scheme::scheme(name).unwrap();
    let layers: BTreeMap<String, Scheme> =
        ["w4a16", "w8a8", "fp8_block", "nvfp4a16", "mxfp4a16"].map(|name| (name.to_owned(), named(name))).into();
    let block = format("mixed-precision").unwrap().config(&layers, &ignored).unwrap();
    assert_eq!(block["format"], "mixed-precision");
    let dialect = read(block).unwrap().unwrap();
    assert_eq!(dialect.format().name(), "mixed-precision");
    let stored = ["pack-quantized", "int-quantized", "float-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized"];
    for (name, format) in ["w4a16", "w8a8", "fp8_block", "nvfp4a16", "mxfp4a16"].iter().zip(stored) {
        assert_eq!(dialect.scheme_of(name), Some(named(name)));
        assert_eq!(dialect.format_of(name).map(|f| f.name()), Some(format));
    }
    // One scheme targets the class, and carries nothing a strict reader would refuse.
    let single = BTreeMap::from([("q_proj".to_owned(), int(4, true, Granularity::Group(128)))]);
    let block = format("pack-quantized").unwrap().config(&single, &ignored).unwrap();
    assert_eq!(block["config_groups"]["group_0"]["targets"], json!(["Linear"]));
    let args: Vec<&String> = block["config_groups"]["group_0"]["weights"].as_object().unwrap().keys().collect();
    assert_eq!(args, ["num_bits", "type", "symmetric", "strategy", "group_size", "dynamic"]);
}

#[test]
fn what_is_not_read_is_named() {
    let ct = |extra: Value| {
        let mut block = json!({"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": group(json!(["Linear"]), 4)}});
        block.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        block
    };
    let weights = |w: Value| ct(json!({"config_groups": {"g": {"targets": ["Linear"], "weights": w}}}));
    let gptq = |extra: Value| {
        let mut block = json!({"quant_method": "gptq", "bits": 4, "group_size": 128});
        block.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        block
    };
    let awq = |extra: Value| {
        let mut block =
            json!({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": true, "version": "GEMM"});
        assert!(read(block.clone()).unwrap().is_some());
        block.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        block
    };
    let round = |extra: Value| {
        let mut block = json!({"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": true});
        block.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        block
    };
    for (block, message) in [
        (
            json!({"quant_method": "hqq"}),
            "quant_method \"hqq\" is not one this version reads; it reads compressed-tensors, gptq, awq, auto-round, modelopt, fp8",
        ),
        (awq(json!({"version": "gemv"})), "version \"gemv\""),
        (awq(json!({"w_bit": 3, "bits": null})), "bits is 3"),
        (round(json!({"packing_format": "auto_round:triton"})), "packing_format is \"auto_round:triton\""),
        (round(json!({"data_type": "mx_fp"})), "data_type is \"mx_fp\""),
        (
            round(json!({"packing_format": "auto_round:auto_awq", "extra_config": {"m": {"bits": 8}}})),
            "extra_config is \"m\"",
        ),
        (awq(json!({"group_size": 0})), "group_size is 0"),
        (awq(json!({"modules_to_not_convert": [7]})), "modules_to_not_convert is 7"),
        (json!({"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}), "NVFP4 and W4A16_NVFP4 are read"),
        (json!({"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4", "kv_cache_scheme": {}}), "kv_cache_scheme"),
        (json!({"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4", "group_size": 32}), "groups of 16"),
        (json!({"quant_method": "fp8", "activation_scheme": "static"}), "activation_scheme is \"static\""),
        (json!({"quant_method": "fp8"}), "weight_block_size is missing"),
        (json!({"quant_method": "fp8", "weight_block_size": [128, 64]}), "tiles of [128, 128]"),
        (json!({"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}), "scale_fmt"),
        (json!({}), "quant_method is missing"),
        (json!("w4"), "quant_method is missing"),
        (
            ct(json!({"format": "float-quantized"})),
            "format is \"float-quantized\"; its numbers are floats, and these are not",
        ),
        (ct(json!({"format": "gptq"})), "format \"gptq\""),
        (ct(json!({"format": null})), "format is null"),
        (ct(json!({"config_groups": []})), "config_groups is []"),
        (ct(json!({"config_groups": {}})), "no group quantizes weights"),
        (ct(json!({"config_groups": {"MXFP6": ["Linear"]}})), "config_groups \"MXFP6\""),
        (
            json!({"quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "int4"}),
            "bnb_4bit_quant_type is \"int4\"",
        ),
        (json!({"quant_method": "bitsandbytes", "load_in_8bit": true}), "load_in_4bit is missing"),
        (json!({"quant_method": "mxfp4", "modules_to_not_convert": [7]}), "modules_to_not_convert is 7"),
        (ct(json!({"config_groups": {"W9A16": ["Linear"]}})), "config_groups \"W9A16\""),
        (ct(json!({"kv_cache_scheme": {"num_bits": 8}})), "kv_cache_scheme"),
        (ct(json!({"transform_config": {"config_groups": {"r": {}}}})), "transform_config"),
        (ct(json!({"sparsity_config": {"format": "sparse-24-bitmask"}})), "sparsity_config"),
        (ct(json!({"ignore": ["re:("]})), "not a pattern"),
        (ct(json!({"ignore": [3]})), "ignore is 3; a string is needed"),
        (weights(json!({"type": "float"})), "format is \"pack-quantized\"; it does not store fp8 tensor"),
        (weights(json!({"type": "bool"})), "config_groups.g.weights.type is \"bool\""),
        (weights(json!({"type": "float", "num_bits": 6})), "num_bits is 6"),
        (weights(json!({"type": "float", "symmetric": false})), "symmetric is false"),
        (
            weights(json!({"type": "float", "strategy": "block", "block_structure": [128, 64]})),
            "block_structure is [128,64]",
        ),
        (
            ct(json!({"format": "nvfp4-pack-quantized", "config_groups": {"MXFP4A16": ["Linear"]}})),
            "it does not store nvfp4 g32",
        ),
        (weights(json!({"num_bits": 9})), "num_bits is 9"),
        (weights(json!({"strategy": "block"})), "strategy is \"block\""),
        (weights(json!({"strategy": "group"})), "group_size is missing"),
        (weights(json!({"group_size": -2})), "group_size is -2"),
        (weights(json!({"dynamic": true})), "dynamic is true"),
        (gptq(json!({"bits": 5})), "bits is 5"),
        (gptq(json!({"group_size": 0})), "group_size is 0"),
        (gptq(json!({"checkpoint_format": "marlin"})), "checkpoint_format \"marlin\""),
        (gptq(json!({"pack_dtype": "int16"})), "pack_dtype is \"int16\""),
        (gptq(json!({"dynamic": {"(": {}}})), "not a pattern"),
    ] {
        let error = read(block.clone()).expect_err(&block.to_string()).to_string();
        assert!(error.contains(message), "{block}: {error}");
    }
    let activations = json!({"num_bits": 4, "type": "float", "strategy": "token", "dynamic": true});
    let block =
        ct(json!({"config_groups": {"g": {"targets": ["Linear"], "weights": {}, "input_activations": activations}}}));
    assert!(read(block).unwrap_err().to_string().contains("config_groups.g.input_activations"));
    assert!(Dialect::of(&json!({"model_type": "llama"})).unwrap().is_none());
}
