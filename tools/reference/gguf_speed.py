"""Seconds that bitmill and llama-quantize take to encode a checkpoint, type by type, turn and turn about, on as many threads.

Every matrix becomes the one type (`--pure`), without calibration data. Medians of wall time and of processor time are printed; where
other programs share the machine, the latter says more. `random_checkpoint.py` writes something to encode.
"""

import argparse
import json
import os
import statistics
import subprocess
import time
from pathlib import Path

from gguf_quality import NAMES

TYPES = "q4_0 q8_0 q4_1 q5_0 q5_1 q4_k q5_k q6_k q2_k q3_k iq4_nl iq4_xs".split()


def timed(command: list) -> tuple[float, float]:
    """Wall and processor seconds of a command."""
    before, begin = os.times(), time.perf_counter()
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    wall, after = time.perf_counter() - begin, os.times()
    return wall, after.children_user - before.children_user + after.children_system - before.children_system


def main() -> None:
    """Prints a row for each type."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("bitmill", "llama", "model", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--types", nargs="*", default=TYPES)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    dense, ours, theirs = (args.work / f"{name}.gguf" for name in ("dense", "ours", "theirs"))
    subprocess.run([args.bitmill, "quantize", args.model, "-o", dense, "--mix", "bf16", "--force"], check=True, capture_output=True)
    shapes = json.loads(subprocess.run([args.bitmill, "inspect", dense, "--json"], check=True, capture_output=True).stdout)
    print(f"{shapes['weights'] / 1e6:.0f}M weights, {args.threads} threads, medians of {args.rounds} rounds")
    print("| type | ours, s | llama-quantize, s | ratio | ours, s of processor | llama-quantize | ratio |\n|" + " --- |" * 7)
    for name in args.types:
        times: dict[str, list] = {"ours": [], "theirs": []}
        for _ in range(args.rounds):
            own = [args.bitmill, "quantize", args.model, "-o", ours, "--force", "--scheme", name, "--pure", "--method", "rtn"]
            times["ours"].append(timed([*own, "--threads", args.threads]))
            file = NAMES.get(name, name).upper()
            times["theirs"].append(timed([args.llama / "llama-quantize", "--pure", dense, theirs, file, args.threads]))
        (wall, cpu), (their_wall, their_cpu) = (
            [statistics.median(side) for side in zip(*times[who], strict=True)] for who in ("ours", "theirs")
        )
        print(
            f"| {name} | {wall:.2f} | {their_wall:.2f} | {their_wall / wall:.2f} | {cpu:.2f} | {their_cpu:.2f} | {their_cpu / cpu:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
