"""llama.cpp, through llama-cpp-python's low level: one context for short, one for long sequences.

Its settings are its own defaults, with flash attention for short sequences and without it for long
ones: each was the faster by 5 to 10 % (SmolLM2, 1,024 tokens, 2026-11-21). A decode step is one
``llama_decode`` of a batch with a token of each sequence, and the greedy choice among its logits by
numpy. All sequences of a batch have the tokens of the first, copied into streams of their own with
``llama_memory_seq_cp``: which tokens they are makes no difference to its time.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp as c
import numpy as np
from answers import Trouble
from engine_child import Timed, prompt

SHORT_TOKENS = 512
PARTS = 512
"""Tokens of a prompt in one batch; its own default for what is computed at once."""
FTYPES = {
    "Q4_0": c.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q4_1": c.LLAMA_FTYPE_MOSTLY_Q4_1,
    "Q8_0": c.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_K": c.LLAMA_FTYPE_MOSTLY_Q4_K_S,
}


class Engine:
    """One loaded model; an ``engine_child.MeasuredEngine``."""

    version = f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')}"

    def load(self, path: Path, threads: int, sequences: int, context: int) -> None:
        """Map the file, make both contexts."""
        c.llama_backend_init()
        self._model = c.llama_model_load_from_file(
            str(path).encode(), c.llama_model_default_params()
        )
        if not self._model:
            raise Trouble(f"{path} cannot be loaded; the log says why")
        self._vocab_size = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self._model))
        self._threads, self._sequences, self._context = threads, sequences, context
        self._contexts: dict[int, Any] = {}
        self._batch = c.llama_batch_init(PARTS, 0, 1)
        self._held: dict[int, tuple[int, int]] = {}

    def prefill(self, prompt: Sequence[int]) -> int:
        """Compute a prompt as the only sequence of the short context."""
        return self._fill(SHORT_TOKENS, prompt)

    def decode(self, batch: int, context: int, steps: int) -> Timed:
        """Fill the sequences, if they are not as the last time left them, and time steps."""
        room = SHORT_TOKENS if context < SHORT_TOKENS else self._context
        memory = self._ready(room, batch, context)
        tokens = np.zeros(batch, dtype=np.int64)
        choosing = 0.0
        self._step(room, tokens, context)  # the first of a batch allocates
        began = time.perf_counter()
        for step in range(1, steps + 1):
            logits = self._step(room, tokens, context + step)
            chosen = time.perf_counter()
            tokens = logits.argmax(axis=-1)
            choosing += time.perf_counter() - chosen
        seconds = time.perf_counter() - began
        for sequence in range(batch):
            c.llama_memory_seq_rm(memory, sequence, context, -1)
        return Timed(seconds, batch * steps, choosing)

    def _made(self, room: int) -> Any:
        """Return the context whose sequences have *room* tokens each."""
        if room not in self._contexts:
            self._contexts[room] = c.llama_init_from_model(
                self._model, _settings(room, self._sequences, self._threads)
            )
            if not self._contexts[room]:
                raise Trouble("llama.cpp makes no context; the log says why")
        return self._contexts[room]

    def _ready(self, room: int, batch: int, context: int) -> Any:
        """Give *batch* sequences *context* tokens each, and return the memory that has them."""
        memory = c.llama_get_memory(self._made(room))
        before, filled = self._held.get(room, (0, 0))
        if filled != context:
            self._fill(room, prompt(0, context))
            before = 1
        for sequence in range(before, batch):
            c.llama_memory_seq_cp(memory, 0, sequence, -1, -1)
        self._held[room] = max(before, batch), context
        return memory

    def _fill(self, room: int, prompt: Sequence[int]) -> int:
        """Forget everything, compute *prompt* as sequence 0 and return the likeliest next token."""
        llama = self._made(room)
        c.llama_memory_clear(c.llama_get_memory(llama), False)
        self._held.pop(room, None)
        for at in range(0, len(prompt), PARTS):
            part = prompt[at : at + PARTS]
            last = len(part) - 1 if at + PARTS >= len(prompt) else -1
            for index, token in enumerate(part):
                self._put(index, token, at + index, 0, wants_logits=index == last)
            self._compute(llama, len(part))
        return int(self._logits(llama, 1).argmax())

    def _step(self, room: int, tokens: np.ndarray, position: int) -> np.ndarray:
        """Compute the next token of each sequence -> [B, V] float32."""
        for sequence, token in enumerate(tokens.tolist()):
            self._put(sequence, token, position, sequence, wants_logits=True)
        self._compute(self._made(room), len(tokens))
        return self._logits(self._made(room), len(tokens))

    def _put(
        self, index: int, token: int, position: int, sequence: int, *, wants_logits: bool
    ) -> None:
        batch = self._batch
        batch.token[index] = token
        batch.pos[index] = position
        batch.n_seq_id[index] = 1
        batch.seq_id[index][0] = sequence
        batch.logits[index] = wants_logits

    def _compute(self, llama: Any, tokens: int) -> None:
        self._batch.n_tokens = tokens
        if status := c.llama_decode(llama, self._batch):
            raise Trouble(f"llama_decode returned {status}")

    def _logits(self, llama: Any, rows: int) -> np.ndarray:
        address = c.llama_get_logits(llama)
        return np.ctypeslib.as_array(address, shape=(rows, self._vocab_size))


def _settings(room: int, sequences: int, threads: int) -> Any:
    """Return the settings of a context of *sequences* with *room* tokens each."""
    settings = c.llama_context_default_params()
    settings.n_ctx, settings.n_seq_max = room * sequences, sequences
    settings.n_threads = settings.n_threads_batch = threads
    is_long = room > SHORT_TOKENS
    settings.flash_attn_type = (
        c.LLAMA_FLASH_ATTN_TYPE_DISABLED if is_long else c.LLAMA_FLASH_ATTN_TYPE_ENABLED
    )
    return settings


def requantise(source: str, target: str, quant: str) -> dict[str, Any]:
    """Write *source* as *target* with its matrices in *quant*, the output matrix as it was."""
    if quant not in FTYPES:
        raise Trouble(f"--quant {quant} is none of {', '.join(FTYPES)}")
    settings = c.llama_model_quantize_default_params()
    settings.ftype = FTYPES[quant]
    settings.allow_requantize = True
    settings.quantize_output_tensor = False
    if c.llama_model_quantize(source.encode(), target.encode(), settings):
        raise Trouble(f"llama.cpp cannot write {target}; the log says why")
    return {"path": target}
