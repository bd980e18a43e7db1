"""Writes the golden files of crates/checkpoint: tensors packed by compressed-tensors, GPTQModel, AutoRound (for AWQ) and
bitsandbytes themselves, and the weights those libraries (of gpt-oss's blocks, transformers) read back from them. Every file
records the versions that made it.

    python tools/reference/golden_formats.py [FOLDER, by default crates/checkpoint/tests/golden] [PREFIX of the files wanted]
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from safetensors.torch import save_file

LIBRARIES = ("torch", "compressed-tensors", "gptqmodel")


def codes(generator, bits, rows, cols):
    """Every code of the grid, in random order."""
    return torch.randint(-(1 << bits - 1), 1 << bits - 1, (rows, cols), generator=generator)


def scales(generator, shape, dtype):
    """Values of the stored type, some negative."""
    values = (torch.rand(shape, generator=generator) + 0.1) * 0.01
    return (values * torch.where(torch.rand(shape, generator=generator) < 0.2, -1.0, 1.0)).to(dtype)


def compressed_tensors(name, cases, dtype, path):
    """One file of modules m0, m1, ... in the format `name`."""
    generator = torch.Generator().manual_seed(7)
    tensors, groups = {}, {}
    compressor = BaseCompressor.get_value_from_registry(name)
    for i, (bits, symmetric, strategy, group, (rows, cols)) in enumerate(cases):
        args = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "dynamic": False}
        if group:
            args["group_size"] = group
        inputs = None
        if name == "int-quantized":
            inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args), input_activations=inputs)

        count = cols // group if group else 1
        shape = (1,) if strategy == "tensor" else (rows, count)
        q = codes(generator, bits, rows, cols)
        scale = scales(generator, shape, dtype)
        zero = torch.zeros(shape, dtype=torch.int8)
        if not symmetric:
            zero = codes(generator, bits, *((1, 1) if strategy == "tensor" else shape)).reshape(shape).to(torch.int8)
        wide = lambda t: t.float() if strategy == "tensor" else t.float().repeat_interleave(cols // count, dim=1)
        weight = (q - wide(zero)) * wide(scale)
        packed = compressor.compress({"weight": weight, "weight_scale": scale, "weight_zero_point": zero}, scheme)
        # Widened scales make the library multiply in f32, where the product is defined.
        state = dict(packed, weight_scale=scale.float())
        dequantized = compressor.decompress(state, scheme)["weight"]
        assert torch.equal(dequantized, weight), f"{name}: {bits} bits did not survive the library itself"
        for key, value in packed.items():
            tensors[f"m{i}.{key}"] = value.contiguous()
        tensors[f"m{i}.dequantized"] = dequantized.contiguous()
        groups[f"group_{i}"] = scheme.model_copy(update={"targets": [f"m{i}"], "format": name})
    config = QuantizationConfig(config_groups=groups, format=name, quantization_status="compressed", ignore=[])
    write(path, tensors, json.loads(config.model_dump_json()))


def gptq(cases, path):
    """One file per call: the base of the configuration is the same for all modules but for `dynamic`."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    generator = torch.Generator().manual_seed(9)
    tensors, dynamic = {}, {}
    for i, (bits, symmetric, group, act_order, version_2, (rows, cols)) in enumerate(cases):
        count = cols // group if group > 0 else 1
        linear = torch.nn.Linear(cols, rows, bias=False)
        scale = scales(generator, (rows, count), torch.float16).float()
        # Zero points of 1 and above: version 1 writers disagree on 0.
        zero = torch.full((rows, count), 1 << bits - 1)
        if not symmetric:
            zero = torch.randint(1, 1 << bits, (rows, count), generator=generator)
        g_idx = torch.arange(cols, dtype=torch.int32) // (cols // count)
        if act_order:
            g_idx = g_idx[torch.randperm(cols, generator=generator)]
        q = codes(generator, bits, rows, cols) + (1 << bits - 1)
        linear.weight.data = (q - zero[:, g_idx]) * scale[:, g_idx]
        module = TorchLinear(
            bits=bits, group_size=group, sym=symmetric, desc_act=act_order, in_features=cols, out_features=rows,
            bias=False, pack_dtype=torch.int32, register_buffers=True,
        )
        module.pack_original(linear, scale, zero.float(), g_idx)
        stored = module.scales
        module.post_init()
        module.scales = stored.float()
        dequantized = module.dequantize_weight().T.contiguous().float()
        assert torch.equal(dequantized, linear.weight.data), f"gptq: {bits} bits did not survive the library itself"
        module.scales = stored
        if not version_2:
            convert_gptq_v2_to_v1_format_module(module, SimpleNamespace(bits=bits, pack_dtype=torch.int32))
        for key in ("qweight", "qzeros", "scales", "g_idx"):
            tensors[f"m{i}.{key}"] = getattr(module, key).contiguous()
        tensors[f"m{i}.dequantized"] = dequantized
        dynamic[f"+:^m{i}$"] = {"bits": bits, "group_size": group, "sym": symmetric}
    config = {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True, "dynamic": dynamic,
        "checkpoint_format": "gptq_v2" if cases[0][4] else "gptq",
    }
    write(path, tensors, config)


def awq(cases, path):
    """Modules of one scheme, which is all that the configuration knows, packed by AutoRound's copy of AutoAWQ's linear."""
    from auto_round.export.export_to_awq.utils import WQLinear_GEMM, reverse_awq_order, unpack_awq

    generator = torch.Generator().manual_seed(11)
    tensors, group = {}, cases[0][0]
    for i, (_, (rows, cols)) in enumerate(cases):
        count = cols // group if group > 0 else 1
        linear = torch.nn.Linear(cols, rows, bias=False)
        scale = scales(generator, (count, rows), torch.float16).float()
        zero = torch.randint(0, 16, (count, rows), generator=generator)
        wide = lambda t: t.T.repeat_interleave(cols // count, dim=1)
        q = codes(generator, 4, rows, cols) + 8
        linear.weight.data = (q - wide(zero)) * wide(scale)
        packed = WQLinear_GEMM.from_linear(linear, 4, group, scales=scale, zeros=zero.float())
        weight, zeros = reverse_awq_order(*unpack_awq(packed.qweight, packed.qzeros, 4), 4)
        weight, zeros = weight & 15, zeros & 15
        dequantized = (weight.T - wide(zeros)).float() * wide(packed.scales).float()
        assert torch.equal(dequantized, linear.weight.data), "awq: 4 bits did not survive the library itself"
        for key in ("qweight", "qzeros", "scales"):
            tensors[f"m{i}.{key}"] = getattr(packed, key).contiguous()
        tensors[f"m{i}.dequantized"] = dequantized.contiguous()
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    write(path, tensors, config, ("torch", "auto-round"))


def bitsandbytes(kind, nested, cases, path):
    """Weights rounded to NF4 or FP4 on the CPU, and what the library itself makes of the codes."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    generator = torch.Generator().manual_seed(13)
    tensors = {}
    for i, (block, (rows, cols)) in enumerate(cases):
        weight = torch.randn((rows, cols), generator=generator) * 0.02
        weight[0, :block] = 0.0
        packed, state = quantize_4bit(weight, blocksize=block, compress_statistics=nested, quant_type=kind)
        tensors[f"m{i}.weight"] = packed
        for key, value in state.as_dict(packed=True).items():
            tensors[f"m{i}.weight.{key}"] = value.contiguous()
        tensors[f"m{i}.dequantized"] = dequantize_4bit(packed, state).contiguous()
        if not nested:
            tensors[f"m{i}.original"] = weight
    config = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": nested, "bnb_4bit_compute_dtype": "float32", "bnb_4bit_quant_storage": "uint8",
    }
    write(path, tensors, config, ("torch", "bitsandbytes"))


def gpt_oss(path):
    """Random blocks of two stacks of experts; transformers' numbers, with each expert the other way round, as it is stored."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(17)
    tensors = {}
    for name, (experts, rows, groups) in {"gate_up_proj": (3, 8, 2), "down_proj": (3, 6, 1)}.items():
        module = f"model.layers.0.mlp.experts.{name}"
        blocks = torch.randint(0, 256, (experts, rows, groups, 16), generator=generator, dtype=torch.uint8)
        powers = torch.randint(115, 125, (experts, rows, groups), generator=generator, dtype=torch.uint8)
        dense = convert_moe_packed_tensors(blocks, powers, dtype=torch.bfloat16)
        tensors |= {f"{module}_blocks": blocks, f"{module}_scales": powers}
        tensors[f"{module}.dequantized"] = dense.transpose(1, 2).reshape(experts * rows, groups * 32).contiguous()
    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"]}
    write(path, tensors, config, ("torch", "transformers"))


def write(path, tensors, quantization, libraries=LIBRARIES):
    versions = {name: version(name) for name in libraries}
    metadata = {"versions": json.dumps(versions), "config": json.dumps({"quantization_config": quantization})}
    save_file(tensors, path, metadata=metadata)
    print(f"{path}: {len(tensors)} tensors, {path.stat().st_size} bytes")


def main():
    here = Path(__file__).resolve().parent
    wanted = sys.argv[2] if len(sys.argv) > 2 else ""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else here.parents[1] / "crates/checkpoint/tests/golden"
    out.mkdir(parents=True, exist_ok=True)
    small = {
        "bitsandbytes": lambda path: bitsandbytes("nf4", False, [(64, (6, 128)), (32, (3, 64))], path),
        "bitsandbytes_nested": lambda path: bitsandbytes("nf4", True, [(32, (20, 512))], path),
        "bitsandbytes_fp4": lambda path: bitsandbytes("fp4", False, [(64, (6, 128)), (32, (3, 64))], path),
        "gpt_oss": gpt_oss,
    }
    for name, make in small.items():
        if name.startswith(wanted):
            make(out / f"{name}.safetensors")
    if wanted:
        return
    # Widths that fill no word, in both directions.
    pack = [(bits, sym, strategy, group, (5, 24) if bits % 2 else (9, 16))
            for bits in range(1, 9)
            for sym, strategy, group in ((bits % 3 == 0, "channel", None), (False, "group", 8))]
    pack += [(4, True, "tensor", None, (3, 8)), (5, False, "tensor", None, (3, 8))]
    compressed_tensors("pack-quantized", pack, torch.bfloat16, out / "pack_quantized.safetensors")
    naive = [(8, True, "channel", None, (4, 6)), (8, False, "group", 2, (4, 6)), (3, False, "channel", None, (2, 5)),
             (8, True, "tensor", None, (2, 3)), (8, False, "tensor", None, (2, 3))]
    compressed_tensors("naive-quantized", naive, torch.float16, out / "naive_quantized.safetensors")
    compressed_tensors("int-quantized", naive[:2] + naive[3:], torch.bfloat16, out / "int_quantized.safetensors")
    shape = (32, 32)
    v1 = [(2, True, 16, False), (3, True, 16, False), (4, True, 16, True), (4, False, 16, False), (8, True, -1, False)]
    gptq([(*case, False, shape) for case in v1], out / "gptq.safetensors")
    gptq([(2, False, -1, False, True, shape), (4, False, 16, True, True, shape)], out / "gptq_v2.safetensors")
    awq([(16, (8, 32)), (16, (40, 48))], out / "awq.safetensors")


if __name__ == "__main__":
    main()
