"""Cases of golden_logits.py. Mixtures of experts, and models with a tower for images."""

from architectures import GEMMA3, LLAMA4, MIXTRAL, QWEN2_MOE, QWEN3_MOE

# name: (config, keys of the plainer config, sequence length)
CASES = {
    # Experts, of which one is chosen by no token; each a matrix of its own, or stacked.
    "mixtral": (MIXTRAL | {"rope_theta": 1000.0, "sliding_window": 9}, [{"num_experts_per_tok": 1}, {"sliding_window": None}], 40),
    "mixtral-stacked": (MIXTRAL | {"num_hidden_layers": 1}, {"num_experts_per_tok": 3}, 24),
    "qwen2-moe": (
        QWEN2_MOE | {"num_hidden_layers": 3, "mlp_only_layers": [1]},
        [{"norm_topk_prob": True}, {"num_experts_per_tok": 3}],
        40,
    ),
    "qwen2-moe-windows": (
        QWEN2_MOE
        | {
            "decoder_sparse_step": 2,
            "norm_topk_prob": True,
            "qkv_bias": False,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 1,
        },
        [{"norm_topk_prob": False}, {"use_sliding_window": False}],
        24,
    ),
    "qwen3-moe": (
        QWEN3_MOE | {"head_dim": 16, "decoder_sparse_step": 2},
        [{"norm_topk_prob": False}, {"num_experts_per_tok": 1}],
        40,
    ),
    "qwen3-moe-stacked": (
        QWEN3_MOE | {"num_hidden_layers": 1, "norm_topk_prob": False, "attention_bias": True, "tie_word_embeddings": True},
        {"norm_topk_prob": True},
        24,
    ),
    # A block that rotates, and sees chunks, then one of the other kind with experts, and one more of the first; then as listed.
    "llama4": (
        LLAMA4
        | {
            "num_hidden_layers": 3,
            "no_rope_layers": [],
            "no_rope_layer_interval": 2,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 7,
            "attn_temperature_tuning": True,
            "floor_scale": 8,
            "attn_scale": 0.5,
            "rope_theta": 1000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
        [
            {"attention_chunk_size": 9},
            {"floor_scale": 16},
            {"attn_scale": 0.1},
            {"use_qk_norm": False},
            {"num_experts_per_tok": 2},
            {"no_rope_layer_interval": 3},
            {"rope_scaling": None},
        ],
        40,
    ),
    "llama4-listed": (
        LLAMA4
        | {
            "num_experts_per_tok": 2,
            "no_rope_layers": [0, 1],
            "moe_layers": [0, 1],
            "layer_types": ["chunked_attention", "full_attention"],
            "attention_chunk_size": 5,
            "attn_temperature_tuning": False,
            "floor_scale": 4,
            "use_qk_norm": False,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
        },
        [
            {"no_rope_layers": [1, 1]},
            {"attn_temperature_tuning": True},
            {"layer_types": ["full_attention", "full_attention"]},
            {"num_experts_per_tok": 1},
        ],
        24,
    ),
    # With a tower for another kind of input, which is carried along.
    "llama4-vision": (
        {
            "model_type": "llama4",
            "architectures": ["Llama4ForConditionalGeneration"],
            "text_config": LLAMA4 | {"num_hidden_layers": 2, "no_rope_layers": [1, 0], "rope_theta": 1000.0, "floor_scale": 8},
            "vision_config": {
                "model_type": "llama4_vision_model",
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 64,
                "vision_output_dim": 16,
                "image_size": 8,
                "patch_size": 4,
                "projector_input_dim": 16,
                "projector_output_dim": 16,
            },
            "image_token_index": 40,
            "boi_token_index": 41,
            "eoi_token_index": 42,
            "tie_word_embeddings": False,
        },
        {"text_config": LLAMA4 | {"num_hidden_layers": 2, "no_rope_layers": [1, 0], "rope_theta": 1000.0}},
        24,
    ),
    "gemma3-vision": (
        {
            "model_type": "gemma3",
            "architectures": ["Gemma3ForConditionalGeneration"],
            "text_config": GEMMA3 | {"sliding_window": 7, "sliding_window_pattern": 2},
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 4,
                "vision_use_head": False,
            },
            "mm_tokens_per_image": 4,
            "image_token_index": 40,
            "boi_token_index": 41,
            "eoi_token_index": 42,
            "tie_word_embeddings": True,
        },
        {"text_config": GEMMA3 | {"sliding_window": 20, "sliding_window_pattern": 2}},
        24,
    ),
}

# Beginnings of names that checkpoints on the hub write otherwise than this version of transformers.
RENAMED = {
    "gpt-neox": {"lm_head.weight": "embed_out.weight"},
    "gemma3-vision": {"model.language_model.": "language_model.model.", "model.": ""},
}
