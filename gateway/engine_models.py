"""What an engine serves, as its ``GET /v1/models`` lists it; pure.

Every entry is a model that is loaded. It tells no devices and no load, so those of the engine are
not known: its load is our own requests. A limit that it does not tell is left out.

    limit      the first of these that is there
    context    max_model_len (vLLM, SGLang), context_length, and of llama-server's meta: n_ctx, what
               it runs with, else n_ctx_train, what the model was made for
    input      max_input_tokens
    output     max_output_tokens
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import msgspec

from cortex.ipc.node_api import Limit, ModelInfo, Servable

HARNESS = "engine"


class Listed(msgspec.Struct):
    """One entry; what is of another type than it should be is as if it were not there."""

    id: str
    max_model_len: Any = None
    context_length: Any = None
    max_input_tokens: Any = None
    max_output_tokens: Any = None
    meta: Any = None

    def limit(self) -> Limit | None:
        """Return what it says of its limits, or None."""
        meta = self.meta if isinstance(self.meta, dict) else {}
        contexts = (
            *(self.max_model_len, self.context_length),
            *(meta.get("n_ctx"), meta.get("n_ctx_train")),
        )
        limit = Limit(
            next(filter(None, map(_count, contexts)), None),
            _count(self.max_input_tokens),
            _count(self.max_output_tokens),
        )
        return None if limit == Limit() else limit


class ModelPage(msgspec.Struct):
    """The list; Ollama says null where it has nothing."""

    data: list[Listed] | None


def offered(page: ModelPage, wanted: Collection[str] | None) -> list[ModelInfo]:
    """Return the models of *page* that the operator wants offered; None: all of them."""
    found = {entry.id: entry for entry in page.data or [] if wanted is None or entry.id in wanted}
    return [
        ModelInfo(name, HARNESS, "loaded", [], Servable(ok=True), limit=found[name].limit())
        for name in sorted(found)
    ]


def _count(value: Any) -> int | None:
    is_count = isinstance(value, int) and not isinstance(value, bool) and value > 0
    return value if is_count else None
