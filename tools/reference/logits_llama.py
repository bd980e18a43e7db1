"""Cases of golden_logits.py. Llama, Mistral and Qwen: one block, and what the families vary in it."""

from architectures import LLAMA, LONGROPE, MISTRAL, QWEN2, QWEN3

# name: (config, keys of the plainer config, sequence length)
CASES = {
    "llama-gqa": (LLAMA | {"rope_theta": 500.0}, {"rope_theta": 10000.0}, 40),
    "llama-biases-tied": (
        LLAMA
        | {
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "hidden_act": "gelu",
            "num_key_value_heads": 4,
            "rope_theta": 10000.0,
            "rope_scaling": None,
        },
        {"hidden_act": "gelu_pytorch_tanh"},
        24,
    ),
    "llama-head-dim": (
        LLAMA | {"head_dim": 12, "num_key_value_heads": 1, "hidden_act": "gelu_pytorch_tanh", "rope_theta": 10000.0},
        {"hidden_act": "silu"},
        24,
    ),
    "llama-rope-linear": (
        LLAMA | {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.5}},
        {"rope_scaling": None},
        40,
    ),
    "llama-rope-dynamic": (
        LLAMA
        | {
            "max_position_embeddings": 16,
            "rope_theta": 10000.0,
            "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
        },
        {"rope_scaling": None},
        48,
    ),
    "llama-rope-llama3": (
        LLAMA
        | {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 100.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
        48,
    ),
    "llama-rope-yarn": (
        LLAMA
        | {
            "rope_theta": 1000.0,
            "rope_scaling": {
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 4.0,
                "beta_slow": 0.5,
            },
        },
        {"rope_scaling": None},
        48,
    ),
    "llama-rope-yarn-mscale": (
        LLAMA
        | {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 4.0,
                "beta_slow": 0.5,
                "mscale": 1.5,
                "mscale_all_dim": 0.5,
                "truncate": False,
            }
        },
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 4.0,
                "beta_slow": 0.5,
            }
        },
        48,
    ),
    "llama-rope-longrope-long": (
        LLAMA | {"max_position_embeddings": 96, "rope_parameters": LONGROPE},
        {"rope_parameters": LONGROPE | {"long_factor": [1.0, 1.1, 1.3, 1.7]}},
        40,
    ),
    "llama-rope-longrope-short": (
        LLAMA | {"num_hidden_layers": 1, "max_position_embeddings": 96, "rope_parameters": LONGROPE},
        {"rope_parameters": LONGROPE | {"short_factor": [1.0, 1.0, 1.0, 1.0]}},
        24,
    ),
    "mistral-window": (
        MISTRAL | {"head_dim": 16, "sliding_window": 5, "rope_theta": 10000.0},
        {"sliding_window": None},
        160,
    ),
    "qwen2-window-layers": (
        QWEN2
        | {
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 1,
            "rope_theta": 1000.0,
        },
        {"max_window_layers": 2},
        40,
    ),
    "qwen3-tied": (
        QWEN3 | {"head_dim": 16, "tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1000.0}},
        {"rope_parameters": {"rope_theta": 10000.0}},
        40,
    ),
    "qwen3-layer-types": (
        QWEN3
        | {
            "head_dim": 8,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_theta": 1000.0,
        },
        {"layer_types": ["full_attention", "full_attention"]},
        40,
    ),
}
