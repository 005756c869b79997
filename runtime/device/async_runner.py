"""Steps on a GPU, which goes on while the host prepares the next one.

    host     plan n+1   launch n+1   wait for n, tell its tokens   plan n+2   launch n+2 ...
    device   [ step n ................. ][ step n+1 ................. ][ step n+2 ...

``launch`` puts a whole step into the device's queue, forward pass, choice of the tokens and their
copy to the host, and looks at nothing. A token that the host did not know yet when it planned the
step (``UNKNOWN``) is the one that the step before chooses for the same sequence; it is taken over
on the device, where it stays. The queue is one stream, so a step reads what those before it wrote,
and a buffer is not written again before it was read.

A row whose logits are not finite chooses no token. The host finds out too late to keep its sequence
from the next step, which then computes it from token 0 and whose choice for it the engine drops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cortex.ipc.engine_options import DEFAULT_SEQUENCES
from cortex.models.batch import Batch, KVCache
from cortex.runtime.device import sampler
from cortex.runtime.device.cuda import fetch, upload
from cortex.runtime.device.model_runner import (
    Finished,
    Launched,
    ModelRunner,
    ServableModel,
    make_batch,
)
from cortex.runtime.device.row import Chosen, Row
from cortex.runtime.device.sequence import UNKNOWN
from cortex.runtime.device.step_plan import StepPlan

Fetch = Callable[[Sequence[Tensor]], Callable[[], Sequence[Tensor]]]


@dataclass(frozen=True, slots=True)
class InFlight:
    """A step that was launched."""

    choice: sampler.Choice
    wait: Callable[[], Sequence[Tensor]]

    def result(self) -> list[Chosen]:
        """Wait for the step, and return what each row chose."""
        return self.choice.read(self.wait())


class AsyncRunner(ModelRunner):
    """A ``ModelRunner`` whose launches return before the step is over.

    *fetch* begins to copy tensors to the host, and returns what waits for them.
    """

    def __init__(
        self,
        model: ServableModel,
        cache: KVCache,
        device: torch.device,
        *,
        max_sequences: int = DEFAULT_SEQUENCES,
        fetch: Fetch = fetch,
    ) -> None:
        super().__init__(model, cache, device, max_sequences=max_sequences)
        self._fetch = fetch
        self._tokens = torch.zeros(0, dtype=torch.int64)  # that the step before chose
        self._row_of: dict[int, int] = {}  # the row among them of each sequence

    @property
    def runs_ahead(self) -> bool:
        """Yes: a step goes on after its launch."""
        return True

    def launch(self, plan: StepPlan, rows: Sequence[Row]) -> Launched:
        """Begin *plan*, which may be empty, and choose by its logits as *rows* say."""
        if not plan.sequences:
            self._row_of = {}
            return Finished([])
        with torch.inference_mode():
            choice = sampler.choose(self.forward(plan), rows)
            wait = self._fetch(choice.tensors)
        self._tokens, self._row_of = choice.tokens, _last_rows(plan)
        return InFlight(choice, wait)

    def _batch(self, plan: StepPlan) -> Batch:
        batch = make_batch(plan, self._cache, self._device)
        places = _unknown_places(plan)
        if places:
            at = upload(list(places), torch.int64, self._device)
            rows = [self._row_of[sequence_id] for sequence_id in places.values()]
            tokens = self._tokens.index_select(0, upload(rows, torch.int64, self._device))
            batch.token_ids.index_copy_(0, at, tokens.clamp_(min=0))
        return batch


def _unknown_places(plan: StepPlan) -> dict[int, int]:
    """Return where among the step's tokens an unknown one is, and of which sequence."""
    places: dict[int, int] = {}
    start = 0
    for planned in plan.sequences:
        if planned.token_ids[-1] == UNKNOWN:  # known tokens come first, and one can be unknown
            places[start + len(planned.token_ids) - 1] = planned.sequence_id
        start += len(planned.token_ids)
    return places


def _last_rows(plan: StepPlan) -> dict[int, int]:
    """Return for each sequence of which rows of logits are wanted the last of them."""
    last: dict[int, int] = {}
    rows = 0
    for planned in plan.sampled:
        rows += planned.rows
        last[planned.sequence_id] = rows - 1
    return last
