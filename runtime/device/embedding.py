"""One vector of a prompt, from the hidden states of its tokens as they come, chunk by chunk.

    last    the last token's hidden state
    mean    the mean over all tokens

made of length one (L2), which is why the mean is never divided. The sum is taken token by token, in
order, in float64, and carried from chunk to chunk: how the prompt was cut cannot change it. A sum
begins anew at position 0, so a preempted prompt is not counted twice, and is kept only once its
whole step has succeeded, so neither is a step that is tried again.

Shapes: T tokens of all prompts laid end to end, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cortex.runtime.device.step_plan import PlannedSequence


class Pooler:
    """The sums of the embeddings that are under way."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._sums)

    @torch.inference_mode()
    def add(self, planned: Sequence[PlannedSequence], hidden: Tensor) -> dict[int, bytes | None]:
        """Take the *hidden* states [T, H] of a step; return the vectors that it finished.

        Float32 in the byte order of this host; None where one is not finite.
        """
        chunks = torch.split(hidden, [len(embedding.token_ids) for embedding in planned])
        sums = {
            embedding.sequence_id: self._sum(embedding, chunk)
            for embedding, chunk in zip(planned, chunks, strict=True)
        }
        vectors = {e.sequence_id: _vector(sums.pop(e.sequence_id)) for e in planned if e.is_last}
        self._sums.update(sums)
        return vectors

    def forget(self, sequence_id: int) -> None:
        """Free what is kept of a sequence, if anything."""
        self._sums.pop(sequence_id, None)

    def _sum(self, embedding: PlannedSequence, chunk: Tensor) -> Tensor:
        """Return the sum [H] up to the end of *chunk* [C, H]; of the last token alone if so."""
        if embedding.pooling == "last":
            return chunk[-1].double()
        if embedding.first_position:
            total = self._sums[embedding.sequence_id].clone()
        else:
            total = torch.zeros(chunk.shape[-1], dtype=torch.float64, device=chunk.device)
        for state in chunk:
            total += state
        return total


def _vector(total: Tensor) -> bytes | None:
    vector = (total / torch.linalg.vector_norm(total)).float().cpu()  # of zeros: not a number
    if not vector.isfinite().all():
        return None
    return bytes(vector.numpy())
