"""Tiny random checkpoints of the architectures that GGUF files are written of, with tokenizers trained on a text.

Weights are wide enough that logits depend on all of what distinguishes an architecture: windows, bounds, norms, rotary
bases. Each case names a plainer config under which the same weights must predict the text clearly otherwise, or a comparison
of the two programs would prove nothing.
"""

import io
import json
import shutil
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers.implementations import BertWordPieceTokenizer
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

PIECES = 960
"""Pieces of every vocabulary; embeddings have more rows."""
ROWS = 1024

BASE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": ROWS,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}
GEMMA = BASE | {
    "head_dim": 64,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
SECOND = GEMMA | {"query_pre_attn_scalar": 64, "sliding_window": 96}
PHI3 = BASE | {
    "model_type": "phi3",
    "architectures": ["Phi3ForCausalLM"],
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": PIECES,
    "pad_token_id": PIECES,
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 2048,
    "sliding_window": None,
}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0 + 0.02 * i for i in range(24)],
    "long_factor": [1.0 + 0.4 * i for i in range(24)],
}

CASES = {
    "gemma": ({"model_type": "gemma", "architectures": ["GemmaForCausalLM"], **GEMMA}, {"rope_theta": 500.0}),
    "gemma2": (
        {
            "model_type": "gemma2",
            "architectures": ["Gemma2ForCausalLM"],
            **SECOND,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 6.0,
        },
        {"sliding_window": 2048},
    ),
    "gemma3": (
        {
            "model_type": "gemma3_text",
            "architectures": ["Gemma3ForCausalLM"],
            **SECOND,
            "num_hidden_layers": 7,
            "sliding_window_pattern": 6,
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        {"rope_local_base_freq": 1000000.0},
    ),
    "gemma3-listed": (
        {
            "model_type": "gemma3_text",
            "architectures": ["Gemma3ForCausalLM"],
            **SECOND,
            "tie_word_embeddings": False,
            "sliding_window_pattern": 3,
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
            "final_logit_softcapping": 6.0,
        },
        {"sliding_window_pattern": 6},
    ),
    "phi3": (PHI3, {"rope_theta": 500.0}),
    "phi3-short": (
        PHI3 | {"partial_rotary_factor": 0.75, "rope_scaling": LONGROPE, "original_max_position_embeddings": 1024},
        {"rope_scaling": None},
    ),
    "phi3-long": (
        PHI3 | {"partial_rotary_factor": 0.75, "rope_scaling": LONGROPE, "original_max_position_embeddings": 256},
        {"original_max_position_embeddings": 1024},
    ),
    "phi3-bytes": (
        PHI3 | {"tie_word_embeddings": True, "partial_rotary_factor": 0.75, "bos_token_id": PIECES},
        {"partial_rotary_factor": 1.0},
    ),
    "bert": (
        {
            "model_type": "bert",
            "architectures": ["BertModel"],
            **{k: BASE[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")},
            "max_position_embeddings": 128,
            "type_vocab_size": 2,
            "layer_norm_eps": 1e-12,
            "hidden_act": "gelu",
            "pad_token_id": 0,
        },
        {"layer_norm_eps": 0.5},
    ),
}
"""Configs, and what makes them plainer."""

SEEDS = ["bert", "gemma", "gemma2", "gemma3", "phi3", "phi3-long", "phi3-short", "gemma3-listed", "phi3-bytes"]
"""Seeds are places in this list, so what is new comes last."""
WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Phi-4-mini cuts text into words, which llama.cpp calls gpt-4o."""
CONTROLS = {"gemma": ["<start_of_turn>", "<unused0>"], "phi3": ["<|endoftext|>", "<|user|>", "<|end|>"]}
BREAKS = ["\n\n", "▁▁", "<b>"]
"""What text is cut at in Gemma's vocabularies."""


def write(name: str, text: Path, out: Path) -> Path:
    """The folder of the case `name` under `out`."""
    config, _ = CASES[name]
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    if name == "bert":
        word_pieces(text, folder)
        model = AutoModel.from_config(AutoConfig.from_pretrained(folder))
    elif name == "phi3-bytes":
        byte_pairs(text, folder)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    else:
        sentence_pieces(text, folder, "gemma" if name.startswith("gemma") else "phi3")
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    generator = torch.Generator().manual_seed(SEEDS.index(name))
    state = {}
    for key, value in sorted(model.state_dict().items()):
        noise = torch.randn(value.shape, generator=generator)
        if "norm" in key.lower() and not key.endswith("bias"):
            value = (0.0 if name.startswith("gemma") else 1.0) + 0.2 * noise
        elif value.ndim == 1:
            value = 0.2 * noise
        else:
            # Gentle enough that rounded activations do not end in other texts; a tied embedding is also the output matrix.
            gain = 1.25 if "embed" not in key or name == "bert" else 0.08 * value.shape[-1] ** 0.5
            value = noise * (gain / value.shape[-1] ** 0.5)
        state[key] = value.contiguous()
    if config.get("tie_word_embeddings"):
        state.pop("lm_head.weight", None)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def sentence_pieces(text: Path, folder: Path, family: str) -> None:
    """`tokenizer.model`, the equal `tokenizer.json`, and what the family's folders say beside them."""
    gemma = family == "gemma"
    model = io.BytesIO()
    ids = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3} if gemma else {"unk_id": 0, "bos_id": 1, "eos_id": 2}
    names = {"pad_piece": "<pad>", "bos_piece": "<bos>", "eos_piece": "<eos>"} if gemma else {}
    lines = [line for line in text.read_text().splitlines() if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=PIECES,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=not gemma,
        user_defined_symbols=[*CONTROLS["gemma"], *BREAKS] if gemma else [],
        minloglevel=2,
        num_threads=1,
        **ids,
        **names,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    controls = [i for i in range(PIECES) if pieces.IsControl(i) or pieces.IsUnknown(i)]
    added = {i: (pieces.IdToPiece(i), True) for i in controls}
    if gemma:
        added |= {pieces.PieceToId(p): (p, p == "<start_of_turn>") for p in (*CONTROLS["gemma"], *BREAKS)}
    else:
        added |= {PIECES + i: (token, True) for i, token in enumerate(CONTROLS["phi3"])}
    tokenizer(pieces, added, gemma).save(str(folder / "tokenizer.json"))
    bos, eos = ("<bos>", "<eos>") if gemma else ("<s>", "<|endoftext|>")
    settings = {
        "tokenizer_class": "GemmaTokenizer" if gemma else "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": "<unk>",
        "pad_token": "<pad>" if gemma else "<|endoftext|>",
        "chat_template": "{{ messages }}",
        "added_tokens_decoder": {str(i): {"content": token, "special": special} for i, (token, special) in added.items()},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def tokenizer(pieces: sentencepiece.SentencePieceProcessor, added: dict[int, tuple[str, bool]], gemma: bool) -> Tokenizer:
    """The same vocabulary with merges: every split of a piece into two, ranked by the score of the piece."""
    vocab = {pieces.IdToPiece(i): i for i in range(PIECES)}
    merges = []
    for piece, i in vocab.items():
        if i in added or pieces.IsByte(i):
            continue
        for at in range(1, len(piece)):
            left, right = vocab.get(piece[:at]), vocab.get(piece[at:])
            if left is not None and right is not None and left not in added and right not in added:
                merges.append((-pieces.GetScore(i), left, right, (piece[:at], piece[at:])))
    merges = [merge for *_, merge in sorted(merges)]
    # What text is cut at is found before spaces are written otherwise.
    vocab = {token.replace("▁", " ") if i in added else token: i for token, i in vocab.items()}
    built = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    built.normalizer = replace if gemma else normalizers.Sequence([normalizers.Prepend("▁"), replace])
    built.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    for token, special in (added[i] for i in sorted(added)):
        entry = AddedToken(token.replace("▁", " "), special=special, normalized=False)
        built.add_special_tokens([entry]) if special else built.add_tokens([entry])
    bos = "<bos>" if gemma else "<s>"
    built.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, built.token_to_id(bos))]
    )
    return built


def byte_pairs(text: Path, folder: Path) -> None:
    """A byte-level `tokenizer.json`, as Phi-4-mini has it."""
    built = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    built.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=PIECES, initial_alphabet=alphabet, show_progress=False)
    built.train_from_iterator([text.read_text()], trainer)
    built.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROLS["phi3"]])
    built.post_processor = processors.ByteLevel(trim_offsets=False)
    built.decoder = decoders.ByteLevel()
    built.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": False}
    settings |= {f"{name}_token": "<|endoftext|>" for name in ("bos", "eos", "unk", "pad")}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def word_pieces(text: Path, folder: Path) -> None:
    """A WordPiece `tokenizer.json` and the files of sentence-transformers around it."""
    built = BertWordPieceTokenizer()
    lines = [line for line in text.read_text().splitlines() if line.strip()]
    built.train_from_iterator(lines, vocab_size=PIECES, min_frequency=2, show_progress=False)
    ids = [(token, built.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    built.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    built.save(str(folder / "tokenizer.json"))
    names = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]"}
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules) + "\n")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_cls_token": True}) + "\n")


def plainer(name: str, folder: Path) -> Path:
    """A copy of the folder under its plainer config."""
    out = folder.with_name(f"{name}-plainer")
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(folder, out)
    config, changes = CASES[name]
    (out / "config.json").write_text(json.dumps(config | changes, indent=1) + "\n")
    return out
