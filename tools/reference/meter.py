"""Perplexity and KL divergence of a folder against a reference, measured by torch: the second opinion on `bitmill eval`.

The protocol is the one bitmill documents: the text is tokenized without special tokens; window i of N starts at token
i · ⌊(T − L) / N⌋ and is BOS followed by the next L − 1 tokens. KL divergence is KL(reference ‖ model) in nats, averaged
over every position after the first; top-1 is the share of those positions whose arg max agrees; perplexity is over every
token but BOS. Both models run in f32 through the peers' own loaders.
"""

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer

import peers


def windows(folder: Path, text: Path, count: int, length: int) -> torch.Tensor:
    """Token ids `[count, length]` of the protocol's windows."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    if len(tokens) < length:
        raise ValueError(f"{text} has {len(tokens)} tokens; one window needs {length}")
    bos = json.loads((folder / "config.json").read_text())["bos_token_id"]
    step = (len(tokens) - length) // count
    return torch.tensor([[bos, *tokens[i * step : i * step + length - 1]] for i in range(count)])


@dataclass
class Measure:
    """Means over all windows; `positions` is how many KL divergences were averaged."""

    perplexity: float
    reference_perplexity: float
    kl: float
    kl_p99: float
    top1: float
    positions: int


def measure(model: torch.nn.Module, reference: torch.nn.Module, input_ids: torch.Tensor) -> Measure:
    """Runs both models over the windows, one at a time, and keeps four numbers per position."""
    kl, agree, loss, reference_loss = [], [], [], []
    for window in input_ids:
        scores = peers.logits(model, window[None])[0].double().log_softmax(-1)
        expected = peers.logits(reference, window[None])[0].double().log_softmax(-1)
        kl.append((expected.exp() * (expected - scores)).sum(-1)[1:])
        agree.append((scores.argmax(-1) == expected.argmax(-1)).double()[1:])
        targets = window[1:, None]
        loss.append(-scores[:-1].gather(-1, targets)[:, 0])
        reference_loss.append(-expected[:-1].gather(-1, targets)[:, 0])
    divergence = torch.cat(kl)
    return Measure(
        perplexity=math.exp(torch.cat(loss).mean()),
        reference_perplexity=math.exp(torch.cat(reference_loss).mean()),
        kl=divergence.mean().item(),
        kl_p99=divergence.quantile(0.99).item(),
        top1=torch.cat(agree).mean().item(),
        positions=len(divergence),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True, help="full-precision folder")
    parser.add_argument("--model", type=Path, required=True, help="folder to judge, dense or quantized")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text")
    parser.add_argument("--windows", type=int, default=60)
    parser.add_argument("--window", type=int, default=512, help="tokens per window, BOS included")
    parser.add_argument("--log", type=Path, default=Path("/dev/null"), help="where the loaders' chatter goes")
    arguments = parser.parse_args()
    with peers.quiet(arguments.log):
        model, reference = peers.load(arguments.model), peers.load(arguments.reference)
        input_ids = windows(arguments.reference, arguments.text, arguments.windows, arguments.window)
        result = measure(model, reference, input_ids)
    print(json.dumps(asdict(result), indent=2))


if __name__ == "__main__":
    main()
