"""Do other tools read our folders as we do? Quantizes, evaluates, loads with the peers, and compares logits.

For every case of cases.py this runs `bitmill quantize` and `bitmill eval --logits`, loads the folder with transformers and
compressed-tensors or with GPTQModel (peers.py), and asks for logits within 1e-3 of ours on the same token ids, in f32.

A comparison that cannot fail proves nothing, so every case also shows that
* the peer really holds the stored codes, bit for bit, and what it makes of them equals their definition, bit for bit;
* its logits are far from those of the unquantized model;
* one flipped bit of one code in a copy of the folder moves its logits beyond the tolerance (the negative control).

Rounding activations is chaotic: a difference of 1e-7 decides ties, and with int8 the largest of a token lies on one by
construction, so that the peer disagrees with itself between two attention implementations by more than a tenth. Such a folder is
held to the tolerance on a copy without `input_activations`; as stored, its first block alone is compared, where few roundings have a
part yet: the change that rounding makes to our logits must be the change it makes to the peer's.

Encoders of images are compared by hidden states: the golden ViT of the tests, whose first hidden state `bitmill eval --embeddings`
writes with length 1.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import meter
import peers
from cases import IMAGES, Case, table

TOLERANCE = 1e-3
"""Largest difference of two logits, f32 against f32."""
FIRST_CORRELATION = 0.85
"""Of the changes that rounding makes to both sides' logits after the first block. Floats reach 0.90 and more (1.000 where no number of
the text lies on a tie), int8 0.96; under scales that are amax/127 or amax/128 in the place of amax/127.5 it would be 0.77 to 0.81."""
IMAGE_TOLERANCE = 1e-5
"""Largest difference of two entries of an embedding of length 1."""
VIT = Path(__file__).resolve().parents[2] / "crates/models/tests/golden/vit"
PEERS = ("torch", "transformers", "compressed-tensors", "gptqmodel", "bitsandbytes")


@dataclass
class Outcome:
    """What a case showed. Differences are the largest over all logits."""

    case: str
    command: str
    difference: float = float("nan")
    from_dense: float = float("nan")
    control: float = float("nan")
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def expect(self, fact: bool, problem: str) -> None:
        """Records a problem unless the fact holds."""
        if not fact:
            self.problems.append(problem)


@dataclass
class Bench:
    """What all cases share: the binary, the model and what it computes unquantized."""

    bitmill: Path
    model: Path
    text: Path
    work: Path
    windows: int
    window: int

    def __post_init__(self) -> None:
        self.log = self.work / "peers.log"
        self.original = peers.stored(self.model)
        ends = ("embed_tokens.weight", "lm_head.weight", ".gate.weight")
        self.linears = {n[:-7] for n, t in self.original.items() if n.endswith(".weight") and t.ndim == 2 and not n.endswith(ends)}
        self.input_ids = meter.windows(self.model, self.text, self.windows, self.window)
        with peers.quiet(self.log):
            self.dense = peers.logits(peers.load(self.model), self.input_ids)

    def run(self, *arguments: str) -> None:
        """One call of the binary; its last words become the error."""
        done = subprocess.run([str(self.bitmill), *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"bitmill {' '.join(arguments)} → {done.returncode}: {done.stderr.strip()[-400:]}")

    def ours(self, folder: Path) -> torch.Tensor:
        """Our logits of the folder, on the token ids the protocol asks for."""
        file = self.work / "logits.safetensors"
        windows = ["--window", str(self.window), "--windows", str(self.windows)]
        self.run("eval", str(folder), "--text", str(self.text), *windows, "--logits", str(file))
        got = load_file(file)
        file.unlink()
        if not torch.equal(got["input_ids"], self.input_ids):
            raise ValueError("bitmill's windows are not those of the protocol: tokenizer or start positions differ")
        if "logits" in got:
            return got["logits"]
        return torch.stack([got[f"logits.{i}"] for i in range(self.windows)])  # one tensor per window


def installed(name: str) -> str | None:
    """The version of a package; a part of the cases runs without some of them."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def farthest(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference; infinite when either holds a NaN."""
    return (a - b).abs().nan_to_num(nan=float("inf")).max().item()


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Cosine of the angle between two sets of changes."""
    return torch.nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0).item()


def peer_logits(bench: Bench, folder: Path, case: Case, outcome: Outcome) -> torch.Tensor:
    """The peer's logits, after evidence that it holds the stored codes and reads them as defined."""
    tensors, config = peers.stored(folder), peers.quantization_config(folder)
    quantized = peers.modules(tensors)
    expected = {"int-quantized": "naive-quantized", "gptq_v2": "gptq"}.get(case.format, case.format)
    outcome.expect(set(quantized) == bench.linears, f"{len(quantized)} of {len(bench.linears)} linears are quantized")
    several = case.format == "mixed-precision"
    found = set(quantized.values())
    outcome.expect(len(found) > 1 if several else found == {expected}, f"stored as {found}")
    meaning = {m: peers.definition(tensors, m, config) for m in quantized}
    changed = all(not torch.equal(w, bench.original[f"{m}.weight"].float()) for m, w in meaning.items())
    outcome.expect(changed, "a quantized linear equals the original")
    if expected == "gptq":
        model, half = peers.load_gptq(folder)
        exact = all(torch.equal(half[m], w.half()) for m, w in meaning.items())
        outcome.expect(exact, "GPTQModel's f16 weights are not the definition rounded to f16")
    elif case.format in ("bitsandbytes", "awq", "modelopt", "fp8"):
        model = peers.load(folder)
    elif peers.has_experts(tensors):
        model = peers.load_compressed_tensors(folder, dequantize=True)
    else:
        model = peers.load_compressed_tensors(folder)
        kinds = {m: "weight_packed" if f"{m}.weight_packed" in tensors else "weight" for m in quantized}
        held = {f"{m}.{kind}": model.get_submodule(m).get_parameter(kind) for m, kind in kinds.items()}
        holds = all(torch.equal(t.view(torch.uint8), tensors[name].view(torch.uint8)) for name, t in held.items())
        outcome.expect(holds, "transformers does not hold the stored codes")
    result = peers.logits(model, bench.input_ids)
    exact = all(torch.equal(peers.parameter(model, m), w) for m, w in meaning.items())
    outcome.expect(exact, "the peer's f32 weights are not the definition")
    if case.format == "pack-quantized" and "--asymmetric" in case.options:
        stock = peers.load_compressed_tensors(folder, dequantize=True)
        rounded = {m: w.to(tensors[f"{m}.weight_scale"].dtype).float() for m, w in meaning.items()}
        exact = all(torch.equal(stock.get_submodule(m).weight, w) for m, w in rounded.items())
        outcome.expect(exact, "transformers' dequantize=True weights are not the definition rounded to the scale's type")
    return result


def rounded_alike(pairs: list[tuple[torch.Tensor, torch.Tensor]], outcome: Outcome) -> None:
    """Compares what rounding changes in our logits and in the peer's; the pairs are both with and without rounding."""
    (ours, theirs), (our_plain, their_plain) = pairs
    first = correlation(ours - our_plain, theirs - their_plain)
    words = f"rounded activations: correlation {first:.3f} after a block"
    outcome.notes.append(words)
    outcome.expect(first >= FIRST_CORRELATION, f"activations are rounded differently ({words})")


def strip_rounding(bench: Bench, folder: Path, case: Case, outcome: Outcome) -> None:
    """Judges the folder as stored; afterwards its config no longer asks for rounded activations."""

    def first_block() -> tuple[torch.Tensor, torch.Tensor]:
        first = peers.first_block(folder, bench.work / "first")
        return bench.ours(first), peers.logits(peers.load_compressed_tensors(first), bench.input_ids)

    peer_logits(bench, folder, case, outcome)
    rounded = first_block()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = None
    for group in config["quantization_config"]["config_groups"].values():
        group["input_activations"] = None
        group["format"] = case.format
    (folder / "config.json").write_text(json.dumps(config))
    peers.without_calibration(folder)
    rounded_alike([rounded, first_block()], outcome)


def plain(bench: Bench, folder: Path) -> Path:
    """The folder's weights as plain numbers, by `bitmill dequantize`."""
    out = bench.work / "plain"
    shutil.rmtree(out, ignore_errors=True)
    bench.run("dequantize", str(folder), "-o", str(out), "--dtype", "f32")
    return out


def check(bench: Bench, case: Case) -> Outcome:
    """One case from quantization to verdict."""
    folder, control, converted = bench.work / "out", bench.work / "control", bench.work / "converted"
    for old in (folder, control, converted):
        shutil.rmtree(old, ignore_errors=True)
    arguments = ["quantize", str(bench.model), "-o", str(folder), "--force", *case.options.split(), *case.method.split()]
    outcome = Outcome(case.name, " ".join(["bitmill", *arguments]))
    start = time.monotonic()
    try:
        bench.run(*arguments)
        for step in case.by_way_of:
            shutil.rmtree(converted, ignore_errors=True)
            bench.run("convert", str(folder), str(converted), "--format", step)
            shutil.rmtree(folder)
            converted.rename(folder)
        with peers.quiet(bench.log):
            if case.rounds:
                strip_rounding(bench, folder, case, outcome)
            ours, theirs = bench.ours(plain(bench, folder) if case.plain else folder), peer_logits(bench, folder, case, outcome)
            flipped = peers.flip_code(folder, control)
            outcome.control = farthest(ours, peers.logits(peers.load(control), bench.input_ids))
        outcome.difference, outcome.from_dense = farthest(ours, theirs), farthest(ours, bench.dense)
        outcome.expect(outcome.difference <= TOLERANCE, f"logits differ by {outcome.difference:.1e}")
        outcome.expect(outcome.from_dense > 10 * TOLERANCE, "logits are those of the unquantized model")
        outcome.expect(outcome.control > TOLERANCE, f"a flipped bit in {flipped} went unnoticed")
    except Exception as error:  # one broken case must not hide the others
        outcome.problems.append(f"{type(error).__name__}: {error}")
    outcome.seconds = round(time.monotonic() - start, 1)
    return outcome


def check_images(bench: Bench, case: Case) -> Outcome:
    """The same for an encoder of images, by what it makes of the golden file's and of random ones."""
    folder, control, images = bench.work / "out", bench.work / "control", bench.work / "images.safetensors"
    for old in (folder, control):
        shutil.rmtree(old, ignore_errors=True)
    pixels = torch.cat([load_file(VIT / "golden.safetensors")["pixel_values"], torch.randn((6, 3, 16, 16), generator=torch.Generator().manual_seed(1))])
    save_file({"pixel_values": pixels}, images)
    arguments = ["quantize", str(VIT), "-o", str(folder), "--force", *case.options.split(), *case.method.split()]
    arguments += ["--calibration", str(images)]
    outcome = Outcome(case.name, " ".join(["bitmill", *arguments]))
    start = time.monotonic()

    def ours(of: Path) -> torch.Tensor:
        file = bench.work / "embeddings.safetensors"
        bench.run("eval", str(of), "--images", str(images), "--embeddings", str(file))
        return load_file(file)["embeddings"]

    def theirs(model: torch.nn.Module) -> torch.Tensor:
        return torch.nn.functional.normalize(peers.image_states(model, pixels)[:, 0], dim=1)

    try:
        bench.run(*arguments)
        tensors, config = peers.stored(folder), peers.quantization_config(folder)
        quantized = peers.modules(tensors)
        outcome.expect(len(quantized) == 12 and set(quantized.values()) == {case.format}, f"stored: {quantized}")
        with peers.quiet(bench.log):
            dense, model = theirs(peers.load(VIT)), peers.load_compressed_tensors(folder)
            own = ours(folder)
            outcome.difference, outcome.from_dense = farthest(own, theirs(model)), farthest(own, dense)
            exact = [torch.equal(model.get_submodule(peers.image_module(m)).weight, peers.definition(tensors, m, config)) for m in quantized]
            outcome.expect(all(exact), "the peer's f32 weights are not the definition")
            flipped = peers.flip_code(folder, control)
            outcome.control = farthest(own, theirs(peers.load(control)))
        outcome.expect(farthest(ours(VIT), dense) <= IMAGE_TOLERANCE, "unquantized embeddings differ")
        outcome.expect(outcome.difference <= IMAGE_TOLERANCE, f"embeddings differ by {outcome.difference:.1e}")
        outcome.expect(outcome.from_dense > 10 * IMAGE_TOLERANCE, "embeddings are those of the unquantized model")
        outcome.expect(outcome.control > 10 * IMAGE_TOLERANCE, f"a flipped bit in {flipped} went unnoticed")
    except Exception as error:  # one broken case must not hide the others
        outcome.problems.append(f"{type(error).__name__}: {error}")
    outcome.seconds = round(time.monotonic() - start, 1)
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bitmill", type=Path, required=True, help="the binary")
    parser.add_argument("--model", type=Path, required=True, help="unquantized folder")
    parser.add_argument("--text", type=Path, required=True, help="text whose first windows are compared")
    parser.add_argument("--work", type=Path, required=True, help="scratch folder; conformance.json and peers.log stay")
    parser.add_argument("--cases", default="", help="regular expression: only cases whose name it finds")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--window", type=int, default=512)
    arguments = parser.parse_args()
    every = [(check, case) for case in table()] + [(check_images, case) for case in IMAGES]
    selected = [(judge, case) for judge, case in every if re.search(arguments.cases, case.name)]
    if not selected:
        parser.error(f"no case matches {arguments.cases!r}; cases: {', '.join(case.name for _, case in every)}")
    arguments.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments.bitmill.resolve(), arguments.model, arguments.text, arguments.work, arguments.windows, arguments.window)
    plain = farthest(bench.ours(bench.model), bench.dense)
    print(f"unquantized model: bitmill − transformers {plain:.1e}\n", flush=True)
    print(f"{'case':<28} {'bitmill−peer':>12} {'−unquantized':>12} {'−flipped bit':>12} {'s':>6}  verdict", flush=True)
    outcomes = []
    for judge, case in selected:
        outcome = judge(bench, case)
        outcomes.append(outcome)
        verdict = "; ".join(["FAIL", *outcome.problems] if outcome.problems else ["ok", *outcome.notes])
        row = f"{outcome.difference:>12.1e} {outcome.from_dense:>12.1e} {outcome.control:>12.1e} {outcome.seconds:>6}"
        print(f"{case.name:<28} {row}  {verdict}", flush=True)
    failed = sum(bool(outcome.problems) for outcome in outcomes)
    report = {
        "versions": {name: installed(name) for name in PEERS},
        "tolerance": TOLERANCE,
        "unquantized": plain,
        "failed": failed,
        "cases": [asdict(outcome) for outcome in outcomes],
    }
    (arguments.work / "conformance.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{len(outcomes) - failed} of {len(outcomes)} cases agree within {TOLERANCE}")
    return 1 if failed or plain > TOLERANCE else 0


if __name__ == "__main__":
    sys.exit(main())
