"""Golden logits of tiny random checkpoints (of encoders: hidden states), of models/books-10m, and the rounding of
activations.

Writes crates/models/tests/golden/<case>/{config.json,model.safetensors,golden.safetensors}: the tests of bitmill-models
load the first two with our own code and compare with the output in the third, which transformers computed in f32 with
eager attention. Every case is seeded, so running this again with the same versions writes the same bytes. A case that
tests features (a window, a rope type) names plainer configs, in a list where there are several, under each of which the
same weights must give clearly different logits; otherwise the golden file would prove nothing.

Needs torch, transformers and compressed-tensors from PyPI. Run from the root of the repository:
    python tools/reference/golden_logits.py [CASE...]
"""

import json
import math
import shutil
import sys
from pathlib import Path

import compressed_tensors
import torch
import transformers
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, ViTConfig, ViTForImageClassification

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "crates/models/tests/golden"
VERSIONS = {
    "torch": torch.__version__,
    "transformers": transformers.__version__,
    "compressed-tensors": compressed_tensors.__version__,
}

BASE = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **BASE}
MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], **BASE}
QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **BASE}
QWEN3 = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], **BASE}
MIXTRAL = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    **BASE,
    "intermediate_size": 16,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
}
QWEN2_MOE = {
    "model_type": "qwen2_moe",
    "architectures": ["Qwen2MoeForCausalLM"],
    **BASE,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "norm_topk_prob": False,
}
QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    **BASE,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
}
BERT = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 48,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "pad_token_id": 0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [1.0, 2.0, 4.0, 6.5],
    "factor": 4.0,
    "original_max_position_embeddings": 24,
}

SMALL = BASE | {"vocab_size": 48}
GEMMA = SMALL | {"head_dim": 16, "tie_word_embeddings": True, "bos_token_id": 2}
GEMMA1 = {"model_type": "gemma", "architectures": ["GemmaForCausalLM"], **GEMMA}
GEMMA2 = {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], **GEMMA}
GEMMA3 = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], **GEMMA}
for gemma in (GEMMA2, GEMMA3):
    del gemma["hidden_act"]
LLAMA4 = {
    "model_type": "llama4_text",
    "architectures": ["Llama4ForCausalLM"],
    **SMALL,
    "head_dim": 8,
    "intermediate_size": 16,
    "intermediate_size_mlp": 40,
    "num_local_experts": 6,
    "num_experts_per_tok": 1,
}
PHI3 = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], **SMALL, "pad_token_id": 0}
OLMO2 = {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"], **SMALL}
GRANITE = {"model_type": "granite", "architectures": ["GraniteForCausalLM"], **SMALL}
SMOLLM3 = {"model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"], **SMALL, "pad_token_id": 0}
NEOX = {
    "model_type": "gpt_neox",
    "architectures": ["GPTNeoXForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 48,
    "max_position_embeddings": 128,
    "layer_norm_eps": 1e-5,
    "hidden_act": "gelu",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GPT2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "n_embd": 32,
    "n_inner": 40,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 48,
    "vocab_size": 48,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
OPT = {
    "model_type": "opt",
    "architectures": ["OPTForCausalLM"],
    "hidden_size": 32,
    "ffn_dim": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 48,
    "max_position_embeddings": 40,
    "word_embed_proj_dim": 32,
    "activation_function": "relu",
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
MODERNBERT = {
    "model_type": "modernbert",
    "architectures": ["ModernBertModel"],
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "norm_eps": 1e-5,
    "hidden_activation": "gelu",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "cls_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 2,
}
ROBERTA = BERT | {"model_type": "roberta", "architectures": ["RobertaModel"], "pad_token_id": 1, "type_vocab_size": 1}

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

# Encoders: as above, the output being hidden states; besides, a function from our names to those the checkpoint stores.
ENCODERS = {
    "bert": (BERT, {"hidden_act": "relu"}, 40, lambda name: name),
    # Three channels a head, a wide epsilon, the names of a checkpoint that came from TensorFlow with a task's head.
    "bert-old-names": (
        BERT | {"hidden_size": 36, "num_attention_heads": 12, "num_hidden_layers": 1, "layer_norm_eps": 1e-2},
        {"layer_norm_eps": 1e-12},
        48,
        lambda name: "bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"),
    ),
    # Padding stands among the random tokens.
    "roberta": (ROBERTA, {"pad_token_id": 2}, 40, lambda name: name),
    "xlm-roberta": (
        ROBERTA
        | {"model_type": "xlm-roberta", "architectures": ["XLMRobertaModel"], "num_hidden_layers": 1, "pad_token_id": 3},
        {"layer_norm_eps": 1e-2},
        24,
        lambda name: "roberta." + name,
    ),
    # As published, and with the names of a model that has a task's head; then as newer releases write it, with every bias.
    "modernbert": (
        MODERNBERT
        | {
            "global_attn_every_n_layers": 3,
            "local_attention": 8,
            "global_rope_theta": 1000.0,
            "local_rope_theta": 50.0,
        },
        [
            {"global_attn_every_n_layers": 2},
            {"local_attention": 12},
            {"global_rope_theta": 10000.0},
            {"local_rope_theta": 10000.0},
            {"norm_eps": 1e-1},
        ],
        40,
        lambda name: "model." + name,
    ),
    "modernbert-biases": (
        MODERNBERT
        | {
            "num_hidden_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
            "local_attention": 7,
            "hidden_activation": "silu",
            "attention_bias": True,
            "mlp_bias": True,
            "norm_bias": True,
        },
        [{"layer_types": ["full_attention", "sliding_attention"]}, {"local_attention": 40}, {"hidden_activation": "gelu"}],
        24,
        lambda name: name,
    ),
}


def randomise(model, seed):
    """Weights wide enough that attention is far from uniform, norms and biases away from their defaults."""
    centre = 0.0 if model.config.model_type.startswith("gemma") else 1.0
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if ("norm" in name.lower() or "ln_" in name) and not name.endswith("bias"):
            value = centre + 0.3 * noise
        elif name.endswith("bias"):
            value = 0.3 * noise
        else:
            value = 0.25 * noise
        parameter.data.copy_(value)


def starve(model):
    """Has no token choose expert 2: whatever the token, two of the others score higher."""
    for name, parameter in model.named_parameters():
        if name.endswith(("mlp.gate.weight", "feed_forward.router.weight")):
            for expert, factor in ((0, 3.0), (1, 2.0), (3, -3.0), (4, -2.0)):
                parameter.data[expert] = factor * parameter.data[2]


def by_expert(state, mixtral):
    """The names and shapes of the hub for what is stacked in memory."""
    parts = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    split = {}
    for name, value in state.items():
        if mixtral:
            name = name.replace(".mlp.", ".block_sparse_moe.")
        stack, _, kind = name.rpartition(".")
        if kind == "gate_up_proj":
            for expert, both in enumerate(value):
                gate, up = both.chunk(2)
                split[f"{stack}.{expert}.{parts[0]}.weight"] = gate.contiguous()
                split[f"{stack}.{expert}.{parts[1]}.weight"] = up.contiguous()
        elif kind == "down_proj":
            split |= {f"{stack}.{expert}.{parts[2]}.weight": down.contiguous() for expert, down in enumerate(value)}
        else:
            split[name] = value
    return split


def renamed(case, name):
    for ours, theirs in RENAMED.get(case, {}).items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def kind_of(config):
    return AutoModelForImageTextToText if "text_config" in config else AutoModelForCausalLM


def logits_of(folder, ids):
    model, report = kind_of(json.loads((folder / "config.json").read_text())).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"], report
    with torch.no_grad():
        return model.eval()(ids[None], use_cache=False).logits[0].float()


def hidden_states_of(folder, ids):
    model, report = AutoModel.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    with torch.no_grad():
        return model.eval()(ids[None]).last_hidden_state[0].float()


def write_config(folder, config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_case(seed, name, config, plainer, length):
    folder = GOLDEN / name
    write_config(folder, config)
    model = kind_of(config).from_config(AutoConfig.from_pretrained(folder))
    randomise(model, seed)
    starve(model)
    state = {k: v.detach().float().contiguous() for k, v in model.state_dict().items()}
    # Llama 4 is published with its experts stacked.
    if not name.endswith("-stacked") and not name.startswith("llama4"):
        state = by_expert(state, config["model_type"] == "mixtral")
    if config["tie_word_embeddings"]:
        del state["lm_head.weight"]
    state = {renamed(name, k): v for k, v in state.items()}
    write_golden(seed, folder, config, plainer, length, state, "logits", logits_of)


def write_encoder(seed, name, config, plainer, length, stored):
    folder = GOLDEN / name
    write_config(folder, config)
    model = AutoModel.from_config(AutoConfig.from_pretrained(folder))
    randomise(model, seed)
    state = {stored(k): v.detach().float().contiguous() for k, v in model.state_dict().items()}
    write_golden(seed, folder, config, plainer, length, state, "hidden_states", hidden_states_of)


def write_golden(seed, folder, config, plainer, length, state, kind, output_of):
    """Stores the weights and the output on random tokens, which must not be that of a plainer config."""
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    vocab = config.get("text_config", config)["vocab_size"]
    # Beyond the last are the tokens that stand for an image.
    ids = torch.randint(0, config.get("image_token_index", vocab), (length,), generator=torch.Generator().manual_seed(1000 + seed))
    output = output_of(folder, ids)

    plain, differences = folder / "plainer", []
    for keys in plainer if isinstance(plainer, list) else [plainer]:
        write_config(plain, config | keys)
        shutil.copy(folder / "model.safetensors", plain / "model.safetensors")
        difference = (output - output_of(plain, ids)).abs().max().item()
        shutil.rmtree(plain)
        assert difference > 1e-3, f"{folder.name}: {keys} gives the same {kind} ({difference})"
        differences.append(f"{difference:.3f}")
    save_file(
        {"input_ids": ids, kind: output.contiguous()},
        folder / "golden.safetensors",
        metadata=VERSIONS | {"source": "tools/reference/golden_logits.py"},
    )
    print(f"{folder.name:28} |{kind}| {output.abs().max():7.3f}  plainer configs differ by {', '.join(differences)}")


def write_vit():
    """An image classifier as the library stores it: what reads no tokens is rounded by names and shapes."""
    folder = ROOT / "crates/quantize/tests/golden/vit"
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
        num_labels=5,
    )
    model = ViTForImageClassification(config)
    randomise(model, 300)
    model.save_pretrained(folder)
    print(f"{'vit':28} {sum(p.numel() for p in model.parameters())} parameters")


def write_books():
    source = ROOT / "models/books-10m"
    text = (source / "evaluation.txt").read_text()[:1000]
    ids = [1] + AutoTokenizer.from_pretrained(source)(text, add_special_tokens=False)["input_ids"]
    ids = torch.tensor(ids[:64])
    positions = torch.tensor([0, 1, 31, 63])
    logits = logits_of(source, ids)
    folder = GOLDEN / "books-10m"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {"input_ids": ids, "positions": positions, "logits": logits[positions].contiguous()},
        folder / "golden.safetensors",
        metadata=VERSIONS | {"source": "tools/reference/golden_logits.py"},
    )
    loss = torch.nn.functional.cross_entropy(logits[:-1], ids[1:]).item()
    print(f"{'books-10m':28} |logit| {logits.abs().max():7.3f}  perplexity of the 64 tokens {math.exp(loss):.1f}")


def write_int8():
    """Dynamic per-token symmetric int8, with an all-zero token and exact ties."""
    x = torch.randn((7, 24), generator=torch.Generator().manual_seed(7)) * 3
    x[2] = 0.0
    x[3] = torch.arange(24) * 0.5 - 3.0
    x[3, 0] = -127.5
    x[4] *= 1e-6
    x[5, 3] = 1e4
    args = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)
    batch = x[None]
    scale, zero = compute_dynamic_scales_and_zp(batch, args, torch.nn.Module())
    output = fake_quantize(batch, scale, zero, args)[0]
    folder = GOLDEN / "int8-activations"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {"input": x, "output": output.contiguous()},
        folder / "golden.safetensors",
        metadata=VERSIONS | {"source": "tools/reference/golden_logits.py"},
    )
    print(f"{'int8-activations':28} changed by at most {(x - output).abs().max():.3f}")


FLOATS = {
    "fp8": {"num_bits": 8, "strategy": "token", "dynamic": True},
    "fp8-groups": {"num_bits": 8, "strategy": "group", "group_size": 128, "dynamic": True},
    "fp8-static": {"num_bits": 8, "strategy": "tensor"},
    "nvfp4": {"num_bits": 4, "strategy": "tensor_group", "group_size": 16, "dynamic": "local", "scale_dtype": "torch.float8_e4m3fn"},
    "mxfp4": {"num_bits": 4, "strategy": "group", "group_size": 32, "dynamic": True, "scale_dtype": "torch.uint8"},
    "mxfp8": {"num_bits": 8, "strategy": "group", "group_size": 32, "dynamic": True, "scale_dtype": "torch.uint8"},
}
"""How activations are rounded to floats."""
STATIC_SCALE = 0.03125
"""What calibration would say of the input of `fp8-static`, a part of which it clamps."""
DIVISOR = 128.0
"""The same of `nvfp4`."""


def write_floats():
    """Every rounding to floats, with zeros, ties, numbers so small that scales round to zero, and outliers."""
    x = torch.randn((7, 256), generator=torch.Generator().manual_seed(8)) * 3
    x[2] = 0.0
    x[3] = torch.arange(256) * 0.25 - 32.0
    x[4, :32] *= 1e-6
    x[5, 3] = 1e3
    outputs = {}
    for name, fields in FLOATS.items():
        args = QuantizationArgs(type="float", symmetric=True, **fields)
        whole = torch.tensor([DIVISOR]) if name == "nvfp4" else None
        scale, zero = torch.tensor([STATIC_SCALE]), None
        if args.dynamic:
            scale, zero = compute_dynamic_scales_and_zp(x[None], args, torch.nn.Module(), global_scale=whole)
        outputs[name] = fake_quantize(x[None], scale, zero, args, global_scale=whole)[0].contiguous()
    folder = GOLDEN / "float-activations"
    folder.mkdir(parents=True, exist_ok=True)
    source = {"source": "tools/reference/golden_logits.py", "scale": str(STATIC_SCALE), "divisor": str(DIVISOR)}
    save_file({"input": x, **outputs}, folder / "golden.safetensors", metadata=VERSIONS | source)
    changes = ", ".join(f"{name} {(x - output).abs().max():.3f}" for name, output in outputs.items())
    print(f"{'float-activations':28} changed by at most {changes}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    wanted = sys.argv[1:]
    unknown = set(wanted) - CASES.keys() - ENCODERS.keys()
    assert not unknown, f"no such cases: {unknown}"
    for index, (name, (config, plainer, length)) in enumerate(CASES.items()):
        if not wanted or name in wanted:
            write_case(index, name, config, plainer, length)
    for index, (name, (config, plainer, length, stored)) in enumerate(ENCODERS.items()):
        if not wanted or name in wanted:
            write_encoder(100 + index, name, config, plainer, length, stored)
    if not wanted:
        write_books()
        write_int8()
        write_vit()
        write_floats()
    assert load_file(GOLDEN / "llama-gqa/golden.safetensors")["logits"].shape == (40, 64)
