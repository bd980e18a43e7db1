"""Holds bitmill's GGUF files against llama.cpp and gguf-py.

* types: llama-perplexity loads a file of each type with `--check-tensors`, sees the same tokens and agrees in perplexity with
  `bitmill eval` within 1 % (it rounds activations to 8 bits, bitmill computes in f32); gguf-py reads every block to bitmill's
  values bit for bit.
* mixes: every matrix gets the type llama-quantize gives it, on the model and on made-up models of other shapes.
* imatrix: what `bitmill calibrate` writes and what llama-imatrix writes, both layouts, on the same windows.
* convert: tensors and tokenizer of convert_hf_to_gguf.py's file.
* split: shards that llama-gguf-split makes are read, and it joins bitmill's.
"""

import argparse
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import random_checkpoint
import torch
from gguf import GGUFReader
from llama_cpp import (
    CONTEXT,
    Programs,
    base_tokens,
    hf_name,
    second_half_perplexity,
    slice_for,
    types,
    values,
)
from safetensors.numpy import load_file

WINDOWS = 12
TYPES = [
    "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs", "mxfp4", "nvfp4", "q1_0", "q2_0", "tq1_0",
    "tq2_0", "iq3_s", "iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s", "f16", "bf16", "f32",
]  # fmt: skip
MIXES = [
    "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0", "iq4_nl", "iq4_xs", "q3_k_l", "q3_k_m",
    "q3_k_s", "iq3_m", "iq3_s", "iq3_xs", "iq3_xxs", "q2_k", "q2_k_s", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s", "q1_0", "q2_0", "tq1_0",
    "tq2_0",
]  # fmt: skip
SHAPES = {
    "12 blocks, 4 heads on 4": {"num_hidden_layers": 12, "num_attention_heads": 4, "num_key_value_heads": 4},
    "33 blocks, 8 heads on 1, tied": {
        "num_hidden_layers": 33,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
    "80 blocks, 8 heads on 2": {"num_hidden_layers": 80, "num_attention_heads": 8, "num_key_value_heads": 2},
    "8 blocks, rows of 288 and 352": {"hidden_size": 288, "intermediate_size": 352, "num_attention_heads": 4, "num_key_value_heads": 2},
}
"""Made-up models, as changes to a small configuration."""


class Bench:
    """What every part works with, and the verdicts."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.programs = Programs(args.llama, args.bitmill, args.threads)
        self.model, self.text, self.work, self.source = args.model, args.text, args.work, args.source
        self.golden: Path | None = args.golden
        self.failed: list[str] = []
        config = json.loads((self.model / "config.json").read_text())
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.work.mkdir(parents=True, exist_ok=True)
        self.slice = self.work / "slice.txt"
        slice_for(self.model, self.text, WINDOWS, self.slice)

    def verdict(self, part: str, case: str, good: bool, said: str) -> None:
        """Prints a row of the matrix and keeps what failed."""
        print(f"{part:<8} {case:<34} {'ok  ' if good else 'FAIL'} {said}", flush=True)
        if not good:
            self.failed.append(f"{part} {case}")

    def write(self, file: Path, *options: object) -> None:
        """`bitmill quantize` of the model to `file`."""
        self.programs.bitmill("quantize", self.model, "-o", file, "--force", *options)

    def folder(self, file: Path) -> dict[str, np.ndarray]:
        """The values of a GGUF file as bitmill dequantizes them."""
        out = file.with_suffix("")
        shutil.rmtree(out, ignore_errors=True)
        self.programs.bitmill("dequantize", file, "-o", out)
        found = {name: tensor for shard in out.glob("*.safetensors") for name, tensor in load_file(shard).items()}
        shutil.rmtree(out)
        return found


def same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> list[str]:
    """Names of tensors that are not the same numbers on both sides; zeros may differ in sign."""
    differ = set(a) ^ set(b)
    return sorted(differ | {n for n in set(a) & set(b) if a[n].shape != b[n].shape or not np.array_equal(a[n], b[n])})


def check_types(bench: Bench, wanted: Callable[[str], bool]) -> None:
    """One file per type through both programs and both readers."""
    known = bench.programs.bitmill("quantize", "--help")
    base, logits = bench.work / "base.bin", bench.work / "logits.safetensors"
    for name in filter(wanted, TYPES):
        dense = name in ("f16", "bf16", "f32")
        if not dense and not re.search(rf"^\s+{name}\s", known, re.MULTILINE):
            bench.verdict("types", name, True, "bitmill does not write it")
            continue
        file = bench.work / f"{name}.gguf"
        bench.write(file, "--mix" if dense else "--scheme", name, "--method", "rtn")
        theirs, ours = values(file, bench.heads, bench.kv_heads), bench.folder(file)
        differ = same_bits(theirs, ours)
        try:
            peer = bench.programs.perplexity(file, bench.slice, WINDOWS, base)
        except RuntimeError as error:
            bench.verdict("types", name, False, f"llama.cpp refuses it: {error}"[-300:])
            continue
        bench.programs.bitmill(
            "eval", file, "--text", bench.slice, "--window", CONTEXT, "--windows", WINDOWS, "--logits", logits, "--json"
        )
        ids, own = second_half_perplexity(logits)
        tokens = bool((base_tokens(base)[:, 1:] == ids[:, 1:]).all())
        good = not differ and tokens and abs(own / peer - 1) < 0.01
        said = f"perplexity {own:.4f} / {peer:.4f} ({100 * (own / peer - 1):+.3f} %), "
        said += f"{len(ours)} tensors bit for bit" if not differ else f"other values: {differ[:3]}"
        bench.verdict("types", name, good, said + ("" if tokens else ", other tokens"))
        file.unlink()


def made_up(bench: Bench, name: str, changes: dict) -> Path:
    """A folder of random weights with the model's tokenizer."""
    out = bench.work / "made-up" / re.sub(r"\W+", "-", name)
    random_checkpoint.write(bench.model, out, {"hidden_size": 256, "intermediate_size": 256} | changes, torch.float16)
    return out


def peer_plan(bench: Bench, dense: Path, mix: str, imatrix: Path | None, pure: bool) -> dict[str, str]:
    """The type llama-quantize means to give each matrix of `dense`, by the tensor's name."""
    options = [*(["--imatrix", imatrix] if imatrix else []), *(["--pure"] if pure else [])]
    said = bench.programs.run("llama-quantize", "--dry-run", *options, dense, mix.upper())
    return dict(re.findall(r"\] +(\S+) +- \[.*-> .*MiB \((\S+)\)", said))


def by_role(plan: dict[str, str]) -> dict[str, str]:
    """A plan in short: for each kind of matrix its types in the order of blocks, `q6_k*2 q4_k*5`."""
    found: dict[str, list[str]] = {}
    for name in sorted(plan, key=lambda n: int(n.split(".")[1]) if n.startswith("blk.") else -1):
        found.setdefault(name.removesuffix(".weight").split(".")[-1], []).append(plan[name].lower())
    return {role: " ".join(f"{kind}*{len(list(run))}" for kind, run in itertools.groupby(kinds)) for role, kinds in found.items()}


def check_mixes(bench: Bench, wanted: Callable[[str], bool]) -> None:
    """Types by matrix, with and without calibration data, as both programs plan them."""
    folders = {bench.model.name: bench.model}
    folders |= {name: made_up(bench, name, changes) for name, changes in SHAPES.items()}
    imatrix = bench.work / "any.dat"
    bench.programs.bitmill("calibrate", bench.model, "-o", imatrix, "--samples", 2, "--sequence-length", 32, "--force")
    golden = {}
    for folder_name, folder in folders.items():
        dense = bench.work / "dense.gguf"
        bench.programs.bitmill("quantize", folder, "-o", dense, "--mix", "f16", "--force")
        bad, absent, cases = [], set(), 0
        plans = golden[folder_name] = {"config": json.loads((folder / "config.json").read_text()), "mixes": {}}
        for mix in filter(wanted, MIXES):
            for data, pure in ((True, False), (False, False), (True, True)):
                try:
                    theirs = peer_plan(bench, dense, mix, imatrix if data else None, pure)
                except RuntimeError as error:
                    if "no tensor type fallback" not in str(error):
                        raise
                    continue  # llama-quantize gives up on rows that are no whole blocks
                if not pure:
                    plans["mixes"][f"{mix} {'with' if data else 'without'} data"] = by_role(theirs)
                if bench.golden:
                    continue
                try:
                    plan = bench.programs.bitmill(
                        "quantize", folder, "-o", bench.work / "x.gguf", "--mix", mix, "--method", "gptq" if data else "rtn",
                        "--dry-run", "--json", "--sequence-length", 32, *(["--pure"] if pure else []),
                    )  # fmt: skip
                except RuntimeError as error:
                    if "none that is written" not in str(error):
                        raise
                    absent.add(mix)
                    continue
                ours = {t["tensor"] + ".weight": t["scheme"] for t in json.loads(plan)["tensors"]}
                theirs = {hf_name(name): kind.lower() for name, kind in theirs.items()}
                cases += 1
                if not theirs or ours != theirs:
                    first = [(n, ours.get(n), theirs.get(n)) for n in theirs if ours.get(n) != theirs[n]][:2]
                    bad.append((mix, data, pure, first))
        said = f"{cases} plans, with and without data and with --pure"
        if absent:
            said += f"; types not written: {', '.join(sorted(absent))}"
        good = bool(bench.golden) or (cases > 0 and not bad)
        bench.verdict("mixes", folder_name, good, said + (f"; differ: {bad[:3]}" if bad else ""))
    if bench.golden:
        keys = "num_hidden_layers hidden_size intermediate_size num_attention_heads num_key_value_heads tie_word_embeddings".split()
        for plans in golden.values():
            plans["config"] = {key: plans["config"].get(key, False) for key in keys}
        bench.golden.write_text(json.dumps(golden, indent=1) + "\n")


def check_imatrix(bench: Bench, wanted: Callable[[str], bool]) -> None:
    """Importance matrices of the same windows, both layouts, both directions."""
    dense = bench.work / "f32.gguf"
    bench.write(dense, "--mix", "f32")
    windows = ["--samples", WINDOWS, "--sequence-length", CONTEXT]
    for layout in filter(wanted, ("gguf", "dat")):
        ours, theirs = bench.work / f"ours.{layout}", bench.work / f"theirs.{layout}"
        bench.programs.bitmill("calibrate", bench.model, "-o", ours, "--calibration", bench.slice, *windows, "--force")
        bench.programs.run(
            "llama-imatrix", "-m", dense, "-f", bench.slice, "-o", theirs, "--output-format", layout, "-c", CONTEXT, "-b", CONTEXT,
            "--chunks", WINDOWS, "-t", bench.programs.threads, "--no-ppl",
        )  # fmt: skip
        a, b = (means(file) for file in (ours, theirs))
        worst = max(float(np.abs(a[n] - b[n]).max() / b[n].max()) for n in a if n in b)
        good = set(a) == set(b) and worst < 0.01
        # Each program takes the other's file.
        small = bench.work / "small.gguf"
        said = bench.programs.run("llama-quantize", "--imatrix", ours, "--pure", dense, small, "Q2_K_S")
        good &= f"have {len(a)} importance matrix entries" in said or f"data with {len(a)} entries" in said
        bench.write(small, "--scheme", "q2_k", "--imatrix", theirs)
        bench.verdict("imatrix", layout, good, f"{len(a)} weights, largest difference {100 * worst:.3f} % of the largest entry")


def means(file: Path) -> dict[str, np.ndarray]:
    """Mean squares by weight, in either layout, by this program's own reading."""
    data = file.read_bytes()
    found = {}
    if data[:4] == b"GGUF":
        tensors = {t.name: np.array(t.data).reshape(-1) for t in GGUFReader(file).tensors}
        for name, sums in tensors.items():
            if name.endswith(".in_sum2"):
                weight = name.removesuffix(".in_sum2")
                found[weight] = sums / tensors[f"{weight}.counts"][0]
        return found
    at = 4
    for _ in range(int.from_bytes(data[:4], "little")):
        length = int.from_bytes(data[at : at + 4], "little")
        name = data[at + 4 : at + 4 + length].decode()
        at += 4 + length
        calls, count = np.frombuffer(data, np.int32, 2, at)
        found[name] = np.frombuffer(data, np.float32, count, at + 8) / calls
        at += 8 + 4 * int(count)
    return found


def check_convert(bench: Bench, wanted: Callable[[str], bool]) -> None:
    """The converter's file of the same folder."""
    if bench.source is None:
        bench.verdict("convert", "all", True, "left out: no --source folder of llama.cpp")
        return
    for kind in filter(wanted, ("f32", "bf16")):
        ours, theirs = bench.work / f"ours-{kind}.gguf", bench.work / f"theirs-{kind}.gguf"
        bench.write(ours, "--mix", kind)
        command = [sys.executable, bench.source / "convert_hf_to_gguf.py", bench.model, "--outtype", kind, "--outfile", theirs]
        subprocess.run(command, check=True, capture_output=True)
        a, b = (values(file, bench.heads, bench.kv_heads) for file in (ours, theirs))
        differ = same_bits(a, b) + [n for n, t in types(theirs).items() if types(ours).get(n) != t]
        keys_a, keys_b = (GGUFReader(file).fields for file in (ours, theirs))
        lists = [k for k in keys_b if k.startswith("tokenizer.") and k != "tokenizer.chat_template"]
        other = [k for k in lists if k not in keys_a or keys_a[k].contents() != keys_b[k].contents()]
        good = not differ and not other
        said = f"{len(b)} tensors, {len(lists)} tokenizer keys"
        bench.verdict("convert", kind, good, said + (f"; differ: {(differ + other)[:5]}" if not good else " equal"))


def check_split(bench: Bench, _: Callable[[str], bool]) -> None:
    """Shards in both directions."""
    whole, parts = bench.work / "whole.gguf", bench.work / "parts"
    bench.write(whole, "--scheme", "q4_0", "--method", "rtn")
    shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir()
    bench.programs.run("llama-gguf-split", "--split", "--split-max-tensors", 20, whole, parts / "theirs")
    first = sorted(parts.glob("theirs-00001-of-*.gguf"))[0]
    read = same_bits(bench.folder(whole), bench.folder(first))
    bench.verdict("split", "reading llama-gguf-split's", not read, f"{len(list(parts.glob('theirs-*')))} shards")
    bench.write(parts / "ours.gguf", "--scheme", "q4_0", "--method", "rtn", "--max-shard-size", "8MB")
    shards = sorted(parts.glob("ours-*.gguf"))
    joined = bench.work / "joined.gguf"
    joined.unlink(missing_ok=True)
    bench.programs.run("llama-gguf-split", "--merge", shards[0], joined)
    differ = same_bits(values(whole, bench.heads, bench.kv_heads), values(joined, bench.heads, bench.kv_heads))
    bench.verdict("split", "llama-gguf-split joins ours", not differ and len(shards) > 1, f"{len(shards)} shards")


PARTS = {"types": check_types, "mixes": check_mixes, "imatrix": check_imatrix, "convert": check_convert, "split": check_split}


def main() -> None:
    """Runs the parts whose cases the pattern finds, and fails if any case does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bitmill", type=Path, required=True)
    parser.add_argument("--llama", type=Path, required=True, help="folder of llama.cpp's binaries")
    parser.add_argument("--source", type=Path, help="llama.cpp's source folder, for convert_hf_to_gguf.py")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parts", default=",".join(PARTS), help="which to check, with commas between")
    parser.add_argument("--golden", type=Path, help="only write what llama-quantize says of mixtures, for the tests of crates/quantize")
    parser.add_argument("--cases", default="", help="regular expression of types, mixtures or layouts")
    args = parser.parse_args()
    bench, pattern = Bench(args), re.compile(args.cases)
    for part in args.parts.split(","):
        PARTS[part](bench, lambda case: bool(pattern.search(case)))
    if bench.failed:
        sys.exit(f"{len(bench.failed)} cases failed: {', '.join(bench.failed)}")


if __name__ == "__main__":
    main()
