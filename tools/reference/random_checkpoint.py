"""Writes a Llama checkpoint of random weights in any shape, for timing and for tests of shapes.

    python tools/reference/random_checkpoint.py --like models/books-10m --hidden 2048 --inner 8192 --layers 4 --heads 32 --kv-heads 8 \\
        -o out/random-1b

writes four blocks in the layer shapes of a 1B model, with the tokenizer of `--like`.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file


def write(like: Path, out: Path, changes: dict, dtype: torch.dtype = torch.bfloat16) -> None:
    """A folder with the configuration of `like` and `changes` to it, its tokenizer, and weights of deviation 0.02."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    config = json.loads((like / "config.json").read_text()) | changes
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    config["head_dim"] = hidden // config["num_attention_heads"]
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    keys = config["num_key_value_heads"] * config["head_dim"]
    (out / "config.json").write_text(json.dumps(config, indent=2))
    for file in like.glob("tokenizer*"):
        shutil.copy(file, out / file.name)
    random = np.random.default_rng(1)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        # Sums of uniform numbers would have no tails, which is what block formats are about.
        return torch.from_numpy(random.standard_normal((rows, columns), np.float32) * 0.02).to(dtype)

    def norm() -> torch.Tensor:
        return torch.ones(hidden, dtype=dtype)

    tensors = {"model.embed_tokens.weight": matrix(config["vocab_size"], hidden), "model.norm.weight": norm()}
    if not config.get("tie_word_embeddings"):
        tensors["lm_head.weight"] = matrix(config["vocab_size"], hidden)
    shapes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        tensors |= {f"{at}{part}.weight": matrix(*shape) for part, shape in shapes.items()}
        tensors |= {f"{at}{part}.weight": norm() for part in ("input_layernorm", "post_attention_layernorm")}
    save_file(tensors, out / "model.safetensors")


def main() -> None:
    """Writes the folder that the arguments describe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--like", type=Path, required=True, help="Llama folder whose configuration and tokenizer are taken")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--tied", action="store_true")
    args = parser.parse_args()
    changes = {
        "hidden_size": args.hidden, "intermediate_size": args.inner, "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads, "num_key_value_heads": args.kv_heads, "tie_word_embeddings": args.tied,
    }  # fmt: skip
    write(args.like, args.output, changes)


if __name__ == "__main__":
    main()
