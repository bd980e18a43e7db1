"""llama.cpp's programs, run as a user would run them, and what their files mean."""

import re
import subprocess
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.numpy import load_file
from tokenizers import Tokenizer

CONTEXT = 512
"""Tokens of a window, BOS included, on both sides."""

PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def hf_name(name: str) -> str:
    """The name that a model folder has for a tensor of a GGUF file."""
    module, _, end = name.rpartition(".")
    if module in ENDS:
        return f"{ENDS[module]}.{end}"
    _, layer, part = module.split(".")
    return f"model.layers.{layer}.{PARTS[part]}.{end}"


class Programs:
    """The folder of llama.cpp's binaries, and bitmill."""

    def __init__(self, llama: Path, bitmill: Path, threads: int) -> None:
        self.llama, self.bitmill_file, self.threads = llama, bitmill, threads

    def run(self, program: str, *arguments: object, check: bool = True) -> str:
        """Runs a program of llama.cpp and returns what it printed."""
        done = subprocess.run(
            [self.llama / program, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if check and done.returncode != 0:
            raise RuntimeError(f"{program} {' '.join(map(str, arguments))} failed:\n{done.stdout[-3000:]}")
        return done.stdout

    def bitmill(self, *arguments: object) -> str:
        """Runs bitmill and returns its standard output."""
        done = subprocess.run([self.bitmill_file, *map(str, arguments)], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"bitmill {' '.join(map(str, arguments))}: {done.stderr.strip()[-2000:]}")
        return done.stdout

    def perplexity(self, model: Path, text: Path, windows: int, base: Path) -> float:
        """Perplexity over the second halves of the windows; tensors are checked while loading, and what it saw goes to `base`."""
        said = self.run(
            "llama-perplexity", "-m", model, "-f", text, "-c", CONTEXT, "-b", CONTEXT, "--chunks", windows,
            "--check-tensors", "--kl-divergence-base", base, "-t", self.threads,
        )
        return float(re.search(r"PPL = ([0-9.]+)", said).group(1))


def slice_for(model: Path, text: Path, windows: int, to: Path) -> None:
    """Writes the beginning of `text` that both programs cut into the same `windows` windows.

    llama-perplexity takes 512 tokens after 512 tokens and puts BOS in the place of the first; bitmill's windows are BOS and 511
    tokens and start ⌊(T − 512)/N⌋ apart, which is 512 where N + 1 windows and less than N tokens more are there.
    """
    tokenizer, whole = Tokenizer.from_file(str(model / "tokenizer.json")), text.read_text()

    def count(length: int) -> int:
        return len(tokenizer.encode(whole[:length], add_special_tokens=False).ids)

    least = CONTEXT * (windows + 1)
    low, high = least, len(whole)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if count(middle) >= least else (middle + 1, high)
    if not least <= count(low) < least + windows:
        raise ValueError(f"{text} is too short for {windows} windows")
    to.write_text(whole[:low])


def base_tokens(base: Path) -> np.ndarray:
    """Token ids `[windows, 512]` that llama-perplexity saw, BOS not yet put in."""
    data = base.read_bytes()
    if data[:8] != b"_logits_":
        raise ValueError(f"{base} is not a file of logits")
    context, _, chunks = np.frombuffer(data, np.int32, 3, 8)
    return np.frombuffer(data, np.int32, context * chunks, 20).reshape(chunks, context)


def second_half_perplexity(logits: Path) -> tuple[np.ndarray, float]:
    """Token ids and perplexity of what `bitmill eval --logits` wrote, over the positions llama-perplexity scores."""
    tensors = load_file(logits)
    ids = tensors["input_ids"]
    losses = []
    for window, tokens in enumerate(ids):
        at = np.arange(CONTEXT // 2, CONTEXT - 1)
        rows = tensors[f"logits.{window}"][at].astype(np.float64)
        top = rows.max(axis=1)
        losses.append(top + np.log(np.exp(rows - top[:, None]).sum(axis=1)) - rows[np.arange(len(at)), tokens[at + 1]])
    return ids, float(np.exp(np.mean(losses)))


def restored(name: str, values: np.ndarray, heads: int, kv_heads: int) -> np.ndarray:
    """The rows of a tensor of a `llama` file in a model folder's order."""
    for part, count in (("attn_q.", heads), ("attn_k.", kv_heads)):
        if part in name:
            pairs = values.reshape(count, len(values) // count // 2, 2, -1)
            return pairs.swapaxes(1, 2).reshape(values.shape)
    return values


def values(file: Path, heads: int, kv_heads: int) -> dict[str, np.ndarray]:
    """Every tensor as gguf-py reads it, in f32, under the names and in the row order of a model folder."""
    found = {}
    for tensor in GGUFReader(file).tensors:
        shape = [int(d) for d in reversed(tensor.shape)]
        numbers = dequantize(tensor.data, tensor.tensor_type).reshape(shape).astype(np.float32)
        found[hf_name(tensor.name)] = restored(tensor.name, numbers, heads, kv_heads)
    return found


def types(file: Path) -> dict[str, str]:
    """The type of every tensor."""
    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file).tensors}
