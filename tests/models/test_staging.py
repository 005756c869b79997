"""Weights that go through small buffers arrive whole and in order, read ahead of the copies."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cortex.models import weights
from cortex.models.checkpoints.tensors import TensorInfo
from cortex.models.sources import Source
from cortex.models.staging import HostLane, Piece, Staging
from tiny_models import Player, loaded, reference_logits, saved_model, some_tokens

PIECE = 100
CPU = torch.device("cpu")


class FakeCopies:
    """Copies that happen when they are waited for, or at the end; a real one may take as long."""

    def __init__(self) -> None:
        self.under_way: deque[Callable[[], None]] = deque()
        self.most = 0

    def __call__(self, into: Tensor, buffer: Tensor) -> Callable[[], None]:
        is_done = False

        def finish() -> None:
            nonlocal is_done
            if not is_done:
                into.copy_(buffer)
                is_done = True
                self.under_way.remove(finish)

        self.under_way.append(finish)
        self.most = max(self.most, len(self.under_way))
        return finish

    def finish(self) -> None:
        for copy in list(self.under_way):
            copy()


def in_order(into: Tensor, buffer: Tensor) -> Callable[[], None]:
    """Copy as a stream does, before what is asked of the device next."""
    into.copy_(buffer)
    return lambda: None


def buffers(size: int = PIECE) -> list[Tensor]:
    return [torch.zeros(size, dtype=torch.uint8) for _ in range(2)]


def empty(size: int = PIECE) -> Tensor:
    return torch.zeros(size, dtype=torch.uint8)


def piece(size: int, into: Tensor | None, land: Callable[[Tensor], None] | None = None) -> Piece:
    tensor = TensorInfo("t", (size,), "F32", Path("file"), 0, size)
    return Piece((Source(tensor, 0, 1, size, ((0, size),)),), into, land)


def filled_with(byte: int) -> Callable[[memoryview], None]:
    def fill(view: memoryview) -> None:
        view[:] = bytes([byte]) * len(view)

    return fill


@pytest.mark.parametrize("size", [1, 99, 100])
def test_every_byte_arrives_where_it_belongs(size: int) -> None:
    copies = FakeCopies()
    staging = Staging(CPU, buffers(), copies)
    place = empty(size)

    staging.carry(piece(size, place), filled_with(7))
    copies.finish()

    assert place.tolist() == [7] * size


def test_one_buffer_is_filled_while_the_other_is_copied_and_no_more() -> None:
    copies = FakeCopies()
    staging = Staging(CPU, buffers(), copies)
    under_way = []

    for _ in range(10):
        staging.carry(piece(PIECE, empty()), lambda _: under_way.append(len(copies.under_way)))

    assert under_way == [0] + [1] * 9
    assert copies.most == 2


def test_a_buffer_is_not_filled_for_the_next_piece_before_it_was_copied() -> None:
    copies = FakeCopies()
    staging = Staging(CPU, buffers(), copies)
    places = [empty(30) for _ in range(5)]

    for number, place in enumerate(places):
        staging.carry(piece(30, place), filled_with(number))
    copies.finish()

    assert [set(place.tolist()) for place in places] == [{n} for n in range(5)]


def test_what_could_not_be_read_is_not_copied() -> None:
    copies = FakeCopies()

    def fail(view: memoryview) -> None:
        raise OSError

    with pytest.raises(OSError):  # noqa: PT011 - it has no text
        Staging(CPU, buffers(), copies).carry(piece(PIECE, empty()), fail)

    assert copies.most == 0


@pytest.mark.parametrize("lane", [HostLane(PIECE), Staging(CPU, buffers(), in_order)])
def test_what_changes_on_the_way_is_taken_from_a_buffer(lane: HostLane | Staging) -> None:
    landed: list[list[int]] = []

    for byte in (1, 2, 3):
        lane.carry(piece(3, None, lambda t: landed.append(t.tolist())), filled_with(byte))

    assert landed == [[1] * 3, [2] * 3, [3] * 3]


def test_a_model_read_through_buffers_is_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = saved_model(tmp_path, "qwen2")
    pieces = count()

    def counted(into: Tensor, buffer: Tensor) -> Callable[[], None]:
        next(pieces)
        return in_order(into, buffer)

    monkeypatch.setattr(
        weights, "lane_for", lambda _, size: Staging(CPU, buffers(max(size, 1 << 16)), counted)
    )
    tokens = some_tokens(9)

    said = Player(loaded(tmp_path)).step(a=tokens)["a"]

    assert torch.allclose(said, reference_logits(reference, tokens), atol=1e-4)
    assert next(pieces) == 30
