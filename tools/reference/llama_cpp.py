"""llama.cpp's programs, run as a user would run them, and what their files mean."""

import re
import subprocess
from enum import IntEnum
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from gguf.constants import GGML_QUANT_SIZES
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
OTHERS = {
    "phi3": {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    "bert": {
        "attn_q": "attention.self.query",
        "attn_k": "attention.self.key",
        "attn_v": "attention.self.value",
        "attn_output": "attention.output.dense",
        "ffn_up": "intermediate.dense",
        "ffn_down": "output.dense",
        "token_embd": "embeddings.word_embeddings",
    },
}
"""What architectures have otherwise, of their matrices."""


def hf_name(name: str, architecture: str = "llama") -> str:
    """The name that a model folder has for a tensor of a GGUF file."""
    module, _, end = name.rpartition(".")
    parts = (PARTS | ENDS) | OTHERS.get(architecture, {})
    if not module.startswith("blk."):
        return f"{parts[module]}.{end}"
    _, layer, part = module.split(".")
    return f"{'encoder.layer' if architecture == 'bert' else 'model.layers'}.{layer}.{parts[part]}.{end}"


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
        # The program may end before its log is written.
        for _ in range(20):
            said = self.run(
                "llama-perplexity", "-m", model, "-f", text, "-c", CONTEXT, "-b", CONTEXT, "--chunks", windows,
                "--check-tensors", "--kl-divergence-base", base, "-t", self.threads,
            )  # fmt: skip
            found = re.search(r"PPL = ([0-9.]+)", said)
            if found:
                return float(found.group(1))
        raise RuntimeError(f"llama-perplexity says nothing of {model}:\n{said[-3000:]}")


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


def base_log_probs(base: Path) -> np.ndarray:
    """Logarithms of probabilities `[positions, vocabulary]` that llama-perplexity stored, 16 bits each."""
    data = base.read_bytes()
    context, vocab, chunks = map(int, np.frombuffer(data, np.int32, 3, 8))
    width = 2 * ((vocab + 1) // 2) + 4
    rows = np.frombuffer(data, np.uint16, offset=20 + 4 * context * chunks).reshape(-1, width)
    scale, least = np.ascontiguousarray(rows[:, :4]).view(np.float32).T
    return rows[:, 4 : 4 + vocab] * scale[:, None].astype(np.float64) + least[:, None]


def second_half(logits: Path) -> tuple[np.ndarray, np.ndarray, float]:
    """Token ids, logarithms of probabilities and perplexity of what `bitmill eval --logits` wrote, over the positions
    llama-perplexity scores."""
    tensors = load_file(logits)
    ids, at, tables, losses = tensors["input_ids"], np.arange(CONTEXT // 2, CONTEXT - 1), [], []
    for window, tokens in enumerate(ids):
        rows = tensors[f"logits.{window}"][at].astype(np.float64)
        top = rows.max(axis=1)
        tables.append(rows - (top + np.log(np.exp(rows - top[:, None]).sum(axis=1)))[:, None])
        losses.append(-tables[-1][np.arange(len(at)), tokens[at + 1]])
    return ids, np.concatenate(tables), float(np.exp(np.mean(losses)))


def second_half_perplexity(logits: Path) -> tuple[np.ndarray, float]:
    """Token ids and perplexity alone."""
    ids, _, perplexity = second_half(logits)
    return ids, perplexity


def restored(name: str, values: np.ndarray, heads: int, kv_heads: int) -> np.ndarray:
    """The rows of a tensor of a `llama` file in a model folder's order."""
    for part, count in (("attn_q.", heads), ("attn_k.", kv_heads)):
        if part in name:
            pairs = values.reshape(count, len(values) // count // 2, 2, -1)
            return pairs.swapaxes(1, 2).reshape(values.shape)
    return values


LEVELS = {"Q1_0": (-1, 1), "Q2_0": (-1, 0, 1, 2)}
"""The level of each code, of one and of two bits, which lie beside each other from the low bits of byte 2 on: gguf-py does not read
these types."""


def blocks_to_values(data: np.ndarray, kind: IntEnum) -> np.ndarray:
    """What rows of blocks hold, in f32, by gguf-py where it can."""
    if kind.name not in LEVELS:
        return dequantize(data, kind).astype(np.float32)
    length, size = GGML_QUANT_SIZES[kind]
    blocks = data.reshape(-1, size)
    bits = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little").reshape(len(blocks), length, -1)
    codes = (bits << np.arange(bits.shape[-1])).sum(-1)
    levels = np.array(LEVELS[kind.name], np.float32)[codes]
    return (blocks[:, :2].copy().view(np.float16).astype(np.float32) * levels).reshape(len(data), -1)


def values(file: Path, heads: int, kv_heads: int) -> dict[str, np.ndarray]:
    """Every tensor as gguf-py reads it, in f32, under the names and in the row order of a model folder."""
    found = {}
    for tensor in GGUFReader(file).tensors:
        shape = [int(d) for d in reversed(tensor.shape)]
        numbers = blocks_to_values(tensor.data, tensor.tensor_type).reshape(shape)
        found[hf_name(tensor.name)] = restored(tensor.name, numbers, heads, kv_heads)
    return found


def types(file: Path) -> dict[str, str]:
    """The type of every tensor."""
    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file).tensors}
