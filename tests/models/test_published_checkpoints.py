"""The checkpoints that people have: what a load would do with them, from their headers alone.

Nothing is read: ``Filler`` makes places on torch's meta device, which has none, and says what
belongs there. It fails where a tensor is missing, of another shape, or nobody's.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cortex.ipc.errors import Unloadable
from cortex.ipc.node_api import LoadRequest
from cortex.models.checkpoints.checkpoint import Checkpoint
from cortex.models.checkpoints.errors import CheckpointError
from cortex.models.checkpoints.inner_blocks import inner_block
from cortex.models.checkpoints.sharding import Sharing, weights_of_rank
from cortex.models.checkpoints.tensors import QUANTS
from cortex.models.filler import Filler, Form
from cortex.models.loaded_model import resident_bytes
from cortex.models.parallel import Group
from cortex.models.registry import ARCHITECTURES
from cortex.models.sources import Sources
from cortex.runtime import preflight
from published_headers import Published
from published_models import GGUF, SAFETENSORS

META = torch.device("meta")
ALL = {model.name: model for model in (*SAFETENSORS, *GGUF)}
RANKS = ((0, 1), (0, 2), (1, 2), (0, 4), (3, 4))
FEW_TENSORS = 5000  # of which plans are quick
DENSE = [
    model.name
    for model in SAFETENSORS
    if "quantization_config" not in model.config and len(model.tensors) < FEW_TENSORS
]


@pytest.fixture(scope="module", params=ALL)
def published(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Published, Checkpoint]:
    model = ALL[request.param]
    return model, Checkpoint.open(model.write(tmp_path_factory.mktemp("published")))


def loaded_bytes(
    checkpoint: Checkpoint, group: Group, quant: str | None = None
) -> tuple[int, set[str]]:
    """Plan a load; return the bytes of the weights and the names of the tensors read."""
    architecture = ARCHITECTURES[checkpoint.config["model_type"]]
    raw = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    config = architecture.config(raw)
    group = replace(group, block=inner_block(checkpoint, quant))
    module = architecture.model(config, torch.bfloat16, group)
    sources = Sources(
        checkpoint,
        fused=architecture.fused,
        paired=architecture.gguf_paired,
        is_tied=config.tie_word_embeddings,
    )
    before = resident_bytes(module)  # the frequencies of rotary positions
    kind = QUANTS[quant] if quant else None
    pieces = Filler(sources, Form(torch.bfloat16, config.head_dim, META, quant=kind)).fill(module)
    read = {source.tensor.name for piece in pieces for source in piece.sources}
    return resident_bytes(module) - before, read


def sharing_of(ranks: int, quant: str | None = None, rank: int = 0) -> Sharing:
    return Sharing(ranks, quant, is_wide=False, rank=rank)


def test_a_load_finds_a_place_for_every_tensor(published: tuple[Published, Checkpoint]) -> None:
    model, checkpoint = published
    wanted = {name for name in model.tensors if not name.startswith(model.left_out)}

    for rank, ranks in RANKS:
        if ranks not in model.refused:
            loaded, read = loaded_bytes(checkpoint, Group(rank, ranks))

            assert read == wanted
            assert loaded == weights_of_rank(checkpoint, sharing_of(ranks, rank=rank))


def test_what_ranks_cannot_share_is_refused_by_arithmetic_and_by_the_load(
    published: tuple[Published, Checkpoint],
) -> None:
    model, checkpoint = published

    for ranks in (1, 2, 4):
        request = LoadRequest("m", tensor_parallel=ranks)
        if ranks not in model.refused:
            preflight.judge(checkpoint, request, 80 << 30)
            continue
        with pytest.raises(Unloadable) as caught:
            preflight.judge(checkpoint, request, 80 << 30)
        with pytest.raises((CheckpointError, ValueError)):
            loaded_bytes(checkpoint, Group(0, ranks))

        assert str(caught.value).startswith(model.refused[ranks])
        assert caught.value.extras["kind"] == "ranks_indivisible"


@pytest.mark.parametrize("published", ["qwen3-30b-a3b-q4_k_m"], indirect=True)
def test_a_device_has_to_have_room_for_the_rank_that_holds_the_most(
    published: tuple[Published, Checkpoint],
) -> None:
    _, checkpoint = published
    request = LoadRequest("m", tensor_parallel=2, dtype="bfloat16")
    first, second = (loaded_bytes(checkpoint, Group(rank, 2))[0] for rank in (0, 1))

    needs = preflight.needs(checkpoint, request)

    assert needs.weights_bytes == first > second


@pytest.mark.parametrize("published", DENSE, indirect=True)
def test_dense_weights_take_what_was_foretold_when_they_are_quantised_on_the_way(
    published: tuple[Published, Checkpoint],
) -> None:
    _, checkpoint = published

    for quant in ("q8_0", "q4_0", "fp8"):
        loaded, _ = loaded_bytes(checkpoint, Group(1, 2), quant)

        assert loaded == weights_of_rank(checkpoint, sharing_of(2, quant, rank=1))
        assert preflight.in_situ(checkpoint, quant) == quant


def test_a_model_stretched_as_its_card_says_takes_a_longer_context(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(ALL["qwen2.5-7b-with-yarn"].write(tmp_path))

    found = preflight.needs(checkpoint, LoadRequest("m"))

    assert found.context_tokens == 131072
