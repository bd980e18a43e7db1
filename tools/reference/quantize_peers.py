"""Quantizes a model by GPTQ with 4 bits in groups of 128 with another program, as `cargo xtask bench quantize` asks for it.

Prints a line of JSON: `seconds` of quantizing, `whole` with loading and saving (not with importing packages), and `peak_memory` in
bytes. Windows follow one another in the text; each is BOS and tokens, or tokens alone where the tokenizer has no BOS.
"""

import argparse
import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

GROUP = 128


def windows(tokenizer, text: Path, samples: int, length: int) -> list[list[int]]:
    """Token ids of the windows."""
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    step = length - len(begin)
    if len(ids) < samples * step:
        raise SystemExit(
            f"{text} has {len(ids)} tokens, and {samples} windows of {length} need {samples * step}: take a longer text or fewer windows"
        )
    return [begin + ids[i * step : (i + 1) * step] for i in range(samples)]


def gptqmodel(args: argparse.Namespace) -> tuple[Callable, Callable, Callable]:
    """Loading, quantizing and saving by GPTQModel."""
    # It wants two workers, and does not take so many by itself on two cores.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    def load():
        config = QuantizeConfig(bits=4, group_size=GROUP, sym=True, desc_act=False)
        return GPTQModel.load(str(args.model), config, device="cpu", backend=BACKEND.GPTQ_TORCH)

    def quantize(model, tokenizer, data) -> None:
        model.quantize([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in data], batch_size=8)

    def save(model, tokenizer) -> None:
        model.save(str(args.out))

    return load, quantize, save


def llm_compressor(args: argparse.Namespace) -> tuple[Callable, Callable, Callable]:
    """The same by llm-compressor."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from transformers import AutoModelForCausalLM

    def load():
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)

    def quantize(model, tokenizer, data) -> None:
        oneshot(
            model=model,
            dataset=Dataset.from_dict({"input_ids": data, "attention_mask": [[1] * len(ids) for ids in data]}),
            recipe=GPTQModifier(scheme="W4A16", targets="Linear", ignore=["lm_head"]),
            max_seq_length=args.sequence_length,
            num_calibration_samples=args.samples,
            batch_size=1,
            tokenizer=tokenizer,
        )

    def save(model, tokenizer) -> None:
        model.save_pretrained(args.out, save_compressed=True)
        tokenizer.save_pretrained(args.out)

    return load, quantize, save


PEERS = {"gptqmodel": gptqmodel, "llm-compressor": llm_compressor}


def main() -> None:
    """Quantizes once and prints what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=PEERS, required=True)
    parser.add_argument("--model", type=Path, required=True, help="unquantized model folder")
    parser.add_argument("--calibration", type=Path, required=True, help="text to calibrate on")
    parser.add_argument("--samples", type=int, default=128, help="windows of it")
    parser.add_argument("--sequence-length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder to save to")
    args = parser.parse_args()
    # What the programs say goes elsewhere than the answer.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch
    from transformers import AutoTokenizer

    torch.set_num_threads(args.threads)
    load, quantize, save = PEERS[args.peer](args)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = windows(tokenizer, args.calibration, args.samples, args.sequence_length)
    begin = time.perf_counter()
    model = load()
    loaded = time.perf_counter()
    quantize(model, tokenizer, data)
    quantized = time.perf_counter()
    if args.out:
        save(model, tokenizer)
    whole = time.perf_counter() - begin
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": quantized - loaded, "whole": whole, "peak_memory": memory}), file=answer, flush=True)


if __name__ == "__main__":
    main()
