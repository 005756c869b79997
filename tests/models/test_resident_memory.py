"""A loaded model takes the memory that its checkpoint's formats say, and gives it back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import save_file

from cortex.models.checkpoints.tensors import QUANTS
from cortex.models.quantization import row_bytes

CHILD = Path(__file__).resolve().parents[1] / "resident_child.py"
HIDDEN, MIDDLE, VOCABULARY = 1024, 3072, 256
MATRICES = {
    "self_attn.q_proj": ("attn_q", HIDDEN, HIDDEN),
    "self_attn.k_proj": ("attn_k", HIDDEN, HIDDEN),
    "self_attn.v_proj": ("attn_v", HIDDEN, HIDDEN),
    "self_attn.o_proj": ("attn_output", HIDDEN, HIDDEN),
    "mlp.gate_proj": ("ffn_gate", MIDDLE, HIDDEN),
    "mlp.up_proj": ("ffn_up", MIDDLE, HIDDEN),
    "mlp.down_proj": ("ffn_down", HIDDEN, MIDDLE),
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
STORED = {"BF16": 1, "F16": 1, "Q8_0": 2, "Q5_1": 3, "Q4_0": 4, "IQ4_NL": 4, "Q6_K": 3, "Q4_K": 4}
"""How many layers of each type are some 30 MB."""
IN_SITU = {"q8_0": 2, "q4_0": 4, "fp8": 2}


def weights_bytes(kind: str, layers: int) -> int:
    matrices = sum(rows * row_bytes(kind, columns) for _, rows, columns in MATRICES.values())
    norms = (2 * layers + 1) * HIDDEN * 4
    return layers * matrices + norms


def write_gguf(path: Path, kind: str, layers: int) -> int:
    """Write a llama whose weights are anything; return the bytes of its weights."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MIDDLE)
    writer.add_head_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    shapes = {f"blk.{n}.{name}": shape for n in range(layers) for name, *shape in MATRICES.values()}
    for name, (rows, columns) in {"token_embd": (VOCABULARY, HIDDEN), **shapes}.items():
        data = torch.randint(0, 60, (rows, row_bytes(kind, columns)), dtype=torch.uint8).numpy()
        writer.add_tensor(f"{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType[kind])
    for name in (
        "output_norm",
        *(f"blk.{n}.{norm}" for n in range(layers) for norm in NORMS.values()),
    ):
        writer.add_tensor(f"{name}.weight", torch.ones(HIDDEN).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights_bytes(kind, layers) + VOCABULARY * row_bytes(kind, HIDDEN)


def save_dense(directory: Path, layers: int) -> None:
    """Save a llama with tied embeddings in bfloat16."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": MIDDLE,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    tensors: dict[str, Any] = {"model.embed_tokens.weight": torch.randn(VOCABULARY, HIDDEN)}
    for layer in range(layers):
        for name, (_, rows, columns) in MATRICES.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.randn(rows, columns)
        for name in NORMS:
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.ones(HIDDEN)
    tensors["model.norm.weight"] = torch.ones(HIDDEN)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    save_file({k: t.bfloat16() for k, t in tensors.items()}, directory / "model.safetensors")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """What every format takes, and what it should."""
    place = tmp_path_factory.mktemp("models")
    names, expected = {}, {}
    for kind, layers in STORED.items():
        names[kind] = f"{place / kind}.gguf"
        expected[kind] = write_gguf(Path(names[kind]), kind, layers)
    for layers in set(IN_SITU.values()):
        save_dense(place / f"dense-{layers}", layers)
    for quant, layers in IN_SITU.items():
        names[quant] = f"{place / f'dense-{layers}'}:{quant}"
        expected[quant] = weights_bytes(QUANTS[quant], layers) + VOCABULARY * HIDDEN * 2
    ended = subprocess.run(
        [sys.executable, str(CHILD), *names.values()], capture_output=True, text=True, check=True
    )
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    return {
        name: {**line, "expected": expected[name]} for name, line in zip(names, lines, strict=True)
    }


@pytest.mark.parametrize("name", [*STORED, *IN_SITU])
def test_resident_bytes_are_those_of_the_format(rows: dict[str, dict[str, int]], name: str) -> None:
    row = rows[name]

    assert row["expected"] > 20 * 2**20
    assert row["loaded"] == pytest.approx(row["expected"], rel=0.05)
    assert row["weights"] == pytest.approx(row["expected"], rel=0.01)


@pytest.mark.parametrize("name", [*STORED, *IN_SITU])
def test_what_was_unloaded_is_given_back(rows: dict[str, dict[str, int]], name: str) -> None:
    assert abs(rows[name]["left"]) < 0.05 * rows[name]["expected"]
