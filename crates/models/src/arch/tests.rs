//! Configs that must be read, refused or survived, as tables.

use super::*;
use crate::{EMBEDDING, Role, RopeKind};
use serde_json::json;
use std::collections::BTreeSet;

fn tiny(model_type: &str) -> Value {
    json!({
        "model_type": model_type, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 128,
    })
}

fn with(model_type: &str, changes: Value) -> Value {
    let mut config = tiny(model_type);
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

/// A config that must be refused, the key the error must name, and a part of its reason.
fn bad() -> Vec<(Value, &'static str, &'static str)> {
    let llama = |changes| with("llama", changes);
    let scaled = |section| with("llama", json!({ "rope_scaling": section }));
    vec![
        (json!(null), "(root)", "not a JSON object"),
        (json!([1, 2]), "(root)", "not a JSON object"),
        (llama(json!({ "model_type": 7 })), "model_type", "not a string"),
        (json!({ "model_type": "llama" }), "hidden_size", "missing"),
        (llama(json!({ "hidden_size": 0 })), "hidden_size", "is 0"),
        (llama(json!({ "hidden_size": -32 })), "hidden_size", "-32"),
        (llama(json!({ "hidden_size": 32.5 })), "hidden_size", "32.5"),
        (llama(json!({ "hidden_size": "32" })), "hidden_size", "\"32\""),
        (llama(json!({ "hidden_size": u64::MAX })), "hidden_size", "not an integer from 1"),
        (llama(json!({ "hidden_size": 1e300 })), "hidden_size", "not an integer"),
        (llama(json!({ "hidden_size": 34 })), "num_attention_heads", "does not divide"),
        (llama(json!({ "hidden_size": 36 })), "num_attention_heads", "heads of 9"),
        (llama(json!({ "head_dim": 7 })), "head_dim", "heads of 7"),
        (llama(json!({ "num_key_value_heads": 3 })), "num_key_value_heads", "does not divide"),
        (llama(json!({ "num_key_value_heads": 0 })), "num_key_value_heads", "is 0"),
        (llama(json!({ "num_key_value_heads": 8 })), "num_key_value_heads", "does not divide"),
        (llama(json!({ "num_attention_heads": 0 })), "num_attention_heads", "is 0"),
        (llama(json!({ "num_hidden_layers": 1_000_000 })), "num_hidden_layers", "from 1 to 4096"),
        (llama(json!({ "vocab_size": 0 })), "vocab_size", "is 0"),
        (llama(json!({ "intermediate_size": [] })), "intermediate_size", "a list"),
        (llama(json!({ "max_position_embeddings": 0 })), "max_position_embeddings", "is 0"),
        (llama(json!({ "rms_norm_eps": -1e-5 })), "rms_norm_eps", "not a positive"),
        (llama(json!({ "rms_norm_eps": 1e-300 })), "rms_norm_eps", "not a positive"),
        (llama(json!({ "hidden_act": "x".repeat(1 << 20) })), "hidden_act", "understood are silu"),
        (llama(json!({ "hidden_act": {} })), "hidden_act", "an object"),
        (llama(json!({ "attention_bias": 1 })), "attention_bias", "not true or false"),
        (llama(json!({ "tie_word_embeddings": "yes" })), "tie_word_embeddings", "not true or false"),
        (llama(json!({ "bos_token_id": -1 })), "bos_token_id", "-1"),
        (llama(json!({ "bos_token_id": 1u64 << 32 })), "bos_token_id", "not an integer"),
        (llama(json!({ "rope_theta": 0 })), "rope_theta", "not a positive"),
        (llama(json!({ "rope_theta": 1.0 })), "rope_theta", "not above 1"),
        (llama(json!({ "rope_theta": 1e39 })), "rope_theta", "not a positive"),
        (llama(json!({ "rope_scaling": 4.0 })), "rope_scaling", "not an object"),
        (
            llama(json!({ "partial_rotary_factor": 0.5, "rope_scaling": { "type": "linear", "factor": 2 } })),
            "partial_rotary_factor",
            "unsupported",
        ),
        (
            llama(json!({ "rope_parameters": { "partial_rotary_factor": 0.5 } })),
            "rope_parameters.partial_rotary_factor",
            "unsupported",
        ),
        (
            llama(json!({ "rope_parameters": { "rope_type": "su" } })),
            "rope_parameters.rope_type",
            "\"su\"; understood are default",
        ),
        (
            llama(json!({ "rope_parameters": { "full_attention": {} } })),
            "rope_parameters.full_attention",
            "unsupported",
        ),
        (scaled(json!({ "type": "mrope" })), "rope_scaling.type", "\"mrope\""),
        (scaled(json!({ "type": ["linear"] })), "rope_scaling.type", "not a string"),
        (scaled(json!({ "type": "linear" })), "rope_scaling.factor", "missing"),
        (scaled(json!({ "type": "linear", "factor": 0 })), "rope_scaling.factor", "not a positive"),
        (scaled(json!({ "type": "dynamic", "factor": 0.5 })), "rope_scaling.factor", "1 or more"),
        (
            with("llama", json!({ "head_dim": 2, "rope_scaling": { "type": "dynamic", "factor": 2 } })),
            "rope_scaling.type",
            "two channels",
        ),
        (scaled(json!({ "rope_type": "llama3", "factor": 8 })), "rope_scaling.low_freq_factor", "missing"),
        (
            scaled(json!({ "rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4 })),
            "rope_scaling.high_freq_factor",
            "not above",
        ),
        (
            scaled(json!({ "rope_type": "yarn", "factor": 8, "original_max_position_embeddings": 0 })),
            "rope_scaling.original_max_position_embeddings",
            "is 0",
        ),
        (
            scaled(json!({ "rope_type": "yarn", "factor": 8, "truncate": "no" })),
            "rope_scaling.truncate",
            "not true or false",
        ),
        (scaled(json!({ "rope_type": "longrope", "factor": 8 })), "rope_scaling.short_factor", "missing"),
        (
            scaled(json!({ "rope_type": "longrope", "factor": 8, "short_factor": [1, 1], "long_factor": [] })),
            "rope_scaling.short_factor",
            "has 2 entries",
        ),
        (
            scaled(json!({ "rope_type": "longrope", "factor": 8, "short_factor": [1, 1, 1, "x"] })),
            "rope_scaling.short_factor",
            "not a positive",
        ),
        (
            scaled(json!({ "rope_type": "longrope", "factor": 8, "original_max_position_embeddings": 1 })),
            "rope_scaling.original_max_position_embeddings",
            "too short",
        ),
        (with("bert", json!({ "hidden_size": 34 })), "num_attention_heads", "does not divide"),
        (with("bert", json!({ "type_vocab_size": 0 })), "type_vocab_size", "is 0"),
        (with("bert", json!({ "position_embedding_type": "relative_key" })), "position_embedding_type", "absolute"),
        (with("bert", json!({ "is_decoder": true })), "is_decoder", "encoder"),
        (with("bert", json!({ "hidden_act": "mish" })), "hidden_act", "understood are silu"),
        (with("mistral", json!({ "sliding_window": 0 })), "sliding_window", "is 0"),
        (with("qwen2", json!({ "layer_types": ["full_attention"] })), "layer_types", "1 entries for 3 layers"),
        (with("qwen2", json!({ "layer_types": ["full_attention", "chunked", 1] })), "layer_types", "neither"),
        (
            with("qwen3", json!({ "layer_types": ["sliding_attention", "full_attention", "full_attention"] })),
            "layer_types",
            "denies",
        ),
        (with("qwen3", json!({ "use_sliding_window": true, "max_window_layers": -1 })), "max_window_layers", "-1"),
    ]
}

#[test]
fn bad_configs_name_the_key() {
    for (config, key, reason) in bad() {
        match spec(&config) {
            Err(Error::Config { key: k, reason: r }) => {
                assert!(k == key && r.contains(reason), "{key}: {reason}: got `{k}` {r}");
                assert!(r.len() < 200, "{key}: a hostile value floods the message");
            }
            other => panic!("{key}: {reason}: got {other:?}"),
        }
    }
}

#[test]
fn no_value_of_any_key_panics() {
    let scalings = ["linear", "dynamic", "llama3", "yarn", "longrope"].map(|kind| {
        json!({
            "rope_type": kind, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "beta_fast": 32, "beta_slow": 1,
            "original_max_position_embeddings": 32, "mscale": 1.0, "mscale_all_dim": 0.5, "attention_factor": null,
            "truncate": true, "short_factor": [1, 1, 1, 1], "long_factor": [1, 2, 3, 4],
        })
    });
    let odd = [
        json!(null),
        json!(true),
        json!(0),
        json!(-1),
        json!(1),
        json!(3),
        json!(u64::MAX),
        json!(i64::MIN),
        json!(0.5),
        json!(1e308),
        json!(5e-324),
        json!(""),
        json!("\u{1F980}"),
        json!([]),
        json!([null]),
        json!({}),
        json!({ "rope_type": "yarn" }),
    ];
    // Frequencies are computed too: a config that is accepted must also run.
    let run = |config: &Value| {
        if let Ok(spec) = spec(config) {
            for (rope, tokens) in spec.rope.iter().flat_map(|rope| [(rope, 1), (rope, 5000)]) {
                assert!(rope.frequencies(tokens).iter().all(|f| f.is_finite()), "{config}");
            }
            assert_eq!(spec.windows.len(), spec.layers);
        }
    };
    for arch in ARCHES.iter().flat_map(|a| a.model_types()) {
        for scaling in &scalings {
            let full = with(
                arch,
                json!({
                    "head_dim": 8, "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": false, "bos_token_id": 1,
                    "rope_theta": 1e4, "rope_scaling": scaling, "rope_parameters": null, "sliding_window": 4, "use_sliding_window": true,
                    "max_window_layers": 1, "layer_types": null, "attention_bias": false, "mlp_bias": false,
                    "partial_rotary_factor": 1.0, "original_max_position_embeddings": null, "layer_norm_eps": 1e-12,
                    "type_vocab_size": 2, "position_embedding_type": "absolute", "is_decoder": false,
                }),
            );
            assert!(spec(&full).is_ok(), "{arch} {scaling}: {:?}", spec(&full));
            for value in &odd {
                for key in full.as_object().unwrap().keys() {
                    let mut config = full.clone();
                    config[key] = value.clone();
                    run(&config);
                }
                for key in scaling.as_object().unwrap().keys() {
                    let mut config = full.clone();
                    config["rope_scaling"][key] = value.clone();
                    run(&config);
                }
            }
        }
    }
}

#[test]
fn unknown_architectures_list_the_known_ones() {
    let error = spec(&tiny("gpt2")).unwrap_err();
    assert!(matches!(&error, Error::UnknownArchitecture { model_type, .. } if model_type == "gpt2"));
    assert!(error.to_string().contains("bert, llama, mistral, qwen2, qwen3"), "{error}");
    assert!(matches!(spec(&json!({})), Err(Error::UnknownArchitecture { .. })));
}

#[test]
fn silence_means_the_reference_defaults() {
    let llama = spec(&tiny("llama")).unwrap();
    assert_eq!((llama.head_dim, llama.norm_eps, llama.bos, llama.act), (8, 1e-6, Some(1), Act::Silu));
    assert_eq!(llama.rope.unwrap(), Rope { theta: 1e4, dim: 8, kind: RopeKind::Default });
    assert!(!llama.tied && !llama.qkv_bias && !llama.out_bias && !llama.mlp_bias && !llama.qk_norm);
    assert_eq!(spec(&with("llama", json!({ "num_key_value_heads": null }))).unwrap().kv_heads, 4);
    assert_eq!(spec(&with("llama", json!({ "bos_token_id": null }))).unwrap().bos, None);

    let window = |changes| spec(&with("mistral", changes)).unwrap().windows;
    assert_eq!(window(json!({})), [Some(4096); 3]);
    assert_eq!(window(json!({ "sliding_window": null })), [None; 3]);
    assert_eq!(window(json!({ "sliding_window": 7 })), [Some(7); 3]);

    let window = |changes| spec(&with("qwen2", changes)).unwrap().windows;
    assert_eq!(window(json!({ "sliding_window": 7, "max_window_layers": 0 })), [None; 3]);
    assert_eq!(
        window(json!({ "use_sliding_window": true, "sliding_window": 7, "max_window_layers": 2 })),
        [None, None, Some(7)]
    );
    assert_eq!(window(json!({ "use_sliding_window": true, "sliding_window": 7 })), [None; 3]);

    let bert = spec(&tiny("bert")).unwrap();
    assert_eq!((bert.token_types, bert.norm_eps, bert.act, bert.causal), (2, 1e-12, Act::Gelu, false));
    assert_eq!((bert.kv_heads, bert.head(), &bert.rope), (4, None, &None));

    let qwen2 = spec(&tiny("qwen2")).unwrap();
    assert!(qwen2.qkv_bias && !qwen2.out_bias && !qwen2.qk_norm);
    let qwen3 = spec(&tiny("qwen3")).unwrap();
    assert!(!qwen3.qkv_bias && qwen3.qk_norm);
    assert_eq!(qwen3.head_dim, 128);
}

#[test]
fn tensors_are_named_once_and_cover_every_linear() {
    for arch in ARCHES.iter().flat_map(|a| a.model_types()) {
        for tied in [false, true] {
            let spec =
                spec(&with(arch, json!({ "tie_word_embeddings": tied, "attention_bias": true, "mlp_bias": true })))
                    .unwrap();
            let slots = spec.tensors();
            let names: BTreeSet<_> = slots.iter().map(|s| s.name.as_str()).collect();
            assert_eq!(names.len(), slots.len(), "{arch}");
            assert_eq!(names.contains(EMBEDDING), *arch != "bert");
            assert_eq!(slots.iter().any(|s| s.name == "lm_head.weight" && s.optional), tied && *arch != "bert");
            for block in 0..spec.layers {
                for (role, module) in spec.block_linears(block) {
                    let slot = slots.iter().find(|s| s.name == format!("{module}.weight")).unwrap();
                    assert_eq!(slot.shape, spec.linear_shape(role));
                    assert_eq!(
                        names.contains(format!("{module}.bias").as_str()),
                        spec.has_bias(role),
                        "{arch} {module}"
                    );
                }
            }
        }
    }
}

#[test]
fn the_spelling_is_the_one_whose_tensors_are_stored() {
    for (stored, expected) in [
        (["embeddings.word_embeddings.weight", "encoder.layer.0.attention.output.LayerNorm.weight"], ""),
        (["bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.attention.output.LayerNorm.gamma"], "bert."),
        (["somewhere.else", "and.another"], ""),
    ] {
        let bert = spec(&tiny("bert")).unwrap().spelled_as(|name| stored.contains(&name));
        assert_eq!(bert.module(1, Role::Up), format!("{expected}encoder.layer.1.intermediate.dense"));
        let gamma = stored[1].ends_with("gamma");
        assert_eq!(bert.tensors().iter().any(|slot| slot.name.ends_with("LayerNorm.beta")), gamma);
    }
    let llama = spec(&tiny("llama")).unwrap();
    assert_eq!(llama.clone().spelled_as(|_| false), llama);
}
