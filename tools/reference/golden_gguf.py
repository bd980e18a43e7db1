"""Writes the golden file of GGUF's block types: blocks of random bytes, and some that gguf-py itself quantized, with the
values gguf-py reads from them. gguf-py writes the container, so the file is also a test of the reader. It does not know Q1_0 and
Q2_0 well yet: their values are worked out here, by the format's definition.

    python tools/reference/golden_gguf.py [FILE, by default crates/checkpoint/tests/golden/blocks.gguf]
"""

import sys
from enum import IntEnum
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from llama_cpp import blocks_to_values

TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4", "TQ1_0", "TQ2_0",
         "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M", "NVFP4", "Q1_0", "Q2_0")

# Types by name; gguf-py 0.19 has none for the last two.
Later = IntEnum("Later", {"Q1_0": 41, "Q2_0": 42})
GGML_QUANT_SIZES[Later.Q1_0], GGML_QUANT_SIZES[Later.Q2_0] = (128, 18), (64, 18)
Type = {**GGMLQuantizationType.__members__, **Later.__members__}

# Where the half-precision numbers of a block lie: random bits would make them NaN.
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,), "TQ1_0": (52,), "TQ2_0": (64,),
    "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,), "IQ1_S": (0,), "Q1_0": (0,), "Q2_0": (0,),
}


def blocks(generator, name, rows):
    """`rows` rows of one super-block (or eight blocks of 32) of random bits."""
    length, size = GGML_QUANT_SIZES[Type[name]]
    data = generator.integers(0, 256, (rows, 256 // length, size), dtype=np.uint8)
    for at in HALVES.get(name, ()):
        halves = (generator.standard_normal(data.shape[:2]) * 0.01).astype(np.float16)
        data[:, :, at:at + 2] = halves[..., None].view(np.uint8)
    if name == "MXFP4":
        data[:, :, 0] = generator.integers(0, 255, data.shape[:2])  # 255 stands for NaN
    if name == "IQ1_M":
        # Nibble j of the half is the upper nibble of word j of the last four.
        halves = (generator.standard_normal(rows) * 0.01).astype(np.float16).view(np.uint16)
        for j in range(4):
            nibble = (halves >> (4 * j) & 15).astype(np.uint8)
            data[:, 0, 49 + 2 * j] = data[:, 0, 49 + 2 * j] & 15 | nibble << 4
    if name == "NVFP4":
        data[:, :, :4] &= 127  # unsigned
    if name == "TQ1_0":
        # Any byte decodes, but a writer makes only those of five digits.
        digits = generator.integers(0, 3 ** 5, (rows, 1, 48))
        last = generator.integers(0, 3 ** 4, (rows, 1, 4)) * 3
        data[:, :, :48] = -(-digits * 256 // 243)
        data[:, :, 48:52] = -(-last * 256 // 243)
    return data.reshape(rows, -1)


def main():
    here = Path(__file__).resolve().parent
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else here.parents[1] / "crates/checkpoint/tests/golden/blocks.gguf"
    generator = np.random.default_rng(11)
    writer = gguf.GGUFWriter(out, "golden")
    writer.add_string("versions", f"gguf {version('gguf')}, numpy {version('numpy')}")
    writer.add_array("text", ["a", "", "é"])
    writer.add_float32("real", 0.25)
    for name in TYPES:
        data = blocks(generator, name, 3)
        values = blocks_to_values(data, Type[name])
        writer.add_tensor(f"{name}.weight", data, raw_dtype=Type[name])
        writer.add_tensor(f"{name}.values", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(f"{out}: {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
