"""Which tokens a sequence has, and how often its answer has each: what penalties look at.

The counts grow with the sequence, so a step costs the same whatever came before. A sequence that is
preempted keeps its tokens, and so these. Another rank makes the same of the prompt's different
tokens and the answer's.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence


class TokenCounts:
    """Different tokens in the order they came first, int32, and how often the answer has each."""

    __slots__ = ("_places", "_prompt", "answer", "counts", "ids")

    def __init__(self, prompt: Iterable[int]) -> None:
        self._places = {token_id: at for at, token_id in enumerate(dict.fromkeys(prompt))}
        self.ids = array("i", self._places)
        self.counts = array("i", bytes(self.ids.itemsize * len(self.ids)))
        self.answer = array("i")
        """The tokens that were added, in order."""
        self._prompt = len(self.ids)

    @classmethod
    def of(cls, tokens: Sequence[int], prompt_tokens: int) -> TokenCounts:
        """Count a prompt and an answer that are there already."""
        counts = cls(tokens[:prompt_tokens])
        for token_id in tokens[prompt_tokens:]:
            counts.add(token_id)
        return counts

    @property
    def prompt_ids(self) -> array[int]:
        """The different tokens of the prompt."""
        return self.ids[: self._prompt]

    def add(self, token_id: int) -> None:
        """Note a token of the answer."""
        self.answer.append(token_id)
        place = self._places.setdefault(token_id, len(self.ids))
        if place == len(self.ids):
            self.ids.append(token_id)
            self.counts.append(0)
        self.counts[place] += 1
