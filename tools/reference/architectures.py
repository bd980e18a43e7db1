"""The smallest config of each architecture, of which the golden cases are variations."""

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

VIT = {
    "model_type": "vit",
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
    "num_channels": 3,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "qkv_bias": True,
}
