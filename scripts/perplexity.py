"""Measure a GGUF model's perplexity on a fixed text, in each format its weights can be stored in.

The perplexity is e to the mean of -log p(token) over all tokens of the text but the first, as the
engine tells it with ``prompt_logprobs``, on this CPU. The file is measured as it is; then all of
its matrices are unpacked and stored anew, in a file of their own, in each format of 32-element
blocks and as float32, which loses nothing more. The model has to be on this machine already: the
quick start fetches the embedded one.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from perplexity_text import TEXT

from cortex.ipc.errors import Unloadable
from cortex.ipc.messages import Generate, SamplingParams
from cortex.ipc.node_api import EMBEDDED_MODEL
from cortex.ipc.ring import Flag
from cortex.models.checkpoints.errors import CheckpointError
from cortex.models.checkpoints.gguf import GGUFFile
from cortex.models.kernels.quantize import quantize
from cortex.models.loaded_model import LoadedModel
from cortex.models.weights import load_model
from cortex.runtime.config import NeuronConfig
from cortex.runtime.device.engine import Engine
from cortex.runtime.device.memory import Limits
from cortex.runtime.device.model_runner import BLOCK_TOKENS, ModelRunner
from cortex.runtime.device.scheduler import TOKEN_BUDGETS
from cortex.runtime.model_files import find
from cortex.runtime.tokenizer import Tokenizer

CPU = torch.device("cpu")
DENSE = "F32"
KINDS = (DENSE, "Q8_0", "Q5_1", "Q5_0", "Q4_1", "IQ4_NL", "Q4_0")
NEVER_QUANTISED = ("ssm_conv1d", "ffn_gate_inp")
"""Matrices that no converter quantises: convolutions, whose rows are too short, and routers."""
STATE_SLOTS = 2
"""Of a model with recurrent states: one for the text, and one more."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What one way to store a model's weights costs and gives."""

    weights_mib: float
    perplexity: float
    seconds: float


def log_probabilities(model: LoadedModel, token_ids: Sequence[int]) -> list[float]:
    """Return what the engine says of each token but the first, given those before it."""
    limit = len(token_ids) + 1
    blocks = -(-limit // BLOCK_TOKENS)
    slots = STATE_SLOTS if model.caches.state else 0
    cache = model.new_cache(blocks, BLOCK_TOKENS, slots)
    engine = Engine(
        "measured",
        ModelRunner(model, cache, CPU, max_sequences=1),
        Limits(limit, 1, blocks, workspace_bytes=0, state_slots=slots),
        token_budget=TOKEN_BUDGETS["cpu"],
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=0, seed=0, prompt_logprobs=0)
    engine.start(Generate(0, 0, "measured", list(token_ids), sampling))
    scores = []
    while engine.has_work:
        report = engine.step()
        assert not report.events, report.events
        scores += [record.logprob for record in report.records if record.flags & Flag.SCORE]
    return scores


def measure(path: Path, token_ids: Sequence[int], dtype: str = "auto") -> Measured:
    """Load the file at *path* as a device process would, and measure it."""
    model = load_model(path, device=CPU, dtype=dtype, on_progress=lambda *_: None)
    began = time.perf_counter()
    scores = log_probabilities(model, token_ids)
    seconds = time.perf_counter() - began
    return Measured(model.weights_bytes / 2**20, math.exp(-sum(scores) / len(scores)), seconds)


def requantised(path: Path, target: Path, kind: str) -> None:
    """Write the GGUF file at *path* to *target*, its matrices as *kind*."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in _metadata(reader):
        kinds = [*field.types, None]
        writer.add_key_value(
            name, field.contents(), kinds[0], kinds[-2] if len(kinds) > 2 else None
        )
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        is_vector = values.ndim == 1 or any(name in tensor.name for name in NEVER_QUANTISED)
        if kind == DENSE or is_vector:
            writer.add_tensor(tensor.name, np.ascontiguousarray(values, dtype=np.float32))
        else:
            rows = torch.from_numpy(values.reshape(-1, values.shape[-1]).copy())
            stored = quantize(kind, rows).view(*values.shape[:-1], -1)  # of experts, one by one
            raw = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(tensor.name, stored.numpy(), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _metadata(reader: gguf.GGUFReader) -> Iterator[tuple[str, Any]]:
    """Yield what says something of the model, not of the file or of how it was stored."""
    for name, field in reader.fields.items():
        is_of_file = name.startswith("GGUF.") or name == "general.architecture"
        if not is_of_file and name not in {"general.file_type", "general.quantization_version"}:
            yield name, field


def compare(path: Path, token_ids: Sequence[int], kinds: Sequence[str]) -> dict[str, Measured]:
    """Measure the file at *path* as it is, and with its matrices as each of *kinds*."""
    rows = {"as it is": measure(path, token_ids)}
    with tempfile.TemporaryDirectory() as scratch:
        for kind in kinds:
            again = Path(scratch) / "requantised.gguf"
            requantised(path, again, kind)
            rows[kind] = measure(again, token_ids)
            again.unlink()
    return rows


def table(rows: dict[str, Measured]) -> str:
    """Return the rows in Markdown; the loss is against float32 weights, where they are there."""
    lines = ["| weights | MiB | perplexity | loss |", "|---|---|---|---|"]
    for name, row in rows.items():
        loss = f"{row.perplexity / rows[DENSE].perplexity - 1:+.2%}" if DENSE in rows else ""
        lines.append(f"| {name} | {row.weights_mib:.0f} | {row.perplexity:.3f} | {loss} |")
    return "\n".join(lines)


def tokens_of(path: Path, text: str) -> list[int]:
    """Return *text* as the tokens that a completion's prompt would have."""
    return Tokenizer.from_gguf(GGUFFile.open(path)).encode(text, with_bos=True)


def _model_path(name: str | None) -> Path:
    if name and Path(name).exists():
        return Path(name)
    try:
        path = find(NeuronConfig().places, name or EMBEDDED_MODEL)
    except Unloadable as exc:
        sys.exit(f"perplexity: {exc}")
    if path is None:
        sys.exit("perplexity: the model is not on this machine yet: load it once")
    return path


def main() -> None:
    """Measure, and print the table; with --json, print numbers."""
    parser = argparse.ArgumentParser(prog="scripts/perplexity", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", help="a GGUF file, or a model's id; the embedded one if not given"
    )
    parser.add_argument(
        "--tokens", type=_two_or_more, help="measure only so many of the text's tokens"
    )
    parser.add_argument(
        "--kinds", nargs="*", choices=KINDS, default=KINDS, help="formats beside its own (all)"
    )
    parser.add_argument("--json", action="store_true", help="print numbers for programs")
    asked = parser.parse_args()
    path = _model_path(asked.model)
    try:
        token_ids = tokens_of(path, TEXT)[: asked.tokens]
        rows = compare(path, token_ids, asked.kinds)
    except CheckpointError as exc:
        sys.exit(f"perplexity: {exc}")
    if asked.json:
        print(json.dumps({name: asdict(row) for name, row in rows.items()}))
    else:
        print(f"{path.name}, {len(token_ids)} tokens\n\n{table(rows)}")


def _two_or_more(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError("a number from 2 on: the first token is only given")
    return int(text)


if __name__ == "__main__":
    main()
