//! Configs that must be read, refused or survived, as tables.

use super::*;
use crate::{Images, QkNorm, Role, RopeKind, Tempering};
use serde_json::json;
use std::collections::BTreeSet;

fn tiny(model_type: &str) -> Value {
    json!({
        "model_type": model_type, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 128,
        "n_embd": 32, "n_inner": 40, "n_layer": 3, "n_head": 4, "n_positions": 128, "ffn_dim": 40,
    })
}

/// A tiny config with `changes`; where tokens are one kind of input of several, inside of the config of them all.
fn with(model_type: &str, changes: Value) -> Value {
    let text = merged(tiny(model_type), changes);
    match model_type {
        "llama4" | "gemma3" => {
            json!({ "model_type": model_type, "tie_word_embeddings": text["tie_word_embeddings"], "text_config": text })
        }
        _ => text,
    }
}

fn merged(mut config: Value, changes: Value) -> Value {
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
        (
            with("mixtral", json!({ "num_local_experts": 4, "num_experts_per_tok": 5 })),
            "num_experts_per_tok",
            "more than the 4",
        ),
        (with("mixtral", json!({ "num_local_experts": 0 })), "num_local_experts", "from 1 to 4096"),
        (with("qwen3_moe", json!({ "moe_intermediate_size": -8 })), "moe_intermediate_size", "-8"),
        (with("qwen2_moe", json!({ "mlp_only_layers": [3] })), "mlp_only_layers", "none of the 3 layers"),
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
        (with("gemma", json!({ "hidden_act": "gelu", "hidden_activation": "relu" })), "hidden_activation", "another"),
        (with("gemma2", json!({ "use_bidirectional_attention": true })), "use_bidirectional_attention", "unsupported"),
        (with("gemma2", json!({ "attn_logit_softcapping": 0 })), "attn_logit_softcapping", "not a positive"),
        (with("gemma3_text", json!({ "attn_logit_softcapping": 50 })), "attn_logit_softcapping", "ignores"),
        (
            with("gemma3_text", json!({ "rope_parameters": { "rope_theta": 1 } })),
            "rope_parameters.rope_theta",
            "neither",
        ),
        (
            with("gemma3_text", json!({ "rope_parameters": { "full_attention": { "rope_type": "mrope" } } })),
            "rope_parameters.full_attention.rope_type",
            "mrope",
        ),
        (
            with("gemma3_text", json!({ "rope_parameters": {}, "rope_scaling": { "type": "linear", "factor": 2 } })),
            "rope_scaling",
            "beside rope_parameters",
        ),
        (with("phi3", json!({ "attention_bias": true })), "attention_bias", "unsupported"),
        (with("phi3", json!({ "partial_rotary_factor": 0.4 })), "partial_rotary_factor", "no pairs"),
        (with("phi3", json!({ "partial_rotary_factor": 2 })), "partial_rotary_factor", "no pairs"),
        (with("phi3", json!({ "rope_scaling": { "type": "linear", "factor": 2 } })), "rope_scaling", "longrope"),
        (llama(json!({ "partial_rotary_factor": 0.5 })), "partial_rotary_factor", "unsupported"),
        (with("olmo2", json!({ "clip_qkv": 8 })), "clip_qkv", "unsupported"),
        (with("granite", json!({ "residual_multiplier": 0 })), "residual_multiplier", "not a positive"),
        (with("smollm3", json!({ "no_rope_layers": [1] })), "no_rope_layers", "1 entries for 3 layers"),
        (with("smollm3", json!({ "no_rope_layers": [1, 2, 1] })), "no_rope_layers", "neither 0 nor 1"),
        (with("llama4_text", json!({ "moe_layers": [3] })), "moe_layers", "none of the 3 layers"),
        (with("llama4_text", json!({ "no_rope_layers": [1] })), "no_rope_layers", "1 entries for 3 layers"),
        (with("llama4_text", json!({ "floor_scale": 0 })), "floor_scale", "not a positive"),
        (
            with("llama4_text", json!({ "attn_temperature_tuning": "yes" })),
            "attn_temperature_tuning",
            "not true or false",
        ),
        (
            with(
                "llama4_text",
                json!({ "attention_chunk_size": null, "layer_types": ["chunked_attention", "full_attention", "full_attention"] }),
            ),
            "layer_types",
            "deny",
        ),
        (with("llama4_text", json!({ "rope_scaling": { "type": "yarn", "factor": 4 } })), "rope_scaling", "norms away"),
        (with("llama4", json!({ "num_key_value_heads": 3 })), "text_config.num_key_value_heads", "does not divide"),
        (tiny("llama4"), "text_config", "missing"),
        (json!({ "model_type": "gemma3", "text_config": 3 }), "text_config", "not an object"),
        (with("gemma3", json!({ "attn_logit_softcapping": 50 })), "text_config.attn_logit_softcapping", "ignores"),
        (with("gpt_neox", json!({ "rotary_pct": 0.1 })), "rotary_pct", "no pairs"),
        (with("gpt2", json!({ "n_embd": 34 })), "n_head", "does not divide"),
        (
            with("gpt2", json!({ "scale_attn_by_inverse_layer_idx": true })),
            "scale_attn_by_inverse_layer_idx",
            "every layer",
        ),
        (with("gpt2", json!({ "activation_function": "mish" })), "activation_function", "understood are silu"),
        (with("opt", json!({ "do_layer_norm_before": false })), "do_layer_norm_before", "unsupported"),
        (with("opt", json!({ "word_embed_proj_dim": 16 })), "word_embed_proj_dim", "unsupported"),
        (with("roberta", json!({ "max_position_embeddings": 2 })), "max_position_embeddings", "not for tokens"),
        (with("modernbert", json!({ "head_dim": 4 })), "head_dim", "is not 8"),
        (with("modernbert", json!({ "hidden_size": 36 })), "num_attention_heads", "heads of 9"),
        (
            with("modernbert", json!({ "rope_parameters": {}, "rope_scaling": { "type": "linear", "factor": 2 } })),
            "rope_scaling",
            "beside rope_parameters",
        ),
        (with("modernbert", json!({ "global_attn_every_n_layers": 0 })), "global_attn_every_n_layers", "is 0"),
        (with("modernbert", json!({ "layer_types": ["full_attention"] })), "layer_types", "1 entries for 3 layers"),
        (with("bert", json!({ "hidden_size": 34 })), "num_attention_heads", "does not divide"),
        (with("vit", json!({ "hidden_size": 34 })), "num_attention_heads", "does not divide"),
        (with("vit", json!({ "image_size": [224, 224, 3] })), "image_size", "has 3 entries"),
        (with("vit", json!({ "image_size": [224, -1] })), "image_size", "-1"),
        (with("vit", json!({ "patch_size": "16" })), "patch_size", "\"16\""),
        (with("vit", json!({ "image_size": 12 })), "patch_size", "larger than the images of [12, 12]"),
        (with("vit", json!({ "num_channels": 0 })), "num_channels", "is 0"),
        (with("vit", json!({ "qkv_bias": 1 })), "qkv_bias", "not true or false"),
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
            "deny",
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

fn shared_keys(scaling: &Value) -> Value {
    json!({
        "head_dim": 8, "rms_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": false, "bos_token_id": 1,
        "rope_theta": 1e4, "rope_scaling": scaling, "rope_parameters": null, "sliding_window": 4, "use_sliding_window": true,
        "max_window_layers": 1, "layer_types": null, "attention_bias": false, "mlp_bias": false,
        "partial_rotary_factor": 1.0, "original_max_position_embeddings": null, "layer_norm_eps": 1e-12,
        "type_vocab_size": 2, "position_embedding_type": "absolute", "is_decoder": false,
    })
}

fn keys_of_single_architectures() -> Value {
    json!({
        "use_bidirectional_attention": false, "hidden_activation": "gelu_pytorch_tanh", "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 16, "final_logit_softcapping": 30.0, "rope_local_base_freq": 1e4,
        "embedding_multiplier": 2.0, "attention_multiplier": 0.5, "residual_multiplier": 0.5, "logits_scaling": 3,
        "no_rope_layers": [1, 0, 1], "no_rope_layer_interval": 2, "clip_qkv": null, "pad_token_id": 1,
        "rotary_pct": 1.0, "rotary_emb_base": 1e4, "use_parallel_residual": true, "activation_function": "gelu",
        "layer_norm_epsilon": 1e-5, "scale_attn_weights": false, "scale_attn_by_inverse_layer_idx": false,
        "word_embed_proj_dim": 32, "enable_bias": true, "do_layer_norm_before": true,
        "intermediate_size_mlp": 40, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_layers": [1], "interleave_moe_layer_step": 2,
        "attention_chunk_size": 8, "attn_temperature_tuning": 4, "floor_scale": 4, "attn_scale": 0.1, "use_qk_norm": true,
        "_remove_final_layer_norm": false, "layer_norm_elementwise_affine": true,
        "image_size": [32, 48], "patch_size": 16, "num_channels": 3, "qkv_bias": true,
    })
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
            for (rope, tokens) in spec.ropes.iter().flatten().flat_map(|rope| [(rope, 1), (rope, 5000)]) {
                assert!(rope.frequencies(tokens).iter().all(|f| f.is_finite()), "{config}");
            }
            assert_eq!(spec.windows.len(), spec.layers);
        }
    };
    for arch in ARCHES.iter().flat_map(|a| a.model_types()) {
        for scaling in &scalings {
            let full = merged(with(arch, shared_keys(scaling)), keys_of_single_architectures());
            let kind = scaling["rope_type"].as_str().unwrap();
            let long = ["yarn", "longrope"].contains(&kind);
            if (*arch == "phi3" && !long) || (arch.starts_with("llama4") && long) {
                assert!(spec(&full).is_err(), "{kind}");
                continue;
            }
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
    let error = spec(&tiny("mamba")).unwrap_err();
    assert!(matches!(&error, Error::UnknownArchitecture { model_type, .. } if model_type == "mamba"));
    assert!(error.to_string().contains("bert, gemma, gemma2, gemma3_text, gemma3, gpt2, gpt_neox, granite"), "{error}");
    assert!(matches!(spec(&json!({})), Err(Error::UnknownArchitecture { .. })));
}

#[test]
fn silence_means_the_reference_defaults() {
    let llama = spec(&tiny("llama")).unwrap();
    assert_eq!((llama.head_dim, llama.norm_eps, llama.bos, llama.act), (8, 1e-6, Some(1), Act::Silu));
    assert_eq!(llama.rope(), Some(&Rope { theta: 1e4, dim: 8, kind: RopeKind::Default }));
    assert!(!llama.tied && !llama.qkv_bias && !llama.out_bias && !llama.mlp_bias && llama.qk_norm.is_none());
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
    assert_eq!((bert.kv_heads, bert.head(), bert.rope()), (4, None, None));

    let vit = spec(&with("vit", json!({ "layer_norm_eps": null }))).unwrap();
    let images = Images { channels: 3, size: [224; 2], patch: [16; 2] };
    assert_eq!((vit.images, vit.max_positions, vit.norm_eps, vit.act), (Some(images), 197, 1e-12, Act::Gelu));
    assert!(vit.qkv_bias && vit.vocab == 0 && vit.head().is_none() && !vit.causal);

    let window = |model_type, changes| spec(&with(model_type, changes)).unwrap().windows;
    assert_eq!(window("gemma2", json!({})), [Some(4096), None, Some(4096)]);
    assert_eq!(window("gemma3_text", json!({ "sliding_window": 5 })), [Some(5); 3]);
    assert_eq!(window("gemma3_text", json!({ "sliding_window": 5, "sliding_window_pattern": 3 }))[2], None);
    let published = json!({ "model_type": "gemma3", "text_config": { "num_hidden_layers": 2, "hidden_size": 64 } });
    let nested = spec(&published).unwrap();
    assert_eq!((nested.hidden, nested.vocab, nested.heads, nested.kv_heads, nested.tied), (64, 262_208, 8, 4, true));
    let gemma = spec(&tiny("gemma2")).unwrap();
    assert!(gemma.tied && gemma.norm_offset == 1.0 && gemma.act == Act::GeluTanh && gemma.head_dim == 256);
    assert_eq!((gemma.factors.attention_cap, gemma.factors.logit_cap), (Some(50.0), Some(30.0)));
    assert_eq!(gemma.factors.attention, Some(1.0 / 16.0));
    let llama4 = spec(&tiny("llama4_text")).unwrap();
    assert_eq!((llama4.windows[0], llama4.intermediate, llama4.head_dim), (Some(8192), 16_384, 128));
    assert!(
        llama4
            .routing
            .as_ref()
            .is_some_and(|r| r.blocks == [true; 3] && (r.experts, r.chosen, r.shared) == (16, 1, 40))
    );
    assert_eq!((llama4.qk_norm, llama4.tempering), (Some(QkNorm::Bare), Some(Tempering { floor: 8192.0, scale: 0.1 })));
    let smollm3 = spec(&tiny("smollm3")).unwrap();
    assert_eq!(smollm3.rope(), spec(&with("llama", json!({ "rope_theta": 2e6 }))).unwrap().rope());
    let neox = spec(&tiny("gpt_neox")).unwrap();
    assert!(neox.parallel && !neox.tied && neox.qkv_bias && neox.rope().unwrap().dim == 2);
    let opt = spec(&tiny("opt")).unwrap();
    assert_eq!((opt.act, opt.position_offset, opt.tied), (Act::Relu, 2, true));
    let roberta = spec(&tiny("roberta")).unwrap();
    assert_eq!((roberta.position_offset, roberta.padding, roberta.max_positions), (2, Some(1), 126));

    let qwen2 = spec(&tiny("qwen2")).unwrap();
    assert!(qwen2.qkv_bias && !qwen2.out_bias && qwen2.qk_norm.is_none());
    let qwen3 = spec(&tiny("qwen3")).unwrap();
    assert!(!qwen3.qkv_bias && qwen3.qk_norm == Some(QkNorm::Head));
    assert_eq!(qwen3.head_dim, 128);
}

#[test]
fn tensors_are_named_once_and_cover_every_linear() {
    for arch in ARCHES.iter().flat_map(|a| a.model_types()) {
        for tied in [false, true] {
            let biases = *arch != "phi3";
            let keys = json!({ "tie_word_embeddings": tied, "attention_bias": biases, "mlp_bias": true });
            let spec = spec(&with(arch, keys)).unwrap();
            let slots = spec.tensors();
            let names: BTreeSet<_> = slots.iter().map(|s| s.name.as_str()).collect();
            assert_eq!(names.len(), slots.len(), "{arch}");
            assert!(names.contains(spec.embedding().as_str()));
            let head = spec.head().map(|head| format!("{head}.weight"));
            assert_eq!(slots.iter().any(|s| Some(&s.name) == head.as_ref() && s.optional), tied && head.is_some());
            for block in 0..spec.layers {
                for (role, module) in spec.block_linears(block) {
                    let slot = slots.iter().find(|s| s.name == format!("{module}.weight")).unwrap();
                    assert_eq!(slot.shape, spec.stored_shape(role));
                    let parts: Vec<Role> =
                        Role::ALL.into_iter().filter(|p| p.parts().len() == 1 && spec.rows(*p).0 == role).collect();
                    if role.parts().len() > 1 {
                        assert_eq!(parts, role.parts());
                    }
                    // Every row is of one part.
                    let mut rows: Vec<usize> = parts.iter().flat_map(|p| spec.rows(*p).1).flatten().collect();
                    rows.sort_unstable();
                    let all = if role.expert().is_some() { 0 } else { spec.linear_shape(role)[0] };
                    assert!(rows.into_iter().eq(0..all), "{arch} {role:?}");
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
    for prefix in ["", "vit."] {
        let stored = ["embeddings.patch_embeddings.projection", "encoder.layer.0.layernorm_before"];
        let stored = stored.map(|module| format!("{prefix}{module}.weight"));
        let vit = spec(&tiny("vit")).unwrap().spelled_as(|name| stored.iter().any(|s| s == name));
        assert_eq!(vit.module(2, Role::Q), format!("{prefix}encoder.layer.2.attention.attention.query"));
        // The norm at the end is the last block's.
        assert_eq!(vit.norm(2, crate::NormRole::MlpResidual), format!("{prefix}layernorm.weight"));
    }
    let gpt2 = spec(&tiny("gpt2")).unwrap();
    assert_eq!(gpt2.embedding(), "transformer.wte.weight");
    let first_release = ["wte.weight", "h.0.ln_1.weight"];
    assert_eq!(gpt2.spelled_as(|name| first_release.contains(&name)).module(2, Role::Up), "h.2.mlp.c_fc");
    let neox = spec(&tiny("gpt_neox")).unwrap();
    assert_eq!(neox.head().unwrap(), "embed_out");
    let now = ["gpt_neox.embed_in.weight", "gpt_neox.layers.0.input_layernorm.weight", "lm_head.weight"];
    assert_eq!(neox.spelled_as(|name| now.contains(&name)).head().unwrap(), "lm_head");
    let gemma3 = spec(&with("gemma3", json!({ "tie_word_embeddings": true }))).unwrap();
    for (part, head) in [("language_model.model", "language_model.lm_head"), ("model.language_model", "lm_head")] {
        let stored = ["embed_tokens", "layers.0.input_layernorm"].map(|module| format!("{part}.{module}.weight"));
        let own = gemma3.clone().spelled_as(|name| stored.iter().any(|s| s == name));
        assert_eq!(
            (own.module(1, Role::Up), own.head().unwrap()),
            (format!("{part}.layers.1.mlp.up_proj"), head.into())
        );
        assert_eq!(own.final_norm().unwrap(), format!("{part}.norm.weight"));
    }
    let llama = spec(&tiny("llama")).unwrap();
    assert_eq!(llama.clone().spelled_as(|_| false), llama);
}
