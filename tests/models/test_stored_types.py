"""GGUF models of every type that the gguf library cannot write: as the floats they stand for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cortex.models.checkpoints.checkpoint import Checkpoint
from tiny_models import (
    WIDE,
    Player,
    loaded,
    random_llama,
    random_model,
    reference_logits,
    some_tokens,
    write_gguf,
)

KINDS = ("IQ4_NL", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")


@pytest.fixture(scope="module", params=KINDS)
def llama(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of one type, and beside it the logits of its floats."""
    model = random_llama(**WIDE)
    path = tmp_path_factory.mktemp("stored") / f"{request.param}.gguf"
    write_gguf(path, model, request.param)
    torch.save(reference_logits(model, some_tokens(30)), path.with_suffix(".logits"))
    return path


def logits_of(path: Path, dtype: str) -> Tensor:
    return Player(loaded(path, dtype=dtype)).step(a=some_tokens(30))["a"]


def test_logits_equal_those_of_the_dequantised_weights(llama: Path) -> None:
    expected = torch.load(llama.with_suffix(".logits"))

    exact, served = (logits_of(llama, dtype) for dtype in ("float32", "auto"))

    torch.testing.assert_close(exact, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    torch.testing.assert_close(served, expected, rtol=0, atol=1e-3 * expected.abs().max().item())
    assert torch.equal(served.argmax(-1), expected.argmax(-1))


def test_weights_take_in_memory_what_they_take_in_the_file(llama: Path) -> None:
    for dtype in ("float32", "auto"):
        model = loaded(llama, dtype=dtype)

        stored = Checkpoint.open(llama).weights_bytes
        assert model.weights_bytes == pytest.approx(stored, rel=0.05)


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_experts_are_kept_in_blocks_too(tmp_path: Path, kind: str) -> None:
    model = random_model("qwen3_moe", **WIDE, moe_intermediate_size=256)
    write_gguf(tmp_path / "tiny.gguf", model, kind)
    expected = reference_logits(model, some_tokens(30))

    exact, served = (logits_of(tmp_path / "tiny.gguf", dtype) for dtype in ("float32", "auto"))

    size = expected.abs().max().item()
    torch.testing.assert_close(exact, expected, rtol=1e-4, atol=1e-4 * size)
    torch.testing.assert_close(served, expected, rtol=0, atol=1e-3 * size)
