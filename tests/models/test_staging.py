"""Weights that go through small buffers arrive whole and in order, read ahead of the copies."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cortex.models import weights
from cortex.models.staging import Staging
from tiny_models import Player, loaded, reference_logits, saved_model, some_tokens

PIECE = 100


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


def buffers() -> list[Tensor]:
    return [torch.zeros(PIECE, dtype=torch.uint8) for _ in range(2)]


@pytest.mark.parametrize("size", [1, 99, 100, 101, 250, 1000])
def test_every_byte_arrives_where_it_belongs(size: int) -> None:
    copies = FakeCopies()
    staging = Staging(buffers(), copies)
    source = torch.randint(256, (size,), dtype=torch.uint8)
    into, at = torch.zeros(size, dtype=torch.uint8), 0

    for piece in staging.pieces(into):
        piece[:] = source[at : at + len(piece)].numpy().data.cast("B")
        at += len(piece)
    copies.finish()

    assert torch.equal(into, source)


def test_one_buffer_is_filled_while_the_other_is_copied_and_no_more() -> None:
    copies = FakeCopies()

    for _ in Staging(buffers(), copies).pieces(torch.zeros(10 * PIECE, dtype=torch.uint8)):
        assert len(copies.under_way) <= 1

    assert copies.most == 2


def test_a_buffer_is_not_filled_for_the_next_tensor_before_it_was_copied() -> None:
    copies = FakeCopies()
    staging = Staging(buffers(), copies)
    tensors = [torch.zeros(30, dtype=torch.uint8) for _ in range(5)]

    for number, tensor in enumerate(tensors):
        for piece in staging.pieces(tensor):
            piece[:] = bytes([number]) * len(piece)
    copies.finish()

    assert [set(tensor.tolist()) for tensor in tensors] == [{n} for n in range(5)]


def test_what_could_not_be_read_is_not_copied() -> None:
    copies = FakeCopies()
    pieces = Staging(buffers(), copies).pieces(torch.zeros(PIECE, dtype=torch.uint8))

    next(iter(pieces))
    del pieces

    assert copies.most == 0


def test_a_model_read_in_pieces_is_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = saved_model(tmp_path, "qwen2")
    pieces = 0

    def in_order(into: Tensor, buffer: Tensor) -> Callable[[], None]:
        nonlocal pieces
        pieces += 1
        into.copy_(buffer)
        return lambda: None

    monkeypatch.setattr(weights, "staging_for", lambda _: Staging(buffers(), in_order))
    tokens = some_tokens(9)

    said = Player(loaded(tmp_path)).step(a=tokens)["a"]

    assert torch.allclose(said, reference_logits(reference, tokens), atol=1e-4)
    assert pieces > 1000
