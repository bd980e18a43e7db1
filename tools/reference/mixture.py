"""Writes a mixture of experts made of a dense Llama: every MLP becomes several, each the original with noise of its own.

    python tools/reference/mixture.py --like models/books-10m --experts 8 --chosen 2 -o out/books-mixture

The router is random. Experts are stored one by one, under the names Mixtral has on the hub.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

PARTS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
"""Mixtral's names of what Llama's MLP has."""


def write(like: Path, out: Path, experts: int, chosen: int, noise: float) -> None:
    """The folder; `noise` is relative to the deviation of each matrix, and 0 keeps what the model computes."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    config = json.loads((like / "config.json").read_text())
    config |= {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
    config |= {"num_local_experts": experts, "num_experts_per_tok": chosen}
    (out / "config.json").write_text(json.dumps(config, indent=2))
    for file in like.glob("tokenizer*"):
        shutil.copy(file, out / file.name)
    random = torch.Generator().manual_seed(1)

    def noisy(value: torch.Tensor) -> torch.Tensor:
        added = torch.randn(value.shape, generator=random) * noise * value.float().std()
        return (value.float() + added).to(value.dtype)

    tensors = {}
    for name, value in load_file(like / "model.safetensors").items():
        block, mlp, part = name.partition(".mlp.")
        if not mlp:
            tensors[name] = value
            continue
        part = PARTS[part.removesuffix(".weight")]
        for expert in range(experts):
            tensors[f"{block}.block_sparse_moe.experts.{expert}.{part}.weight"] = noisy(value)
        router = torch.randn(experts, config["hidden_size"], generator=random) * 0.3
        tensors[f"{block}.block_sparse_moe.gate.weight"] = router.to(value.dtype)
    save_file(tensors, out / "model.safetensors")


def main() -> None:
    """Writes the folder that the arguments describe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--like", type=Path, required=True, help="dense Llama folder")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--chosen", type=int, default=2)
    parser.add_argument("--noise", type=float, default=0.3)
    arguments = parser.parse_args()
    write(arguments.like, arguments.output, arguments.experts, arguments.chosen, arguments.noise)


if __name__ == "__main__":
    main()
