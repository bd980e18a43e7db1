"""How other tools read a quantized folder, and what its tensors mean by definition.

Three loaders, each the peer's own, on the CPU and in f32:

* compressed-tensors folders go through transformers' `AutoModelForCausalLM.from_pretrained`. Modules hold the stored
  tensors until the first forward pass, which decompresses them; `f32` there means that scales are widened first. 4-bit
  floats and powers of two as scales become bf16 whatever is asked for, which holds them exactly: see `logits`.
* GPTQ folders go through GPTQModel, whose kernels take only 16-bit activations. Every linear's weight is therefore asked
  from GPTQModel's own `dequantize_weight` with the scales widened to f32, and runs in a plain f32 transformers model.
* bitsandbytes folders go through transformers as well, whose linears are bitsandbytes' own, computing in f32.

`definition` is a third, independent reading: bits straight from the file, as the formats' documents describe them.
"""

import contextlib
import io
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification, CompressedTensorsConfig, PreTrainedModel

from converters import to_compressed_tensors

FLOATS = ("float-quantized", "mxfp8-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized")
"""Formats whose codes are floats."""
BF16_ONLY = FLOATS[1:]
"""Those that compressed-tensors decompresses to bf16."""
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
"""Magnitudes of 4-bit floats."""


@contextlib.contextmanager
def quiet(log: Path) -> Iterator[None]:
    """Sends what the peers print, from Python or from C, to a file: their progress bars would bury the table."""
    with log.open("ab") as sink, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        saved = [os.dup(1), os.dup(2)]
        try:
            os.dup2(sink.fileno(), 1)
            os.dup2(sink.fileno(), 2)
            yield
        finally:
            for target, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, target)
                os.close(copy)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the folder under its stored name."""
    return {name: tensor for shard in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(shard).items()}


def quantization_config(folder: Path) -> dict:
    """The `quantization_config` of the folder; empty when it is dense."""
    return json.loads((folder / "config.json").read_text()).get("quantization_config", {})


def modules(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Quantized modules, and which format the stored tensors of each betray."""
    found = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind == "weight_packed" and tensor.dtype == torch.uint8:
            found[module] = "nvfp4-pack-quantized" if f"{module}.weight_global_scale" in tensors else "mxfp4-pack-quantized"
        elif kind == "weight_packed":
            found[module] = "pack-quantized"
        elif kind == "qweight":
            found[module] = "gptq" if f"{module}.g_idx" in tensors else "awq"
        elif kind == "weight" and f"{module}.weight_scale_2" in tensors:
            found[module] = "modelopt"
        elif kind == "weight" and f"{module}.weight_scale_inv" in tensors:
            found[module] = "fp8"
        elif kind == "weight" and f"{name}.absmax" in tensors:
            found[module] = "bitsandbytes"
        elif kind == "weight" and tensor.dtype == torch.int8:
            found[module] = "naive-quantized"
        elif kind == "weight" and tensor.dtype == torch.float8_e4m3fn:
            powers = tensors[f"{module}.weight_scale"].dtype == torch.uint8
            found[module] = "mxfp8-quantized" if powers else "float-quantized"
    return found


def unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """`count` unsigned codes from each row of int32 words: a little-endian stream of bits, lowest bit first."""
    stream = np.unpackbits(words.contiguous().numpy().view(np.uint8), axis=1, bitorder="little")
    codes = stream[:, : count * bits].reshape(len(words), count, bits) @ (1 << np.arange(bits))
    return torch.from_numpy(codes)


def arguments(config: dict, module: str) -> dict:
    """What a configuration of compressed-tensors says of a module's weights: its name counts more than its class."""
    groups = list(config["config_groups"].values())
    named = [group for group in groups if module in group["targets"]]
    return (named or groups)[0]["weights"]


def float_definition(tensors: dict[str, torch.Tensor], module: str, weights: dict) -> torch.Tensor:
    """The same for floats: `scale · float`, where NVFP4's scales are divided by the global one first (ModelOpt's multiplied)."""
    scales = tensors.get(f"{module}.weight_scale_inv")
    scales = tensors[f"{module}.weight_scale"] if scales is None else scales
    scales = torch.exp2(scales.float() - 127) if scales.dtype == torch.uint8 else scales.float()
    packed = tensors.get(f"{module}.weight_packed")
    if (factor := tensors.get(f"{module}.weight_scale_2")) is not None:
        packed, scales = tensors[f"{module}.weight"], scales * factor
    if packed is not None:
        codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)
        values = torch.where(codes > 7, -1.0, 1.0) * E2M1[(codes & 7).long()]
        if (whole := tensors.get(f"{module}.weight_global_scale")) is not None:
            scales = scales / whole
    else:
        values = tensors[f"{module}.weight"].float()
    out, columns = values.shape
    height, width = weights.get("block_structure") or (1, columns // max(scales.shape[-1], 1))
    if scales.ndim == 1:
        return values * scales
    return values * scales.repeat_interleave(height, 0)[:out].repeat_interleave(width, 1)[:, :columns]


def definition(tensors: dict[str, torch.Tensor], module: str, config: dict) -> torch.Tensor:
    """The weight `[out, in]` that the stored tensors of a module stand for: `scale · (code − zero)` in f32."""

    def part(kind: str) -> torch.Tensor | None:
        return tensors.get(f"{module}.{kind}")

    if part("qweight") is not None and part("g_idx") is None:
        return awq_definition(part("qweight"), part("qzeros"), part("scales"))
    if (qweight := part("qweight")) is not None:
        bits, out = config["bits"], qweight.shape[1]
        columns = qweight.shape[0] * 32 // bits
        codes = unpack(qweight.T, bits, columns)
        zeros = unpack(part("qzeros"), bits, out).T + (config["checkpoint_format"] != "gptq_v2")
        scales, group_of = part("scales").T.float(), part("g_idx").long()
        return (scales[:, group_of] * (codes - zeros[:, group_of]).float()).contiguous()
    if (absmax := part("weight.absmax")) is not None:
        said = next(t for name, t in tensors.items() if name.startswith(f"{module}.weight.quant_state."))
        state = json.loads(said.numpy().tobytes())
        packed = part("weight").flatten()
        codes = torch.stack((packed >> 4, packed & 15), dim=-1).long()
        values = part("weight.quant_map")[codes].reshape(-1, state["blocksize"]) * absmax[:, None]
        return values.reshape(state["shape"])
    if "config_groups" not in config:
        return float_definition(tensors, module, {"block_structure": config.get("weight_block_size")})
    weights = arguments(config, module)
    if weights["type"] == "float":
        return float_definition(tensors, module, weights)
    bits, scales = weights["num_bits"], part("weight_scale").float()
    zeros = part("weight_zero_point")
    if (packed := part("weight_packed")) is not None:
        out, columns = part("weight_shape").tolist()
        codes = unpack(packed, bits, columns)
        zeros = torch.tensor(1 << (bits - 1)) if zeros is None else unpack(zeros.T, bits, out).T
    else:
        codes = part("weight").long()
        columns = codes.shape[1]
        zeros = torch.tensor(0) if zeros is None else zeros.long()
    if scales.ndim == 1:  # one for the whole tensor
        scales = scales.expand(len(codes), 1)
    group_of = torch.arange(columns) // (columns // scales.shape[1])
    zeros = zeros.expand(scales.shape)
    return scales[:, group_of] * (codes - zeros[:, group_of]).float()


def awq_definition(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """AWQ's: words along the outputs, eight codes of four bits each, of which the odd columns come last."""
    place = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7]) * 4
    spread = lambda words: (words[:, :, None] >> place & 15).flatten(1)
    wide = lambda t: t.repeat_interleave(len(qweight) // len(scales), 0)
    return (wide(scales.float()) * (spread(qweight) - wide(spread(qzeros))).float()).T.contiguous()


def flip_code(folder: Path, copy: Path) -> str:
    """Copies the folder and flips one bit, the highest of the first code of one matrix (of a float, the one behind the
    sign, which a zero would hide; of bitsandbytes, whose first code is the high half of a byte, the second of that); returns
    the tensor's name.

    The matrix is the last quantized one that writes to the residual stream, where one weight is sure to be seen.
    """
    shutil.copytree(folder, copy)
    config = quantization_config(folder)
    for shard in sorted(copy.glob("*.safetensors"), reverse=True):
        with safe_open(shard, "pt") as file:
            shapes = {name: None for name in file.keys()}
        last = tuple(f"{part}.{kind}" for part in ("down_proj", "w2", "output.dense") for kind in ("weight_packed", "qweight", "weight"))
        codes = [name for name in shapes if name.endswith(last)]
        if not codes:
            continue
        name = max(codes, key=lambda n: [int(p) if p.isdigit() else -1 for p in n.split(".")])
        weights = arguments(config, name.rpartition(".")[0]) if "config_groups" in config else {}
        bits = config.get("bits") or weights.get("num_bits", 8)
        bit = {"modelopt": 2, "fp8": 6, "bitsandbytes": 6}.get(config["quant_method"], bits - 1 - (weights.get("type") == "float"))
        data = bytearray(shard.read_bytes())
        header = int.from_bytes(data[:8], "little")
        begin = json.loads(data[8 : 8 + header])[name]["data_offsets"][0]
        data[8 + header + begin] ^= 1 << bit
        shard.write_bytes(data)
        return name
    raise LookupError(f"{folder} holds no quantized output of an MLP")


@contextlib.contextmanager
def packed_zero_placeholder() -> Iterator[None]:
    """Gives compressed-tensors' placeholder of packed zero points the shape that its own files have.

    compressed-tensors 0.20 under transformers 5.23 cannot load any asymmetric pack-quantized folder, its own included:
    the empty parameter for `weight_zero_point` is made as [out, groups] int8, while its compressor (and vLLM) store
    [ceil(out · bits / 32), groups] int32. Only the shape of an empty tensor changes here; unpacking stays theirs.
    """
    stock: Callable = PackedQuantizationCompressor.__dict__["compress"].__func__

    def compress(cls: type, state_dict: dict[str, torch.Tensor], scheme: object) -> dict[str, torch.Tensor]:
        result = stock(cls, state_dict, scheme)
        zeros = result.get("weight_zero_point")
        if zeros is not None and zeros.device.type == "meta" and zeros.dtype != torch.int32:
            rows = math.ceil(zeros.shape[0] * scheme.weights.num_bits / 32)
            result["weight_zero_point"] = torch.empty((rows, zeros.shape[1]), dtype=torch.int32, device="meta")
        return result

    PackedQuantizationCompressor.compress = classmethod(compress)
    try:
        yield
    finally:
        PackedQuantizationCompressor.compress = classmethod(stock)


def load_compressed_tensors(folder: Path, dequantize: bool = False) -> PreTrainedModel:
    """The folder as transformers and compressed-tensors load it; every stored tensor must have found its place.

    With `dequantize` it takes transformers' other route, which rounds each weight to the type of its scale.
    """
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    groups = quantization_config(folder)["config_groups"].values()
    dtype = torch.bfloat16 if any(group["format"] in BF16_ONLY for group in groups) else torch.float32
    with contextlib.nullcontext() if dequantize else packed_zero_placeholder():
        model, report = kind_of(folder).from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            raise ValueError(f"{folder}: transformers reports {problem}: {sorted(report[problem])[:4]}")
    return model.eval()


def kind_of(folder: Path) -> type:
    """The class that loads a folder."""
    images = json.loads((folder / "config.json").read_text())["model_type"] == "vit"
    return AutoModelForImageClassification if images else AutoModelForCausalLM


def load_bitsandbytes(folder: Path) -> PreTrainedModel:
    """The folder as transformers and bitsandbytes load it; the linears compute in f32, by the path that every CPU has.

    Where the CPU multiplies bf16 (AVX512-BF16), the library lays weights out anew at the first pass and rounds their scales to
    bf16.
    """
    from bitsandbytes.nn import Linear4bit

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu").eval()
    for linear in (module for module in model.modules() if isinstance(module, Linear4bit)):
        linear.compute_dtype = torch.float32
        linear.support_avx512bf16_for_cpu = False
    return model


def load_fine_grained(folder: Path) -> PreTrainedModel:
    """The folder as transformers loads fine-grained FP8 where there is no kernel for it: weights in f32, inputs as they are."""
    from transformers import FineGrainedFP8Config

    plain = FineGrainedFP8Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=plain).eval()
    # What is not quantized it leaves in the type of the folder.
    return torch.nn.Module.float(model)


def load_gptq(folder: Path) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """An f32 model on the weights that GPTQModel's kernels hold, and those kernels' own 16-bit weights by module."""
    from gptqmodel import BACKEND, GPTQModel

    peer = GPTQModel.load(str(folder), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16).model
    tensors = stored(folder)
    quantized = modules(tensors)
    state = {n: t.float() for n, t in tensors.items() if n.rpartition(".")[0] not in quantized or n.endswith(".bias")}
    half = {}
    for module in quantized:
        kernel = peer.get_submodule(module)
        half[module] = kernel.dequantize_weight().T
        kernel.scales = kernel.scales.float()
        kernel.clear_weight_cache()
        state[f"{module}.weight"] = kernel.dequantize_weight().T.contiguous()
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if config.tie_word_embeddings:
        state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    model.load_state_dict(state, strict=True)
    return model.eval(), half


def has_experts(tensors: Iterable[str]) -> bool:
    """Whether tensors of these names are of a mixture of experts, which transformers keeps stacked in memory."""
    return any(".experts." in name for name in tensors)


def parameter(model: PreTrainedModel, module: str) -> torch.Tensor:
    """The weight that a model in memory has for a module of the folder: itself, or a part of stacked experts."""
    block, experts, rest = module.partition(".block_sparse_moe.experts.")
    if not experts:
        weight = model.get_submodule(module).weight
        if (state := getattr(weight, "quant_state", None)) is not None:
            from bitsandbytes.functional import dequantize_4bit

            return dequantize_4bit(weight.data, state)
        return weight
    expert, _, part = rest.partition(".")
    stacks = model.get_submodule(f"{block}.mlp.experts")
    if part == "w2":
        return stacks.down_proj[int(expert)]
    return stacks.gate_up_proj[int(expert)].chunk(2)[part == "w3"]


def load(folder: Path) -> PreTrainedModel:
    """Any folder, dense or quantized, as an f32 model."""
    method = quantization_config(folder).get("quant_method")
    if method == "gptq":
        return load_gptq(folder)[0]
    if method == "bitsandbytes":
        return load_bitsandbytes(folder)
    if method == "fp8":
        return load_fine_grained(folder)
    if method in ("awq", "modelopt"):
        folder = to_compressed_tensors(folder, folder.with_name(f"{folder.name}-converted"))
    if method is not None:
        return load_compressed_tensors(folder, dequantize=has_experts(stored(folder)))
    return kind_of(folder).from_pretrained(folder, dtype=torch.float32).eval()


def image_module(module: str) -> str:
    """What transformers calls a module of a stored ViT in memory."""
    renamed = (
        ("encoder.layer.", "layers."),
        ("attention.attention.query", "attention.q_proj"),
        ("attention.attention.key", "attention.k_proj"),
        ("attention.attention.value", "attention.v_proj"),
        ("attention.output.dense", "attention.o_proj"),
        ("intermediate.dense", "mlp.fc1"),
        ("output.dense", "mlp.fc2"),
    )
    for ours, theirs in renamed:
        module = module.replace(ours, theirs)
    return module


def image_states(model: PreTrainedModel, pixels: torch.Tensor) -> torch.Tensor:
    """Hidden states `[images, tokens, hidden]` behind the last norm of a ViT."""
    with torch.no_grad():
        model(pixels[:1])  # decompresses, which the part below does not
        return model.vit(pixels).last_hidden_state.float()


def logits(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits `[windows, window, vocab]`, one window per pass, as a user of the model would compute them, in f32.

    A model that had to be loaded in bf16 is decompressed by a first pass and widened, which changes no weight.
    """
    with torch.no_grad():
        if model.dtype == torch.bfloat16:
            model(input_ids[:1, :1])
            torch.nn.Module.float(model)  # transformers refuses its own for quantized models
        return torch.cat([model(window[None]).logits.float() for window in input_ids])


def first_block(folder: Path, out: Path) -> Path:
    """The folder with its first block alone."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    config = json.loads((folder / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    kept = {n: t for n, t in stored(folder).items() if ".layers." not in n or ".layers.0." in n}
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    for file in folder.glob("tokenizer*"):
        shutil.copy(file, out / file.name)
    return out


def without_calibration(folder: Path) -> None:
    """Takes what calibration says of inputs, keys and values out of a folder: loaders refuse what they have no place for."""
    spare = (".input_scale", ".input_global_scale", ".k_scale", ".v_scale")
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        save_file({name: t for name, t in tensors.items() if not name.endswith(spare)}, shard, metadata={"format": "pt"})
