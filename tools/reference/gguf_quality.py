"""KL divergence of bitmill's GGUF files and llama-quantize's, side by side: same types, same calibration text, same meter.

Both sides start from the same f32 weights; llama-quantize gets llama-imatrix's file of the calibration text. Types are compared with
embedding and output matrix f16, mixtures as they are. `bitmill eval` is the meter of both, in f32 and against the original.

Without data llama-quantize gets no imatrix, and bitmill either no text at all or, with `--written`, one that the model wrote itself.
"""

import argparse
import json
from pathlib import Path

from llama_cpp import CONTEXT, Programs, types

TYPES = "q1_0 q2_0 q2_k q3_k q4_0 q4_1 q4_k q5_0 q5_1 q5_k q6_k q8_0 iq4_nl iq4_xs iq3_s iq3_xxs iq2_s iq2_xs iq2_xxs iq1_m iq1_s".split()
MIXES = "q2_k q2_k_s q3_k_s q3_k_m q3_k_l q4_0 q4_1 q4_k_s q4_k_m q5_0 q5_1 q5_k_s q5_k_m q6_k q8_0 iq4_nl iq4_xs iq3_m iq2_m".split()
NAMES = {"q3_k": "q3_k_s", "q4_k": "q4_k_s", "q5_k": "q5_k_s", "iq2_s": "iq2_m", "mxfp4": "mxfp4_moe"}
"""What llama-quantize calls a file whose base is the type, where that is not the type's own name."""


class Meter:
    """The model, its texts, and what was made of it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.programs, self.args, self.work = Programs(args.llama, args.bitmill, args.threads), args, args.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.dense, self.imatrix = self.work / "f32.gguf", self.work / "imatrix.gguf"
        if not self.dense.exists():
            self.programs.bitmill("quantize", args.model, "-o", self.dense, "--mix", "f32")
        if not self.imatrix.exists():
            self.programs.run(
                "llama-imatrix", "-m", self.dense, "-f", args.calibration, "-o", self.imatrix, "-c", CONTEXT, "-b", CONTEXT,
                "--chunks", args.samples, "-t", args.threads, "--no-ppl",
            )  # fmt: skip

    def kl(self, file: Path) -> tuple[float, float]:
        """Mean and standard error of the KL divergence from the original; the file goes."""
        said = self.programs.bitmill(
            "eval", file, "--reference", self.args.model, "--text", self.args.text, "--window", CONTEXT, "--windows",
            self.args.windows, "--json",
        )  # fmt: skip
        file.unlink()
        kl = json.loads(said)["divergence"]["kl"]
        return kl["mean"], kl["error"]

    def theirs(self, name: str, mixture: bool, data: bool) -> tuple[float, float]:
        """llama-quantize's file."""
        file = self.work / "theirs.gguf"
        ends = [] if mixture else ["--pure", "--token-embedding-type", "f16", "--output-tensor-type", "f16"]
        imatrix = ["--imatrix", self.imatrix] if data else []
        self.programs.run("llama-quantize", *ends, *imatrix, self.dense, file, NAMES.get(name, name).upper(), self.args.threads)
        self.kinds = types(file)
        return self.kl(file)

    def ours(self, name: str, mixture: bool, data: bool) -> tuple[float, float]:
        """bitmill's file, with error feedback where there is text."""
        file = self.work / "ours.gguf"
        text = ["--calibration", self.args.calibration] if data else ["--written", "1"] if self.args.written else None
        how = ["--method", "gptq", *text, "--samples", self.args.samples] if text else ["--method", "rtn"]
        self.programs.bitmill(
            "quantize", self.args.model, "-o", file, "--force", "--mix" if mixture else "--scheme", name, *how, "--sequence-length", CONTEXT
        )
        kinds = types(file)
        differ = [n for n in kinds if kinds[n] != self.kinds.get(n)]
        if differ:
            raise RuntimeError(f"{name}: {differ[0]} is {kinds[differ[0]]} here and {self.kinds.get(differ[0])} there")
        return self.kl(file)


def main() -> None:
    """Prints a row for each type and mixture, with and without calibration data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("bitmill", "llama", "model", "text", "calibration", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=60)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--types", nargs="*", default=TYPES)
    parser.add_argument("--mixes", nargs="*", default=MIXES)
    parser.add_argument("--without-data", action="store_true", help="round without calibration text on both sides")
    parser.add_argument("--written", action="store_true", help="with --without-data: bitmill calibrates on text by the model itself")
    args = parser.parse_args()
    meter, data = Meter(args), not args.without_data
    print("| file | ours | llama-quantize | ratio |\n| --- | --- | --- | --- |")
    for mixture, names in ((False, args.types), (True, args.mixes)):
        for name in names:
            try:
                (theirs, their_error), (ours, our_error) = meter.theirs(name, mixture, data), meter.ours(name, mixture, data)
            except RuntimeError as error:
                print(f"| {name} | {str(error).strip().splitlines()[-1][:120]} | | |", flush=True)
                continue
            title = f"{name} (mix)" if mixture else name
            print(f"| {title} | {ours:.5f} ± {our_error:.5f} | {theirs:.5f} ± {their_error:.5f} | {ours / theirs:.2f} |", flush=True)


if __name__ == "__main__":
    main()
