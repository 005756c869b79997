"""Weights on their way to a GPU: they are there, as on a CPU, and a load takes no more of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cortex.models.kernels import reference
from cortex.models.loaded_model import LoadedModel
from cortex.models.parallel import ALONE, Group
from cortex.models.quantization import Matrix
from cortex.models.weights import load_model
from tiny_models import random_llama, saved_model, write_gguf

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}


def weights_of(model: LoadedModel) -> dict[str, Tensor]:
    """Return all matrices, unpacked, and all vectors, on the host."""
    found = {name: buffer.cpu() for name, buffer in model.module.named_buffers()}
    for name, matrix in model.module.named_modules():
        if isinstance(matrix, Matrix):
            parts = [
                reference.dequantize(part.kind, part.data, is_planar=part.is_planar)
                for part in matrix.parts
            ]
            found[name] = torch.cat(parts).cpu()
    return found


def load(path: Path, device: torch.device, **options: Any) -> LoadedModel:
    return load_model(path, device=device, dtype="float32", on_progress=lambda *_: None, **options)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dense")
    saved_model(directory, "qwen3", **SIZES)
    return directory


@pytest.mark.parametrize("quant", [None, "q4_0", "q8_0"])
@pytest.mark.parametrize("group", [ALONE, Group(1, 2)])
def test_a_gpu_gets_what_a_cpu_gets(dense: Path, quant: str | None, group: Group) -> None:
    there = weights_of(load(dense, GPU, quant=quant, group=group))

    for name, here in weights_of(load(dense, CPU, quant=quant, group=group)).items():
        torch.testing.assert_close(there[name], here, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "F16"])
def test_a_gpu_gets_the_blocks_of_a_file_and_rotary_halves(tmp_path: Path, kind: str) -> None:
    write_gguf(tmp_path / "tiny.gguf", random_llama(**SIZES), kind)

    there = weights_of(load(tmp_path / "tiny.gguf", GPU))

    for name, here in weights_of(load(tmp_path / "tiny.gguf", CPU)).items():
        assert torch.equal(there[name], here), name


def test_what_a_gpu_quantised_is_kept_for_a_cpu(dense: Path, tmp_path: Path) -> None:
    first = weights_of(load(dense, GPU, quant="q4_1", cache_directory=tmp_path))

    second = weights_of(load(dense, CPU, quant="q4_1", cache_directory=tmp_path))

    assert len(list(tmp_path.iterdir())) == 1
    for name, matrix in first.items():
        assert torch.equal(second[name], matrix), name


def test_a_load_takes_little_more_of_a_gpu_than_the_weights(dense: Path) -> None:
    load(dense, GPU)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(GPU)
    torch.cuda.reset_peak_memory_stats(GPU)

    model = load(dense, GPU)

    assert torch.cuda.memory_allocated(GPU) - before <= 1.1 * model.weights_bytes + (1 << 20)
    assert torch.cuda.max_memory_allocated(GPU) - before <= model.weights_bytes + 16 * (1 << 20)
