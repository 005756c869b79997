"""transformers' steps, for scripts/bench-gpu: a static cache, and torch.compile where asked for."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from random_models import as_transformers
from torch import Tensor

from cortex.models.loaded_model import LoadedModel


class Peer:
    """A model of transformers with the weights of ours."""

    def __init__(self, model: LoadedModel, shape: Mapping[str, Any], *, is_compiled: bool) -> None:
        self._theirs = as_transformers(model, shape)
        self._model = model
        self._is_compiled = is_compiled

    def timed(
        self, sequences: int, context: int, steps: int, *, is_prefill: bool
    ) -> Callable[[], float]:
        """Return what times a step of so many *sequences*, or a prompt of *context*, warm."""
        cache = self._cache(sequences, context + steps)
        time_once = (
            self._prefill(cache, context)
            if is_prefill
            else self._decode(cache, sequences, context, steps)
        )
        time_once()  # compiles
        time_once()  # and captures
        return time_once

    def _cache(self, sequences: int, tokens: int) -> Any:
        from transformers import StaticCache

        cache = StaticCache(config=self._theirs.config, max_cache_len=tokens)
        model = self._model
        cache.early_initialization(
            sequences, model.caches.kv_heads, model.caches.head_dim, model.kv_dtype, model.device
        )
        return cache

    def _decode(self, cache: Any, sequences: int, context: int, steps: int) -> Callable[[], float]:
        step: Callable[[Tensor], Tensor] = lambda tokens: self._next(cache, tokens)  # noqa: E731
        if self._is_compiled:
            torch.compiler.reset()  # the last cell's graphs, which would only be in the way
            step = torch.compile(step, mode="reduce-overhead", fullgraph=True)

        @torch.no_grad()
        def time_once() -> float:
            _rewind(cache, context - 1)
            tokens = torch.ones(sequences, 1, dtype=torch.int64, device=self._model.device)
            self._wait()
            began = time.perf_counter()
            for _ in range(steps):
                tokens = step(tokens).clone()
            self._wait()
            return (time.perf_counter() - began) / steps

        return time_once

    def _prefill(self, cache: Any, context: int) -> Callable[[], float]:
        tokens = torch.ones(1, context, dtype=torch.int64, device=self._model.device)

        @torch.no_grad()
        def time_once() -> float:
            _rewind(cache, 0)
            self._wait()
            began = time.perf_counter()
            self._next(cache, tokens)
            self._wait()
            return time.perf_counter() - began

        return time_once

    def _next(self, cache: Any, tokens: Tensor) -> Tensor:
        said = self._theirs(input_ids=tokens, past_key_values=cache, logits_to_keep=1)
        chosen: Tensor = said.logits[:, -1].argmax(dim=-1, keepdim=True)
        return chosen

    def _wait(self) -> None:
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)


def _rewind(cache: Any, tokens: int) -> None:
    """Let *cache* hold so many tokens, whatever they are."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(tokens)
