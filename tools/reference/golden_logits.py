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
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoTokenizer,
)

import logits_dense
import logits_llama
import logits_mixtures
from logits_encoders import ENCODERS, IMAGES
from logits_mixtures import RENAMED

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "crates/models/tests/golden"
VERSIONS = {
    "torch": torch.__version__,
    "transformers": transformers.__version__,
    "compressed-tensors": compressed_tensors.__version__,
}

CASES = logits_llama.CASES | logits_dense.CASES | logits_mixtures.CASES
"""Every decoder. Seeds are places in this order, so what is new comes last."""


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


def image_states_of(folder, pixels):
    classifier = "id2label" in json.loads((folder / "config.json").read_text())
    kind = AutoModelForImageClassification if classifier else AutoModel
    model, report = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    with torch.no_grad():
        return getattr(model.eval(), "vit", model)(pixels).last_hidden_state.float()


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
    write_golden(folder, config, plainer, ("input_ids", random_ids(seed, config, length)), state, ("logits", logits_of))


def write_encoder(seed, name, config, plainer, length, stored):
    folder = GOLDEN / name
    write_config(folder, config)
    model = AutoModel.from_config(AutoConfig.from_pretrained(folder))
    randomise(model, seed)
    state = {stored(k): v.detach().float().contiguous() for k, v in model.state_dict().items()}
    ids = random_ids(seed, config, length)
    write_golden(folder, config, plainer, ("input_ids", ids), state, ("hidden_states", hidden_states_of))


def write_images(seed, name, config, plainer, classifier):
    folder = GOLDEN / name
    write_config(folder, config)
    kind = AutoModelForImageClassification if classifier else AutoModel
    model = kind.from_config(AutoConfig.from_pretrained(folder))
    randomise(model, seed)
    # In memory the names are others than the library stores.
    stored = folder / "stored"
    model.save_pretrained(stored)
    state = load_file(stored / "model.safetensors")
    shutil.rmtree(stored)
    size = model.config.image_size
    shape = (2, model.config.num_channels, *(size if isinstance(size, list) else (size, size)))
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(1000 + seed))
    write_golden(folder, config, plainer, ("pixel_values", pixels), state, ("hidden_states", image_states_of))


def random_ids(seed, config, length):
    vocab = config.get("text_config", config)["vocab_size"]
    # Beyond the last are the tokens that stand for an image.
    return torch.randint(0, config.get("image_token_index", vocab), (length,), generator=torch.Generator().manual_seed(1000 + seed))


def write_golden(folder, config, plainer, read, state, put_out):
    """Stores the weights and the output on what is read, both with their names; it must not be that of a plainer config."""
    (what, inputs), (kind, output_of) = read, put_out
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    output = output_of(folder, inputs)

    plain, differences = folder / "plainer", []
    for keys in plainer if isinstance(plainer, list) else [plainer]:
        write_config(plain, config | keys)
        shutil.copy(folder / "model.safetensors", plain / "model.safetensors")
        difference = (output - output_of(plain, inputs)).abs().max().item()
        shutil.rmtree(plain)
        assert difference > 1e-3, f"{folder.name}: {keys} gives the same {kind} ({difference})"
        differences.append(f"{difference:.3f}")
    save_file(
        {what: inputs, kind: output.contiguous()},
        folder / "golden.safetensors",
        metadata=VERSIONS | {"source": "tools/reference/golden_logits.py"},
    )
    print(f"{folder.name:28} |{kind}| {output.abs().max():7.3f}  plainer configs differ by {', '.join(differences)}")


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
    unknown = set(wanted) - CASES.keys() - ENCODERS.keys() - IMAGES.keys()
    assert not unknown, f"no such cases: {unknown}"
    for index, (name, (config, plainer, length)) in enumerate(CASES.items()):
        if not wanted or name in wanted:
            write_case(index, name, config, plainer, length)
    for index, (name, (config, plainer, length, stored)) in enumerate(ENCODERS.items()):
        if not wanted or name in wanted:
            write_encoder(100 + index, name, config, plainer, length, stored)
    for index, (name, (config, plainer, classifier)) in enumerate(IMAGES.items()):
        if not wanted or name in wanted:
            write_images(300 + index, name, config, plainer, classifier)
    if not wanted:
        write_books()
        write_int8()
        write_floats()
    assert load_file(GOLDEN / "llama-gqa/golden.safetensors")["logits"].shape == (40, 64)
