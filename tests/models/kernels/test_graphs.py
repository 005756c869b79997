"""Decode steps that were captured say what the model says, whatever was in the buffers before."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cortex.models.batch import Batch, KVCache
from cortex.models.kernels.graphs import DecodeGraphs, buckets
from cortex.models.loaded_model import LoadedModel
from fake_capture import FakeCapture
from tiny_models import Player, loaded, saved_model, some_tokens

SEQUENCES = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    path: Path = tmp_path_factory.mktemp("model")
    saved_model(path, "qwen3", head_dim=16)
    return loaded(path)


class GraphPlayer(Player):
    """Feeds a model through graphs, and beside it as it is written, each with its own cache."""

    def __init__(self, model: LoadedModel, capture: FakeCapture, *, context_tokens: int) -> None:
        super().__init__(model)
        self.plain = self.cache
        self.free.remove(63)  # to be the scratch block
        self.cache = replace(model.new_cache(64, 16), scratch_block=63)
        for tensor in (*self.cache.keys, *self.cache.values):
            tensor.fill_(torch.nan)  # whoever reads what nobody has written will show it
        self.capture = capture
        self.compute = self.graphs = DecodeGraphs(
            model.module,
            self.cache,
            capture,
            max_sequences=SEQUENCES,
            context_tokens=context_tokens,
        )

    def both(
        self, tokens: Mapping[str, Sequence[int]], only: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """Return the logits by graphs, and by the model as it is written, of the rows *only*."""
        batch = self.batch(dict(tokens))
        batch = replace(batch, sampled=batch.sampled[only])
        with torch.inference_mode():
            said = self.graphs(batch).clone()
            return said, self.model.module(replace(batch, cache=self.plain))

    @property
    def replays(self) -> dict[int, int]:
        """How often each bucket was replayed, of those that were."""
        return {size: g.replays for size, g in sorted(self.capture.graphs.items()) if g.replays}


Play = Callable[..., GraphPlayer]


@pytest.fixture
def play(model: LoadedModel) -> Play:
    def make(*, fails_at: set[int] | None = None, context_tokens: int = 512) -> GraphPlayer:
        return GraphPlayer(model, FakeCapture(fails_at or set()), context_tokens=context_tokens)

    return make


def prompts(count: int) -> dict[str, list[int]]:
    return {f"s{n}": some_tokens(5 + 7 * n, seed=n) for n in range(count)}


def one_each(count: int, seed: int) -> dict[str, list[int]]:
    return {f"s{n}": [token] for n, token in enumerate(some_tokens(count, seed))}


def test_there_is_a_bucket_for_every_number_of_sequences() -> None:
    assert buckets(100) == [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 100]
    assert buckets(16) == [1, 2, 4, 8, 16]
    assert buckets(6) == [1, 2, 4, 6]
    assert buckets(1) == [1]


def test_the_largest_is_captured_first(play: Play) -> None:
    assert list(play().capture.graphs) == [6, 4, 2, 1]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_a_step_of_graphs_says_what_the_model_says(play: Play, count: int) -> None:
    player = play()
    said, written = player.both(prompts(count))  # whole prompts: no graph
    assert torch.equal(said, written)
    assert player.replays == {}

    for step in range(3):
        said, written = player.both(one_each(count, step))
        assert torch.equal(said, written)

    assert player.replays == {next(size for size in buckets(6) if size >= count): 3}


def test_sequences_that_went_away_leave_nothing_behind(play: Play) -> None:
    player = play()
    player.both(prompts(6))
    player.both(one_each(6, 1))
    before = [keys.nan_to_num(9.0) for keys in player.cache.keys]

    said, written = player.both(one_each(3, 2))  # four rows, one of them padding

    assert torch.equal(said, written)
    changed = {
        int(block)
        for was, keys in zip(before, player.cache.keys, strict=True)
        for block in (was != keys.nan_to_num(9.0)).flatten(1).any(dim=1).nonzero()
    }
    assert changed - {63} == {player.tables[f"s{n}"][-1] for n in range(3)}


def test_only_the_rows_that_are_wanted_come_back(play: Play) -> None:
    player = play()
    player.both(prompts(3))

    said, written = player.both(one_each(3, 1), slice(1, 3))

    assert said.shape[0] == 2
    assert torch.equal(said, written)
    assert player.replays == {4: 1}


def test_more_sequences_than_were_captured_run_without_a_graph(play: Play) -> None:
    player = play()
    player.both(prompts(7))

    said, written = player.both(one_each(7, 1))

    assert torch.equal(said, written)
    assert player.replays == {}


def test_a_longer_context_than_there_is_room_for_runs_without_a_graph(play: Play) -> None:
    player = play(context_tokens=40)
    player.both({"a": some_tokens(47), "b": [1]})

    assert torch.equal(*player.both({"a": [1], "b": [2]}))
    assert player.replays == {2: 1}
    assert torch.equal(*player.both({"a": [1], "b": [2]}))  # the 49th position is in a fourth block
    assert player.replays == {2: 1}


def test_a_step_after_a_prompt_still_finds_clean_padding(play: Play) -> None:
    player = play()
    player.both(prompts(3))
    player.both(one_each(3, 1))
    player.both({"s0": some_tokens(20)})
    said, written = player.both(one_each(3, 2))

    assert torch.equal(said, written)


def test_what_cannot_be_captured_runs_as_it_is_written_and_says_so_once(
    play: Play, caplog: pytest.LogCaptureFixture
) -> None:
    player = play(fails_at={2})
    player.both(prompts(3))

    assert torch.equal(*player.both(one_each(3, 1)))
    assert player.replays == {}
    assert player.graphs.sizes == []
    (record,) = caplog.records
    assert "capturing 2 rows failed: RuntimeError: CUDA error: operation not" in record.getMessage()


def test_its_memory_is_that_of_graphs_and_buffers(play: Play) -> None:
    player = play(context_tokens=100)

    rows = 8 + 8 + 8 + 4 + 7 * 4  # token, position, slot, context, and a table of 7 blocks
    assert player.graphs.buffer_bytes == player.capture.bytes + SEQUENCES * rows + (6 + 1) * 4


def test_without_a_scratch_block_nothing_can_be_captured(model: LoadedModel) -> None:
    cache: KVCache = model.new_cache(4, 16)

    def never(_: Batch) -> Tensor:
        raise AssertionError

    with pytest.raises(AssertionError, match="padding has to write somewhere"):
        DecodeGraphs(never, cache, FakeCapture(), max_sequences=2, context_tokens=64)
