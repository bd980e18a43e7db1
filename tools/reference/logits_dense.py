"""Cases of golden_logits.py. Other decoders without experts."""

from architectures import GEMMA1, GEMMA2, GEMMA3, GPT2, GRANITE, NEOX, OLMO2, OPT, PHI3, SMOLLM3

# name: (config, keys of the plainer config, sequence length)
CASES = {
    "gemma": (
        GEMMA1 | {"hidden_act": "gelu", "rope_theta": 1000.0, "attention_bias": True},
        [{"hidden_act": "relu"}, {"rope_theta": 10000.0}],
        40,
    ),
    "gemma2": (
        GEMMA2
        | {
            "rope_theta": 1000.0,
            "sliding_window": 6,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 3.0,
        },
        [
            {"sliding_window": 20},
            {"query_pre_attn_scalar": 16},
            {"attn_logit_softcapping": None},
            {"final_logit_softcapping": None},
            {"hidden_activation": "silu"},
        ],
        40,
    ),
    "gemma3": (
        GEMMA3
        | {
            "rope_theta": 1000.0,
            "rope_local_base_freq": 100.0,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            "sliding_window": 7,
            "sliding_window_pattern": 2,
            "query_pre_attn_scalar": 24,
        },
        [
            {"rope_local_base_freq": 1000.0},
            {"rope_scaling": None},
            {"sliding_window": 20},
            {"query_pre_attn_scalar": 16},
        ],
        40,
    ),
    "gemma3-parameters": (
        GEMMA3
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window": 9,
            "final_logit_softcapping": 3.0,
            "attention_bias": True,
        },
        [{"layer_types": ["sliding_attention", "full_attention"]}, {"final_logit_softcapping": None}],
        40,
    ),
    "phi3": (
        PHI3 | {"partial_rotary_factor": 0.75, "rope_theta": 1000.0, "sliding_window": 7},
        [{"partial_rotary_factor": 0.5}, {"sliding_window": None}, {"rope_theta": 10000.0}],
        40,
    ),
    "phi3-longrope": (
        PHI3
        | {
            "num_hidden_layers": 1,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "original_max_position_embeddings": 16,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [1.2, 3.0]},
        },
        [{"rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [1.0, 3.0]}}, {"rope_scaling": None}],
        24,
    ),
    "olmo2": (
        OLMO2 | {"rope_theta": 1000.0},
        [{"rms_norm_eps": 1e-1}, {"rope_theta": 10000.0}],
        40,
    ),
    "granite": (
        GRANITE
        | {
            "rope_theta": 1000.0,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.3,
            "logits_scaling": 4.0,
        },
        [
            {"embedding_multiplier": 1.0},
            {"attention_multiplier": 0.35},
            {"residual_multiplier": 1.0},
            {"logits_scaling": 1.0},
        ],
        24,
    ),
    "smollm3": (
        SMOLLM3
        | {
            "tie_word_embeddings": True,
            "rope_theta": 1000.0,
            "no_rope_layer_interval": 2,
            "use_sliding_window": True,
            "sliding_window": 7,
        },
        [{"no_rope_layer_interval": 4}, {"use_sliding_window": False}],
        40,
    ),
    "smollm3-listed": (
        SMOLLM3 | {"num_hidden_layers": 2, "rope_theta": 1000.0, "no_rope_layers": [0, 1], "attention_bias": True},
        {"no_rope_layers": [1, 1]},
        24,
    ),
    "gpt-neox": (
        NEOX | {"use_parallel_residual": True, "rotary_pct": 0.25, "rotary_emb_base": 100},
        [{"use_parallel_residual": False}, {"rotary_pct": 0.5}, {"rotary_emb_base": 10000}],
        40,
    ),
    "gpt-neox-sequential": (
        NEOX
        | {
            "use_parallel_residual": False,
            "num_hidden_layers": 1,
            "attention_bias": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 1.0},
        },
        [{"use_parallel_residual": True}, {"hidden_act": "relu"}],
        24,
    ),
    "gpt2": (GPT2, [{"activation_function": "relu"}, {"scale_attn_weights": False}], 40),
    "opt": (OPT, [{"activation_function": "gelu"}], 40),
}
