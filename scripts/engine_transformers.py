"""transformers, as a program without any engine would use it: a forward pass, a cache, an argmax.

It reads the same GGUF file and unpacks it. Measured on SmolLM2 (2 cores, 2026-11-21): bfloat16 is
faster than float32 for prompts and short contexts, and a static cache than a growing one; with long
contexts bfloat16 is half as fast as float32. So both are kept, each for what it is best at. Nothing
is compiled.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from engine_child import Timed, prompt
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

LONG_TOKENS = 512


class Engine:
    """One loaded model; an ``engine_child.MeasuredEngine``."""

    version = f"transformers {transformers.__version__}, torch {torch.__version__}"

    def __init__(self) -> None:
        self._models: dict[torch.dtype, Any] = {}
        self._caches: dict[tuple[int, int], StaticCache] = {}

    def load(self, path: Path, threads: int, sequences: int, context: int) -> None:
        """Read and unpack the file; caches are made when they are needed."""
        del sequences, context
        torch.set_num_threads(threads)
        self._path = path
        self._model(torch.bfloat16)

    @torch.inference_mode()
    def prefill(self, prompt: Sequence[int]) -> int:
        """Compute a prompt."""
        logits = self._model(torch.bfloat16)(torch.tensor([prompt]), logits_to_keep=1).logits
        return int(logits[0, -1].argmax())

    @torch.inference_mode()
    def decode(self, batch: int, context: int, steps: int) -> Timed:
        """Make a cache, or cut it back to *context*, and time steps."""
        model = self._model(torch.float32 if context >= LONG_TOKENS else torch.bfloat16)
        cache = self._cache(model, batch, context)
        tokens = torch.zeros(batch, 1, dtype=torch.int64)
        began = time.perf_counter()
        for step in range(-1, steps):
            if step == 0:
                began = time.perf_counter()
            logits = model(tokens, past_key_values=cache, use_cache=True).logits
            tokens = logits[:, -1].argmax(-1, keepdim=True)
        seconds = time.perf_counter() - began
        layers: Any = cache.layers
        for layer in layers:
            layer.cumulative_length.fill_(context)
        return Timed(seconds, batch * steps)

    def _model(self, dtype: torch.dtype) -> Any:
        if dtype not in self._models:
            model: Any = AutoModelForCausalLM.from_pretrained(
                self._path.parent, gguf_file=self._path.name, dtype=dtype
            )
            self._models[dtype] = model.eval()
        return self._models[dtype]

    def _cache(self, model: Any, batch: int, context: int) -> StaticCache:
        """Return a cache with *context* tokens for each of *batch* sequences, all the same."""
        if (batch, context) not in self._caches:
            first = DynamicCache(config=model.config)
            model(torch.tensor([prompt(0, context)]), past_key_values=first, logits_to_keep=1)
            cache = StaticCache(config=model.config, max_cache_len=context + 64)
            layers: Any = first.layers
            for number, layer in enumerate(layers):
                keys, values = (
                    part.expand(batch, -1, -1, -1) for part in (layer.keys, layer.values)
                )
                cache.update(keys, values, number)
            self._caches[batch, context] = cache
        return self._caches[batch, context]
