"""A small byte-level BPE, trained on the spot, as tokenizer.json and as GGUF metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors
from tokenizers import decoders as decode
from tokenizers.trainers import BpeTrainer

CORPUS = [
    "The quick brown fox doesn't jump over 1234567890 lazy dogs, they'll run.\n\n",
    "def add(left: int, right: int) -> int:\n    return left + right  # 42\n",
    "日本語の文章です。 カタカナもあります。 中文也有。 한국어도 있습니다.",
    "שלום עולם، مرحبا بالعالم، سلام دنیا",
    "naïve café, Ångström, déjà vu 😀 👩‍👩‍👧‍👦 🇫🇷",
] * 3
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
USER_DEFINED = ["<think>", "  indent  "]

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The patterns as the tokenizer.json files of Llama 3, Qwen2.5 and Qwen3.5 were published."""

BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
PUBLISHED: dict[str, list[pre_tokenizers.PreTokenizer]] = {
    "smollm": [pre_tokenizers.Digits(individual_digits=True), GPT2],
    "gpt-2": [GPT2],
    "default": [GPT2],
    "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), BYTE_LEVEL],
    "qwen2": [pre_tokenizers.Split(Regex(QWEN2), "isolated"), BYTE_LEVEL],
    "qwen35": [pre_tokenizers.Split(Regex(QWEN35), "isolated"), BYTE_LEVEL],
}


def trained(pre: str) -> tokenizers.Tokenizer:
    """Return a tokenizer that cuts text as the published one that *pre* names."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    if pre.startswith("qwen"):
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(PUBLISHED[pre])
    tokenizer.decoder = decode.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=640, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    tokenizer.add_tokens([AddedToken(s, special=False, normalized=False) for s in USER_DEFINED])
    return tokenizer


def with_bos(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Let *tokenizer* begin each plain text with its first special token."""
    bos = SPECIALS[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


def metadata_of(tokenizer: tokenizers.Tokenizer, rule: str, **more: Any) -> dict[str, Any]:
    """Return what a converter to GGUF would write; *more* are further keys, None leaves one out."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    kinds = dict.fromkeys(SPECIALS, 3) | dict.fromkeys(USER_DEFINED, 4)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    found = {
        "model": "gpt2",
        "pre": rule,
        "tokens": [token for token, _ in vocabulary],
        "token_type": [kinds.get(token, 1) for token, _ in vocabulary],
        "merges": [" ".join(pair) for pair in merges],
        "bos_token_id": tokenizer.token_to_id(SPECIALS[0]),
        "eos_token_id": tokenizer.token_to_id(SPECIALS[2]),
        **more,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in found.items() if value is not None}


TINY_LLAMA = {
    "llama.block_count": 2,
    "llama.context_length": 1024,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
}


def write_gguf(path: Path, metadata: dict[str, Any], architecture: str = "llama") -> Path:
    """Write a GGUF file with *metadata* and an embedding in float32, nothing else."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_string(key, value)
    rows = len(metadata.get("tokenizer.ggml.tokens", [])) or 32
    writer.add_tensor("token_embd.weight", np.zeros((rows, 64), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
