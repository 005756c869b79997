"""What hybrids promise of batches, chunks and slots: on a CPU the same bits whatever the steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cortex.models.kernels import program
from cortex.models.kernels.graphs import DecodeGraphs
from cortex.models.loaded_model import LoadedModel
from fake_capture import FakeCapture
from tiny_hybrids import MODEL_TYPES, saved_hybrid
from tiny_models import Player, loaded, some_tokens

TOKENS = some_tokens(140)
CUTS = (1, 2, 3, 4, 5, 63, 64, 65, 127, 128, 129, 139)


@pytest.fixture(scope="module", params=MODEL_TYPES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    directory = tmp_path_factory.mktemp("tiny")
    saved_hybrid(directory, request.param)
    return loaded(directory)


@pytest.fixture(scope="module")
def whole(tiny: LoadedModel) -> Tensor:
    return Player(tiny).step(a=TOKENS)["a"]


def test_a_prompt_cut_anywhere_gives_the_same_bits(tiny: LoadedModel, whole: Tensor) -> None:
    for cut in CUTS:
        player = Player(tiny)
        pieces = [player.step(a=TOKENS[:cut])["a"], player.step(a=TOKENS[cut:])["a"]]

        assert torch.equal(torch.cat(pieces), whole), cut


def test_token_by_token_gives_the_same_bits(tiny: LoadedModel, whole: Tensor) -> None:
    player = Player(tiny)

    pieces = [player.step(a=[token])["a"] for token in TOKENS[:70]]

    assert torch.equal(torch.cat(pieces), whole[:70])


def test_company_changes_no_bits(tiny: LoadedModel, whole: Tensor) -> None:
    player = Player(tiny)
    player.step(b=TOKENS[40:50], c=TOKENS[:2])

    pieces = [
        player.step(a=TOKENS[:3], b=TOKENS[50:51])["a"],
        player.step(c=TOKENS[2:80], a=TOKENS[3:68])["a"],
        player.step(b=[7], a=TOKENS[68:69], c=[8])["a"],
        player.step(d=TOKENS[:1], a=TOKENS[69:])["a"],
    ]

    assert torch.equal(torch.cat(pieces), whole)


def test_a_recorded_model_gives_the_same_bits(
    tiny: LoadedModel, whole: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = list[str]()
    monkeypatch.setattr(program.log, "warning", lambda text, *_: said.append(text))
    player = Player(tiny)
    player.compute = tiny.recorded(player.cache)

    pieces = [
        player.step(a=TOKENS[:66], b=TOKENS[3:9])["a"].clone(),
        player.step(b=[7], a=TOKENS[66:67])["a"].clone(),
        player.step(a=TOKENS[67:])["a"].clone(),
    ]

    assert torch.equal(torch.cat(pieces), whole)
    assert not said, "it was recorded"


def test_a_slot_that_another_sequence_had_is_as_good_as_new(
    tiny: LoadedModel, whole: Tensor
) -> None:
    player = Player(tiny)
    player.step(b=TOKENS[5:60])
    player.states["a"] = player.states.pop("b")

    assert torch.equal(player.step(a=TOKENS)["a"], whole)


def test_a_copied_state_goes_on_where_it_was_taken(tiny: LoadedModel, whole: Tensor) -> None:
    player = Player(tiny)
    player.step(a=TOKENS[:64])
    other = player.free_states.pop()
    player.cache.copy_states(torch.tensor([player.states["a"]]), torch.tensor([other]))
    player.step(a=TOKENS[3:20])  # which is not what follows
    player.states["a"], player.lengths["a"] = other, 64

    assert torch.equal(player.step(a=TOKENS[64:])["a"], whole[64:])


def test_padding_of_a_graph_touches_no_state_but_the_scratch_slot(
    tiny: LoadedModel, whole: Tensor
) -> None:
    player = Player(tiny)
    player.states = {"a": 5, "b": 6, "c": 7}
    scratch_slot, scratch_block = 8, player.free.pop()
    player.cache = cache = replace(
        player.cache, scratch_slot=scratch_slot, scratch_block=scratch_block
    )
    graphs = DecodeGraphs(tiny.module, cache, FakeCapture(), max_sequences=4, context_tokens=512)
    for state in cache.states:
        state.delta.fill_(7.0)
    player.step(a=TOKENS[:64], b=TOKENS[:9], c=TOKENS[:5])
    player.compute = graphs
    before = [state.delta.clone() for state in cache.states]

    first = player.step(a=TOKENS[64:65], b=[3], c=[4])["a"].clone()
    second = player.step(a=TOKENS[65:66])["a"].clone()

    torch.testing.assert_close(torch.cat([first, second]), whole[64:66])
    assert graphs.sizes == [1, 2, 4]
    used = {*player.states.values(), scratch_slot}
    for state, was in zip(cache.states, before, strict=True):
        others = [slot for slot in range(state.delta.size(0)) if slot not in used]
        assert torch.equal(state.delta[others], was[others])
