"""One engine in a process of its own, which computes only while it is asked; see ``children.py``.

    engine_child.py ours|llama.cpp|transformers

    question       answer
    load           seconds from here to the first token of an answer, then the memory held
    prefill        seconds from a prompt to its first token
    decode         seconds of so many steps of so many sequences, each with a context of its own
    requantise     a GGUF file in another block format (llama.cpp only)

Every engine gets the same token ids: ``prompt(number, length)``. They mean nothing, and no engine
computes faster for it; but a second prompt is another one, so no cache of prompts can help where a
prompt is what is measured.
"""

from __future__ import annotations

import importlib
import random
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from children import answer_questions
from processes import proportional_bytes

FIRST_ID, LAST_ID = 1000, 30_000
"""Ordinary words of any vocabulary: the special tokens lie outside."""

ENGINES = {
    "ours": "engine_ours",
    "llama.cpp": "engine_llama_cpp",
    "transformers": "engine_transformers",
}


@dataclass(frozen=True)
class Timed:
    """Seconds of *steps* steps, those of them that went into choosing tokens, and the tokens."""

    seconds: float
    tokens: int
    choosing_seconds: float | None = None
    """None where the engine does not tell."""


class MeasuredEngine(Protocol):
    """What an engine has to be able to do."""

    version: str
    """What it is, and with which settings."""

    def load(self, path: Path, threads: int, sequences: int, context: int) -> None:
        """Load the model, with room for *sequences* of *context* tokens each."""

    def prefill(self, prompt: Sequence[int]) -> int:
        """Return the likeliest token after *prompt*, and forget both."""

    def decode(self, batch: int, context: int, steps: int) -> Timed:
        """Time *steps* steps of *batch* sequences whose contexts had *context* tokens before."""


class Child:
    """Asks one engine what the parent asks."""

    def __init__(self, engine: MeasuredEngine) -> None:
        self._engine = engine
        self._prompts = 0

    def load(self, path: str, threads: int, sequences: int, context: int) -> dict[str, Any]:
        """Load and answer once."""
        began = time.perf_counter()
        self._engine.load(Path(path), threads, sequences, context)
        self._engine.prefill(prompt(0, 1))
        return {
            "seconds": time.perf_counter() - began,
            "version": self._engine.version,
            "held_bytes": proportional_bytes("self"),
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }

    def prefill(self, tokens: int) -> dict[str, Any]:
        """Compute a prompt that was never there."""
        self._prompts += 1
        token_ids = prompt(10_000 + self._prompts, tokens)
        began = time.perf_counter()
        self._engine.prefill(token_ids)
        return {"seconds": time.perf_counter() - began, "tokens": tokens}

    def decode(self, batch: int, context: int, steps: int) -> dict[str, Any]:
        """Time some steps."""
        timed = self._engine.decode(batch, context, steps)
        return {
            "seconds": timed.seconds,
            "tokens": timed.tokens,
            "choosing_seconds": timed.choosing_seconds,
        }


def prompt(number: int, length: int) -> list[int]:
    """Return the token ids of one prompt; the same for every engine."""
    chance = random.Random(number)  # noqa: S311
    return [chance.randrange(FIRST_ID, LAST_ID) for _ in range(length)]


def main() -> None:
    """Be the engine of the command line until the parent has no more questions."""
    module = importlib.import_module(ENGINES[sys.argv[1]])
    child = Child(module.Engine())
    answers: dict[str, Callable[..., dict[str, Any]]] = {
        "load": child.load,
        "prefill": child.prefill,
        "decode": child.decode,
    }
    if hasattr(module, "requantise"):
        answers["requantise"] = module.requantise
    answer_questions(answers)


if __name__ == "__main__":
    main()
