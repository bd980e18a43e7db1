"""Folders that transformers does not read, brought into a format that it does by compressed-tensors' own converters.

The library ships them for models of AutoAWQ and ModelOpt: what they make of our tensors is a reading of these formats that is not
ours.
"""

import json
import shutil
from pathlib import Path

from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter, Converter, ModelOptNvfp4Converter
from safetensors.torch import load_file, save_file


def converter(quantization: dict) -> Converter:
    """The library's converter for a `quantization_config`."""
    if quantization["quant_method"] == "awq":
        return AutoAWQConverter.from_autoawq_config(quantization)
    return ModelOptNvfp4Converter(ignore=quantization["ignore"], targets=["re:.*_proj$"])


def to_compressed_tensors(folder: Path, out: Path) -> Path:
    """Writes the folder in the format of compressed-tensors; every tensor passes through the library's hands."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    config = json.loads((folder / "config.json").read_text())
    own = converter(config["quantization_config"])
    for shard in sorted(folder.glob("*.safetensors")):
        tensors = load_file(shard)
        own.validate(dict(tensors))
        made = {name: t.contiguous() for name, t in own.process(tensors).items()}
        # ModelOpt stores a number, and the library's files an array of one.
        made = {name: t.reshape(1) if name.endswith("global_scale") else t for name, t in made.items()}
        save_file(made, out / shard.name, metadata={"format": "pt"})
    quantization = json.loads(own.update_config(None).model_dump_json(exclude_none=True))
    for group in quantization["config_groups"].values():
        # Weights alone: the converter says of every model that it rounds inputs.
        group["input_activations"] = None
        group["targets"] = ["Linear"]
    config["quantization_config"] = quantization | {"quant_method": "compressed-tensors", "ignore": ["lm_head"]}
    (out / "config.json").write_text(json.dumps(config))
    for file in folder.glob("tokenizer*"):
        shutil.copy(file, out / file.name)
    return out
