"""Cases of golden_logits.py. Encoders."""

from architectures import BERT, MODERNBERT, ROBERTA, VIT

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

# Encoders of images: their configs, plainer ones, and whether a classifier stands behind them, which has no pooler and puts `vit.`
# before the names.
IMAGES = {
    "vit": (
        VIT | {"architectures": ["ViTForImageClassification"], "id2label": {str(i): str(i) for i in range(5)}},
        [{"hidden_act": "relu"}, {"layer_norm_eps": 1e-1}, {"num_attention_heads": 2}],
        True,
    ),
    # Neither images nor patches are square, and a part of the image belongs to no patch.
    "vit-bare": (
        VIT
        | {
            "architectures": ["ViTModel"],
            "num_hidden_layers": 1,
            "image_size": [14, 20],
            "patch_size": [4, 5],
            "num_channels": 2,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-2,
            "qkv_bias": False,
        },
        [{"layer_norm_eps": 1e-12}, {"hidden_act": "relu"}],
        False,
    ),
}
