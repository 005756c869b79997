"""Time loads of random weights from files on this CPU, beside ``cat`` of the same files.

    way                   the files                  what is done with them
    bf16                  safetensors                read to where they stay
    Q4_0, Q4_K            a GGUF file                brought into tiles for the products
    q8_0 while loading    safetensors                quantised, and kept in a cache
    q8_0 kept             what was kept              read to where they stay

Each load is a process of its own, so that the memory is that of the load: its peak beyond the
weights. In every round each way is loaded once with the files in the page cache and, with --cold,
once without, right after cat has read the same files in the same state. Python's and torch's
start is not counted, that of the CPU kernels' library neither. --directory is where the files are
made and deleted again; it should be on the disk in question.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from processes import status_of
from safetensors.torch import save_file

from cortex.models.kernels import cpu
from cortex.models.weights import load_model

HIDDEN, MIDDLE, HEADS, VOCABULARY = 2048, 5632, 16, 32000
LAYER_PARAMETERS = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * MIDDLE
HEAD_PARAMETERS = VOCABULARY * HIDDEN
STORED = {"Q4_0": gguf.GGMLQuantizationType.Q4_0, "Q4_K": gguf.GGMLQuantizationType.Q4_K}


@dataclass(frozen=True, slots=True)
class Way:
    """One kind of load."""

    path: Path
    quant: str | None = None
    kept: Path | None = None
    is_first: bool = False
    """Whether what is kept has to be made anew."""

    @property
    def files(self) -> list[Path]:
        """What is read."""
        where = self.kept if self.kept and not self.is_first else self.path
        return [where] if where.is_file() else [file for file in where.rglob("*") if file.is_file()]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of the dense files (1)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each way is loaded (3)")
    parser.add_argument("--cold", action="store_true", help="also without the page cache")
    parser.add_argument("--directory", type=Path, help="where the files go (the temporary folder)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(load(**json.loads(asked.child))))
        return
    with tempfile.TemporaryDirectory(prefix="bench-load-", dir=asked.directory) as directory:
        ways = make_ways(Path(directory), int(asked.gigabytes * 1e9))
        rows = measure(ways, asked.rounds, has_cold=asked.cold)
    print(json.dumps(rows, indent=2) if asked.json else "\n".join(table(rows)))


def make_ways(directory: Path, dense_bytes: int) -> dict[str, Way]:
    """Write the files below *directory*, and return the ways to load them."""
    layers = max(1, round((dense_bytes / 2 - HEAD_PARAMETERS) / LAYER_PARAMETERS))
    dense, kept = directory / "dense", directory / "kept"
    write_safetensors(dense, layers)
    for kind in STORED:
        write_gguf(directory / f"{kind}.gguf", layers, kind)
    return {
        "bf16": Way(dense),
        **{kind: Way(directory / f"{kind}.gguf") for kind in STORED},
        "q8_0 while loading": Way(dense, "q8_0", kept, is_first=True),
        "q8_0 kept": Way(dense, "q8_0", kept),
    }


def measure(ways: Mapping[str, Way], rounds: int, *, has_cold: bool) -> dict[str, dict[str, float]]:
    """Return for each way the medians of its rounds, by the name of the state of the cache."""
    seen: dict[str, list[dict[str, float]]] = {}
    for _ in range(rounds):
        for name, way in ways.items():
            for state in ("warm", "cold") if has_cold else ("warm",):
                seen.setdefault(f"{name}, {state}", []).append(_once(way, state))
    return {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for name, runs in seen.items()
    }


def _once(way: Way, state: str) -> dict[str, float]:
    if way.is_first and way.kept:
        for file in way.kept.rglob("*"):
            file.unlink()
    _bring(way.files, state)
    began = time.perf_counter()
    subprocess.run(["cat", *way.files], stdout=subprocess.DEVNULL, check=True)
    cat_seconds = time.perf_counter() - began
    _bring(way.files, state)
    told = {"path": str(way.path), "quant": way.quant, "kept": way.kept and str(way.kept)}
    child = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(told)],
        stdout=subprocess.PIPE,
        check=True,
    )
    answer: dict[str, float] = json.loads(child.stdout)
    return {**answer, "cat_seconds": cat_seconds, "ratio": answer["seconds"] / cat_seconds}


def _bring(files: Sequence[Path], state: str) -> None:
    """Have *files* in the page cache, or out of it."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            if state == "cold":
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while os.read(descriptor, 1 << 24):
                    pass
        finally:
            os.close(descriptor)


def load(path: str, quant: str | None, kept: str | None) -> dict[str, float]:
    """Load once, in this process; return seconds, the weights' bytes and the peak beyond them."""
    cpu.kernels()
    before = _anonymous_bytes()
    peak = before

    def look(_done: int, _total: int) -> None:
        nonlocal peak
        peak = max(peak, _anonymous_bytes())

    began = time.perf_counter()
    model = load_model(
        Path(path),
        device=torch.device("cpu"),
        dtype="auto",
        on_progress=look,
        quant=quant,
        cache_directory=Path(kept) if kept else None,
    )
    seconds = time.perf_counter() - began
    look(0, 0)
    return {
        "seconds": seconds,
        "weights_mb": model.weights_bytes / 1e6,
        "peak_beyond_mb": (peak - before - model.weights_bytes) / 1e6,
    }


def _anonymous_bytes() -> int:
    return int(status_of(os.getpid())["RssAnon"].split()[0]) * 1024


def tensors(layers: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a llama of *layers* layers, by the names of safetensors."""
    attention = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (HIDDEN, HIDDEN))
    mlp = {
        "gate_proj": (MIDDLE, HIDDEN),
        "up_proj": (MIDDLE, HIDDEN),
        "down_proj": (HIDDEN, MIDDLE),
    }
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in range(layers):
        inside = f"model.layers.{layer}"
        found |= {f"{inside}.self_attn.{name}.weight": shape for name, shape in attention.items()}
        found |= {f"{inside}.mlp.{name}.weight": shape for name, shape in mlp.items()}
        found |= {
            f"{inside}.{name}.weight": (HIDDEN,)
            for name in ("input_layernorm", "post_attention_layernorm")
        }
    return found


def write_safetensors(directory: Path, layers: int) -> None:
    """Write a tied llama in bfloat16."""
    directory.mkdir()
    config = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": MIDDLE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    }
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = {
        name: torch.randn(shape, dtype=torch.bfloat16) * 0.02
        for name, shape in tensors(layers).items()
    }
    save_file(weights, directory / "model.safetensors")


def write_gguf(path: Path, layers: int, kind: str) -> None:
    """Write the same llama with random blocks of *kind*."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(2048)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MIDDLE)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    random = np.random.default_rng(7)
    for name, shape in tensors(layers).items():
        short = names.get_name(name, try_suffixes=(".weight",))
        assert short is not None, f"{name} is no llama's"
        if len(shape) == 1:
            writer.add_tensor(short, np.ones(shape, np.float32))
            continue
        elements, size = gguf.GGML_QUANT_SIZES[STORED[kind]]
        blocks = random.integers(0, 60, (shape[0], shape[1] // elements * size), np.uint8)
        writer.add_tensor(short, blocks, raw_dtype=STORED[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def table(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return *rows* as Markdown."""
    lines = ["| | weights, MB | s | cat, s | load / cat | peak beyond the weights, MB |"]
    lines.append("|---|---|---|---|---|---|")
    lines += [
        f"| {name} | {row['weights_mb']:,.0f} | {row['seconds']:.2f} | {row['cat_seconds']:.2f} "
        f"| {row['ratio']:.2f} | {row['peak_beyond_mb']:.0f} |"
        for name, row in rows.items()
    ]
    return lines


if __name__ == "__main__":
    main()
