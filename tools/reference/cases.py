"""The folders that conformance.py writes and loads: one line of options per case."""

import itertools
from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One folder to write: its name, the options that ask for it, and the format it must come out in."""

    name: str
    options: str
    format: str
    method: str = "--method rtn"
    rounds: bool = False
    """Whether the folder asks for rounded activations, or keys and values."""
    plain: bool = False
    """Whether the peer leaves inputs as they are where the folder asks for rounded ones; ours are then `bitmill dequantize`'s."""
    by_way_of: tuple[str, ...] = ()
    """Formats that `bitmill convert` takes the folder through, one after the other, before `format`."""


GROUPS = {"g32": 32, "g64": 64, "g128": 128, "channel": -1}
"""Granularities by the name cases show, and bitmill's number for them."""


FLOATS = {
    "fp8": "float-quantized",
    "fp8_dynamic": "float-quantized",
    "fp8_block": "float-quantized",
    "nvfp4a16": "nvfp4-pack-quantized",
    "mxfp4a16": "mxfp4-pack-quantized",
    "mxfp8a16": "mxfp8-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "mxfp8": "mxfp8-quantized",
    "nf4": "bitsandbytes",
    "fp4": "bitsandbytes",
}
"""Named schemes of floats, and the format each is written in."""


IMAGES = (
    Case("vit w8 sym channel", "--bits 8 --group-size -1 --format pack-quantized", "pack-quantized"),
    Case("vit w8 sym channel, naive", "--bits 8 --group-size -1 --format naive-quantized", "naive-quantized"),
    Case("vit w8 sym channel, calibrated", "--bits 8 --group-size -1 --format pack-quantized", "pack-quantized", "--method gptq"),
    Case("vit w4 sym g8, calibrated", "--bits 4 --group-size 8 --format pack-quantized", "pack-quantized", "--method gptq"),
)
"""Folders of an encoder of images."""


def table() -> list[Case]:
    """Every case. The cross products are whole: a case takes seconds."""
    cases = []
    symmetries = {"sym": "", "asym": " --asymmetric"}
    for bits, symmetry, group in itertools.product((2, 3, 4, 5, 6, 7, 8), symmetries, GROUPS):
        options = f"--bits {bits} --group-size {GROUPS[group]}{symmetries[symmetry]} --format pack-quantized"
        cases.append(Case(f"pack w{bits} {symmetry} {group}", options, "pack-quantized"))
    for symmetry, group in itertools.product(symmetries, ("g128", "channel")):
        options = f"--bits 8 --group-size {GROUPS[group]}{symmetries[symmetry]} --format naive-quantized"
        cases.append(Case(f"naive w8 {symmetry} {group}", options, "naive-quantized"))
    cases.append(Case("naive w8 sym tensor", "--bits 8 --group-size 0 --format naive-quantized", "naive-quantized"))
    cases.append(Case("int w8a8", "--scheme w8a8 --format int-quantized", "int-quantized", rounds=True))
    calibrated = "--samples 16 --sequence-length 512"
    for scheme, format_ in FLOATS.items():
        for method in ("--method rtn", f"--method gptq {calibrated}"):
            rounds = not scheme.endswith("a16") and scheme not in ("nf4", "fp4")
            # What calibration says of inputs is needed whatever the method.
            method = f"{method} {calibrated}" if scheme in ("fp8", "nvfp4") and calibrated not in method else method
            cases.append(Case(f"{scheme}, {method.split()[1]}", f"--scheme {scheme}", format_, method, rounds))
    for scheme, format_ in (("w4a8", "int-quantized"), ("w4afp8", "pack-quantized")):
        cases.append(Case(scheme, f"--scheme {scheme}", format_, rounds=True))
    for method in ("--method rtn", f"--method gptq {calibrated}"):
        name = method.split()[1]
        cases.append(Case(f"fine-grained fp8, {name}", "--scheme fp8_block --format fp8", "fp8", method, plain=True))
        cases.append(Case(f"modelopt nvfp4a16, {name}", "--scheme nvfp4a16 --format modelopt", "modelopt", method))
    for options in ("--bits 5.5 --options 4,fp8a16", "--bits 5.5 --options 3,4g32,8", "--bits 6.0 --options mxfp8a16,nvfp4a16"):
        form = "pack-quantized" if "fp" not in options else "mixed-precision"
        cases.append(Case(f"mixed {options.split()[-1]}", options, form, f"--method rtn {calibrated}"))
    cache = f"--method rtn {calibrated}"
    cases.append(Case("fp8 keys and values", "--scheme w8a16 --kv-cache fp8", "pack-quantized", cache, rounds=True))
    for bits, group in itertools.product((2, 3, 4, 8), GROUPS):
        options = f"--bits {bits} --group-size {GROUPS[group]} --format gptq"
        cases.append(Case(f"gptq w{bits} sym {group}", options, "gptq"))
    for bits, symmetry, group in ((4, "sym", "g128"), (4, "asym", "g64"), (2, "asym", "g32"), (8, "asym", "channel")):
        options = f"--bits {bits} --group-size {GROUPS[group]}{symmetries[symmetry]} --format gptq_v2"
        cases.append(Case(f"gptq v2 w{bits} {symmetry} {group}", options, "gptq_v2"))
    for group in ("g32", "g64", "g128"):
        options = f"--bits 4 --group-size {GROUPS[group]} --asymmetric --format awq"
        cases.append(Case(f"awq w4 asym {group}", options, "awq"))
    cases.append(Case("pack w4 sym g128, calibrated", "--scheme w4a16 --format pack-quantized", "pack-quantized", calibrated))
    cases.append(Case("gptq w3 sym g128, calibrated", "--bits 3 --group-size 128 --format gptq", "gptq", calibrated))
    for bits, group in ((4, "g128"), (8, "channel")):
        # Experts are loaded by transformers' dequantize=True alone, which rounds weights to the type of their scales.
        options = f"--bits {bits} --group-size {GROUPS[group]} --scale-type f32 --format pack-quantized"
        cases.append(Case(f"experts w{bits} sym {group}", options, "pack-quantized"))
        cases.append(Case(f"experts w{bits} sym {group}, calibrated", options, "pack-quantized", calibrated))
    for name, options, way, last in (
        ("gptq to pack, w4 sym g128", "--bits 4 --group-size 128 --format gptq", ("gptq_v2",), "pack-quantized"),
        ("gptq to naive, w8 sym channel", "--bits 8 --group-size -1 --format gptq", (), "naive-quantized"),
        ("awq to pack, w4 asym g64", "--bits 4 --group-size 64 --asymmetric --format awq", (), "pack-quantized"),
        ("nvfp4 through modelopt", "--scheme nvfp4a16", ("modelopt",), "nvfp4-pack-quantized"),
        ("fp8 tiles through fp8", "--scheme fp8_block --format fp8", ("float-quantized",), "fp8"),
        ("pack to gptq, w4 sym g128", "--bits 4 --group-size 128 --format pack-quantized", ("awq",), "gptq"),
    ):
        cases.append(Case(f"convert {name}", options, last, by_way_of=(*way, last), plain=last == "fp8"))
    return cases
