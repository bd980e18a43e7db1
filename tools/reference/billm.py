"""Writes the golden file of BiLLM: a small matrix and H, and what the original program makes of them under both of its
metrics of salient columns. The original (github.com/Aaronhuang-778/BiLLM) is imported from a checkout, nothing is copied.

    python tools/reference/billm.py CHECKOUT [FILE, by default crates/quantize/tests/golden/billm.safetensors]
"""

import json
import subprocess
import sys
import types
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file

ROWS, INPUTS, GROUP = 24, 256, 128
METRICS = ("hessian", "magnitude")


def original(checkout):
    """The module with the loop. What it imports besides and never uses need not be installed."""
    for name, unused in {"exceptiongroup": "catch", "pyparsing": "line"}.items():
        if name not in sys.modules:
            module = types.ModuleType(name)
            setattr(module, unused, None)
            sys.modules[name] = module
    sys.path.insert(0, str(checkout))
    import bigptq

    return bigptq


def problem():
    """Weights and H, each a half-precision number: correlated inputs of unequal size, and some columns that stand out."""
    generator = torch.Generator().manual_seed(15)
    normal = lambda *shape: torch.randn(shape, generator=generator)
    size = (0.7 * normal(INPUTS)).exp()
    x = size * (normal(4 * INPUTS, INPUTS) + 0.7 * normal(4 * INPUTS, 1))
    weight = 0.02 * normal(ROWS, INPUTS) * (0.8 * normal(INPUTS)).exp().clamp(0.5, 4)
    return weight.half().float(), (x.T @ x / len(x)).half().float()


def rounded(bigptq, metric, weight, hessian):
    """The weights the original leaves, and of each the part it is in: 0 below the threshold, 1 at or above it, 2 salient."""
    from binary import Binarization

    layer = torch.nn.Linear(INPUTS, ROWS, bias=False)
    layer.weight.data = weight.clone()
    blocks = []
    choose = bigptq.structural_guassian_distribution

    def noted(*args):
        masks = choose(*args)
        blocks.append(sum(part * mask.to(torch.uint8) for part, mask in enumerate(masks)))
        assert sum(mask.int() for mask in masks).eq(1).all(), "a weight in no part, or in two"
        return masks

    solver = bigptq.BRAGPTQ(layer, Binarization(weight, method="braq", groupsize=GROUP), metric)
    solver.H = hessian.clone()
    with (
        mock.patch.object(bigptq, "structural_guassian_distribution", noted),
        mock.patch.object(torch.cuda, "synchronize"),
        mock.patch.object(torch.cuda, "empty_cache"),
    ):
        solver.fasterquant(blocksize=GROUP)
    return layer.weight.data.clone(), torch.cat(blocks, dim=1)


def main():
    checkout = Path(sys.argv[1])
    default = Path(__file__).resolve().parents[2] / "crates/quantize/tests/golden/billm.safetensors"
    path = Path(sys.argv[2]) if len(sys.argv) > 2 else default
    path.parent.mkdir(parents=True, exist_ok=True)
    bigptq = original(checkout)
    weight, hessian = problem()
    tensors = {"weight": weight.half(), "hessian": hessian.half()}
    for metric in METRICS:
        values, parts = rounded(bigptq, metric, weight, hessian)
        tensors |= {f"{metric}.rounded": values, f"{metric}.parts": parts.half()}
        print(f"{metric}: {[(parts == part).float().mean().item() for part in range(3)]} in each part")
    head = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True)
    versions = {"torch": version("torch"), "BiLLM": head.stdout.strip() or "unknown"}
    save_file(tensors, path, metadata={"versions": json.dumps(versions)})
    print(f"{path}: {len(tensors)} tensors, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
