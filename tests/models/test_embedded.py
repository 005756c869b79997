"""The model a user gets first, against transformers on the same file."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch

from cortex.models.checkpoints.checkpoint import Checkpoint
from cortex.models.checkpoints.gguf import GGUFFile
from tiny_models import Player, llama_from_gguf, loaded, reference_logits

QUESTION = [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411]
"""How the model's chat template begins."""

pytestmark = pytest.mark.e2e


def test_our_reading_of_the_file_is_the_gguf_librarys(embedded_model: Path) -> None:
    ours = GGUFFile.open(embedded_model)

    theirs = gguf.GGUFReader(embedded_model)
    assert {name: t.offset for name, t in ours.tensors.items()} == {
        tensor.name: tensor.data_offset for tensor in theirs.tensors
    }
    assert ours.metadata == {
        key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")
    }


@pytest.mark.parametrize(("dtype", "most"), [("auto", 0.01), ("float16", 0.1), ("float32", 2e-4)])
def test_logits_are_those_of_transformers_in_float32(
    embedded_model: Path, dtype: str, most: float
) -> None:
    reference = llama_from_gguf(embedded_model)

    logits = Player(loaded(embedded_model, dtype=dtype)).step(a=QUESTION)["a"]

    expected = reference_logits(reference, QUESTION)
    both = torch.stack([logits.flatten(), expected.flatten()]).double()
    assert torch.corrcoef(both)[0, 1] > 0.999999
    assert (logits - expected).abs().max() < most
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_weights_stay_packed(embedded_model: Path, dtype: str) -> None:
    stored = Checkpoint.open(embedded_model).weights_bytes

    assert loaded(embedded_model, dtype=dtype).weights_bytes == pytest.approx(stored, rel=0.05)


@pytest.mark.parametrize("dtype", ["auto", "float16", "float32"])
def test_no_batch_and_no_chunk_changes_a_bit(embedded_model: Path, dtype: str) -> None:
    model = loaded(embedded_model, dtype=dtype)
    whole = Player(model).step(a=QUESTION)["a"]

    player = Player(model)
    first = player.step(a=QUESTION[:5], b=QUESTION[3:])["a"]
    second = player.step(b=[7], a=QUESTION[5:])["a"]

    assert torch.equal(torch.cat([first, second]), whole)
